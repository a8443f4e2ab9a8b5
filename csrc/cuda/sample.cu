// The sampler: a scan of the logits, then a block a row that makes its token of what the scan left (sample_scan.cuh),
// then teams of blocks for the rows that those leave (sample_team.cuh): rows that want log probabilities of what is
// sampled from or are scored, a large top_k, more ties than the scan takes.
#include <algorithm>

#include "cuda/common/chained.cuh"
#include "cuda/common/check.h"
#include "cuda/common/device.h"
#include "cuda/ops.h"
#include "cuda/sample_scan.cuh"
#include "cuda/sample_team.cuh"

namespace headway::cuda {
namespace {

constexpr char kOp[] = "sample";
constexpr int kSliceAlign = 128;    // so that a slice keeps the row's 16-byte alignment
constexpr int kSliceTarget = 8192;  // a team grows until its slices are no larger, or it is full
constexpr int kClusterArchitecture = 90;
constexpr int kTeamBlocks = 2;  // a multiprocessor

struct SampleMemory {
  TeamMemory team;
  SelectMemory select;
};

// The rows that the scan and the rows' end left to teams.
struct LeftRows {
  const int32_t* is_done;  // null: there was no scan, all rows are left
  bool are_foreseen;  // the blocks start before the rows' end is over: by what rows ask for they see who may be left
};

// The scan's blocks have seen the end of the kernels before it: what those wrote can be read before the scan is over.
__device__ bool may_be_left(const SampleParams& params, int first, int num_teams) {
  bool is_open = false;
  for (int i = first + static_cast<int>(threadIdx.x) * num_teams; i < params.num_sampled;
       i += kSampleThreads * num_teams) {
    const ScannedRow row(params, i);
    is_open = is_open || (row.row != kDummyRow && !row.is_plain);
  }
  return __syncthreads_or(is_open) != 0;
}

// Teams deal the rows that are left among themselves.
template <bool kOnChip>
__global__ void __launch_bounds__(kSampleThreads, kTeamBlocks)
    sample_kernel(const __grid_constant__ SampleParams params, LeftRows left, int slice_size) {
  extern __shared__ float4 on_chip[];
  __shared__ SampleMemory memory;
  Team team(memory.team);
  const int begin = min(team.rank() * slice_size, params.vocab_size);
  Slice slice{reinterpret_cast<float*>(on_chip), begin, min(slice_size, params.vocab_size - begin)};
  const int num_teams = static_cast<int>(gridDim.x) / team.size();
  const int first = static_cast<int>(blockIdx.x) / team.size();

  allow_next_kernel();
  if (left.are_foreseen && !may_be_left(params, first, num_teams)) {
    if (blockIdx.x == 0) wait_for_previous_kernel();  // for all: a kernel is over once its last block is
    return;
  }
  wait_for_previous_kernel();
  const int32_t* is_done = left.is_done;
  bool is_left = is_done == nullptr;
  if (is_done != nullptr) {
    for (int i = first + static_cast<int>(threadIdx.x) * num_teams; i < params.num_sampled;
         i += kSampleThreads * num_teams) {
      is_left = is_left || is_done[i] == 0;
    }
  }
  if (__syncthreads_or(is_left) == 0) return;
  for (int index = first; index < params.num_sampled; index += num_teams) {
    if (is_done != nullptr && is_done[index] != 0) continue;
    if constexpr (!kOnChip) slice.values = params.scratch + static_cast<int64_t>(index) * params.vocab_size + begin;
    sample_one(team, memory.select, params, index, slice);
  }
}

// How a row is spread over blocks: a function of the vocabulary and the device.
struct TeamShape {
  int num_blocks;
  int slice_size;
  bool is_on_chip;
};

// By what the kernel was compiled for: a device newer than that runs code without clusters.
TeamShape choose_team(int vocab_size) {
  TeamShape team{1, 0, true};
  const int max_blocks = is_compiled_for(sample_kernel<true>, kClusterArchitecture, kOp) ? kMaxTeamBlocks : 1;
  while (team.num_blocks < max_blocks && team.num_blocks * kSliceTarget < vocab_size) team.num_blocks *= 2;
  const int share = (vocab_size + team.num_blocks - 1) / team.num_blocks;
  team.slice_size = (share + kSliceAlign - 1) / kSliceAlign * kSliceAlign;
  const int64_t slice_bytes = static_cast<int64_t>(team.slice_size) * sizeof(float);
  const int64_t most_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kOp);
  team.is_on_chip = slice_bytes + static_cast<int64_t>(sizeof(SampleMemory)) <= most_bytes;
  return team;
}

void launch_team(const SampleParams& params, const TeamShape& team, const int32_t* is_done, cudaStream_t stream) {
  auto* kernel = team.is_on_chip ? sample_kernel<true> : sample_kernel<false>;
  const int64_t slice_bytes = team.is_on_chip ? static_cast<int64_t>(team.slice_size) * sizeof(float) : 0;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(slice_bytes)), kOp);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(team.num_blocks), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(team.num_blocks));
  config.blockDim = dim3(kSampleThreads);
  config.dynamicSmemBytes = static_cast<size_t>(slice_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = is_compiled_for(sample_kernel<true>, kClusterArchitecture, kOp) ? 2 : 0;
  const int num_multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, kOp);
  int most_teams = num_multiprocessors;  // at once
  if (team.num_blocks > 1) check(cudaOccupancyMaxActiveClusters(&most_teams, kernel, &config), kOp);
  config.gridDim.x *= static_cast<unsigned>(std::clamp(params.num_sampled, 1, std::max(1, most_teams)));
  // Else most teams wait for the multiprocessors that rows' ends fill, one each, and looking costs them a microsecond.
  const int num_filled = params.num_sampled + static_cast<int>(config.gridDim.x) / kTeamBlocks;
  const LeftRows left{is_done, is_done != nullptr && num_filled <= num_multiprocessors};
  check(cudaLaunchKernelEx(&config, kernel, params, left, team.slice_size), kOp);
}

}  // namespace

int64_t sample_scan_bytes(int32_t num_sampled, int32_t vocab_size) {
  return ScanSpace::flag_bytes(num_sampled) +
         static_cast<int64_t>(num_sampled) * num_pieces(vocab_size) * static_cast<int64_t>(sizeof(PieceSummary));
}

int64_t sample_scratch_bytes(int32_t num_sampled, int32_t vocab_size) {
  return choose_team(vocab_size).is_on_chip ? 0 : static_cast<int64_t>(num_sampled) * vocab_size * int64_t{4};
}

void sample(const SampleParams& params, Stream stream) {
  if (params.num_sampled == 0) return;
  require(params.vocab_size > 0, kOp, "vocab_size must be positive");
  const TeamShape team = choose_team(params.vocab_size);
  require(team.is_on_chip || params.scratch != nullptr, kOp, "a row does not fit on chip: scratch must be given");
  const bool is_scanned =
      params.targets == nullptr && num_pieces(params.vocab_size) <= kMaxPieces && params.num_sampled <= kMaxScannedRows;
  require(!is_scanned || params.scan != nullptr, kOp, "scan must be given");
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (is_scanned) {
    launch_sample_scan(params, cuda_stream);
    launch_sample_finish(params, cuda_stream);
  }
  launch_team(params, team, is_scanned ? ScanSpace(params).is_done : nullptr, cuda_stream);
}

}  // namespace headway::cuda
