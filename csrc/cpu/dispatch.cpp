// Chooses the SIMD level, once, from what the processor says, and forwards each op to that level's kernels.
#include <atomic>
#include <stdexcept>

#include "cpu/variants.h"

namespace headway::cpu {
namespace {

enum class Level : int { kPlain, kAvx2, kAvx512 };

struct LevelName {
  Level level;
  const char* name;
};

std::vector<LevelName> available_levels() {
  std::vector<LevelName> levels;
#if defined(HEADWAY_X86)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx2 && has_avx512) levels.push_back({Level::kAvx512, "avx512"});
  if (has_avx2) levels.push_back({Level::kAvx2, "avx2"});
#endif
  levels.push_back({Level::kPlain, "plain"});
  return levels;
}

std::atomic<Level>& current_level() {
  static std::atomic<Level> level{available_levels().front().level};
  return level;
}

}  // namespace

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const LevelName& entry : available_levels()) names.emplace_back(entry.name);
  return names;
}

void set_simd_level(const std::string& name) {
  for (const LevelName& entry : available_levels()) {
    if (entry.name == name) {
      current_level() = entry.level;
      return;
    }
  }
  throw std::invalid_argument("set_simd_level: this machine or build has no level " + name);
}

#if defined(HEADWAY_X86)
#define HEADWAY_FORWARD(op, Params)       \
  void op(const Params& params, Stream) { \
    switch (current_level().load()) {     \
      case Level::kAvx512:                \
        return avx512::op(params);        \
      case Level::kAvx2:                  \
        return avx2::op(params);          \
      case Level::kPlain:                 \
        return plain::op(params);         \
    }                                     \
  }
#else
#define HEADWAY_FORWARD(op, Params)       \
  void op(const Params& params, Stream) { \
    plain::op(params);                    \
  }
#endif
HEADWAY_SIMD_OPS(HEADWAY_FORWARD)
#undef HEADWAY_FORWARD

int64_t paged_attention_workspace_bytes(const PagedAttentionParams&) {
  return 0;
}

}  // namespace headway::cpu
