// prefix_bench [prompts]: host time of what the prefix cache does for a prompt of 32,768 tokens in blocks of 16: match
// a prompt that is not there, add it, match it again, in a tree that is full, so that each new node evicts an old one.
// Medians in us, since the machine may be shared. Exits 1 if a measured call allocated.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "core/prefix_tree.h"
#include "tests/counting_new.h"

namespace headway {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int32_t kPromptLen = 32768;
constexpr int32_t kBlockSize = 16;
constexpr int32_t kNumBlocks = 1 << 17;

struct Timing {
  std::vector<double> miss_us;
  std::vector<double> insert_us;
  std::vector<double> hit_us;
  int64_t num_allocations = 0;
};

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

double microseconds(Clock::time_point begin) {
  return std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
}

LedgerConfig bench_config() {
  LedgerConfig config{.max_rows = 1,
                      .num_blocks = kNumBlocks,
                      .block_size = kBlockSize,
                      .max_model_len = kPromptLen + 1,
                      .max_step_tokens = kPromptLen,
                      .vocab_size = 131072};
  config.use_prefix_cache = true;
  return config;
}

// As PrefixCache::advance does it: each block is looked for under its parent and added where it is not there.
int32_t insert(PrefixTree& tree, BlockPool& blocks, int32_t root, const std::vector<int32_t>& prompt) {
  int32_t node = root;
  TagsAhead tags = tree.tags_below(root, prompt);
  for (int32_t begin = 0; begin < kPromptLen; begin += kBlockSize) {
    const auto tokens = std::span<const int32_t>(prompt).subspan(begin, kBlockSize);
    const PrefixTree::Key key{node, tags.next(), tokens};
    int32_t child = tree.find_child(key);
    if (child != 0) {
      tree.pin_one(child);
    } else {
      if (blocks.num_free() == 0) tree.evict_leaf();
      const int32_t block = blocks.acquire();
      child = tree.add_child(key, block, 1);
      blocks.release(block, 0);
    }
    node = child;
  }
  return node;
}

Timing measure(int32_t num_prompts) {
  const LedgerConfig config = bench_config();
  const StepClock clock;
  BlockPool blocks(config, clock);
  PrefixTree tree(config, clock, blocks);
  const int32_t root = tree.open_root("");
  Timing timing;
  const int32_t num_rounds = kNumBlocks * kBlockSize / kPromptLen + num_prompts;
  for (auto* times : {&timing.miss_us, &timing.insert_us, &timing.hit_us}) times->reserve(num_rounds);
  for (int32_t i = 0; i < num_rounds; ++i) {
    std::vector<int32_t> prompt(kPromptLen);
    const int64_t num_before = checks::num_allocations();
    for (int32_t k = 0; k < kPromptLen; ++k) prompt[k] = (i * 7919 + k * 31) % 131072;
    auto begin = Clock::now();
    const PrefixMatch before = tree.match(root, prompt);
    timing.miss_us.push_back(microseconds(begin));
    begin = Clock::now();
    const int32_t node = insert(tree, blocks, root, prompt);
    timing.insert_us.push_back(microseconds(begin));
    tree.unpin_path(node);
    begin = Clock::now();
    const PrefixMatch after = tree.match(root, prompt);
    timing.hit_us.push_back(microseconds(begin));
    timing.num_allocations += checks::num_allocations() - num_before;
    if (before.num_tokens != 0 || after.num_tokens != kPromptLen) std::abort();
  }
  for (auto* times : {&timing.miss_us, &timing.insert_us, &timing.hit_us})
    times->erase(times->begin(), times->end() - num_prompts);
  return timing;
}

}  // namespace
}  // namespace headway

int main(int argc, char** argv) {
  const int32_t num_prompts = argc > 1 ? std::atoi(argv[1]) : 200;
  const auto timing = headway::measure(num_prompts);
  const double miss = headway::median(timing.miss_us);
  const double insert = headway::median(timing.insert_us);
  const double hit = headway::median(timing.hit_us);
  std::printf(
      "{\"prompt_tokens\": %d, \"block_size\": %d, \"prompts\": %d, \"miss_us\": %.1f, \"insert_us\": %.1f, "
      "\"hit_us\": %.1f, \"hit_and_insert_us\": %.1f}\n",
      headway::kPromptLen, headway::kBlockSize, num_prompts, miss, insert, hit, hit + insert);
  return timing.num_allocations > 0;
}
