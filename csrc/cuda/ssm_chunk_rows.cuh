// The rows of a chunked scan: which have chunks, where a row's chunks lie, and what is left to the recurrence.
#pragma once

#include "cuda/ssm_chunk_decays.cuh"
#include "cuda/ssm_recurrence.cuh"
#include "cuda/ssm_scan.h"

namespace headway::cuda::chunk {

// Index of the `rank`-th row (from 0) that has chunked tokens, or -1. Called by whole warps.
__device__ __forceinline__ int find_chunked_row(const RowList& rows, int rank) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int first = 0; first < rows.num_rows; first += kWarpSize) {
    const int row = first + lane;
    bool is_chunked = false;
    if (row < rows.num_rows) {
      const int num_tokens = rows.query_start[row + 1] - rows.query_start[row];
      is_chunked = num_chunked_tokens(rows.row_start[row], num_tokens) > 0;
    }
    const unsigned chunked = __ballot_sync(kFullWarp, is_chunked);
    const int count = __popc(chunked);
    if (rank < count) return first + static_cast<int>(__fns(chunked, 0, rank + 1));
    rank -= count;
  }
  return -1;
}

// The rank-th longest of every 32 rows, so that neighbours in rank are alike. Called by whole warps.
__device__ __forceinline__ int find_row_by_length(const RowList& rows, int rank) {
  if (rows.num_rows == 1) return 0;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int first = rank / kWarpSize * kWarpSize;
  const int row = first + lane;
  const int num_tokens = row < rows.num_rows ? rows.query_start[row + 1] - rows.query_start[row] : -1;
  int lane_rank = 0;
#pragma unroll
  for (int other = 0; other < kWarpSize; ++other) {
    const int length = __shfl_sync(kFullWarp, num_tokens, other);
    lane_rank += length > num_tokens || (length == num_tokens && other < lane);
  }
  return first + __ffs(static_cast<int>(__ballot_sync(kFullWarp, lane_rank == rank - first))) - 1;
}

// The row's chunked tokens, cut by the grid.
struct RowTokens {
  int begin;  // flat
  int start;      // absolute
  int num_tokens;

  __device__ __forceinline__ RowTokens(const RowList& rows, int row)
      : begin(rows.query_start[row]), start(rows.row_start[row]) {
    num_tokens = num_chunked_tokens(start, rows.query_start[row + 1] - rows.query_start[row]);
  }

  __device__ __forceinline__ int num_chunks() const {
    return num_tokens == 0 ? 0 : (start % kTokens + num_tokens + kTokens - 1) / kTokens;
  }

  // Tokens of the first `count` chunks, as if the row had no end.
  __device__ __forceinline__ int num_done(int count) const {
    return count == 0 ? 0 : count * kTokens - start % kTokens;
  }

  // Without tokens beyond the end.
  __device__ __forceinline__ Chunk chunk(int index) const { return chunk_at(num_done(index)); }

  // From the row's `done`-th token to the next point of the grid; empty at the end.
  __device__ __forceinline__ Chunk chunk_at(int done) const {
    return {begin + done, min(kTokens - (start + done) % kTokens, num_tokens - done)};
  }
};

// The snapshots of a row, in the order of their positions. Those behind its chunks are scan_rest's.
class SnapshotCursor {
 public:
  __device__ __forceinline__ SnapshotCursor(const SsmScanParams& params, int row) : params_(params) {
    if (params.snapshots.starts == nullptr) return;
    next_ = params.snapshots.starts[row];
    end_ = params.snapshots.starts[row + 1];
    look();
  }

  // The slot that takes the state after `position` tokens of the sequence, or null.
  template <typename State = float>
  __device__ __forceinline__ State* take(int position) {
    if (position != position_) return nullptr;
    State* slot = static_cast<State*>(params_.state) + params_.snapshots.slots[next_++] * params_.state_stride;
    look();
    return slot;
  }

 private:
  __device__ __forceinline__ void look() { position_ = next_ < end_ ? params_.snapshots.positions[next_] : -1; }

  const SsmScanParams& params_;
  int next_ = 0;
  int end_ = 0;
  int position_ = -1;
};

// A row's last tokens, or all of a row without chunks, token by token.
template <int kN, typename State = float>
__device__ __forceinline__ void scan_rest(const SsmScanParams& params, int row, int head, int first_channel,
                                          int num_channels, void* shared) {
  RecurrentSpan span = recurrent_span<State>(params, row);
  const RowTokens chunked(params.rows, row);
  if (chunked.num_tokens > 0) {
    if (span.begin + chunked.num_tokens == span.end) return;
    span.begin += chunked.num_tokens;
    span.source = span.target;
  }
  auto& tile = *static_cast<ScanTile<kN>*>(shared);
  scan_recurrently<__nv_bfloat16, kN, true, State>(params, span, head, first_channel, num_channels, tile);
}

}  // namespace headway::cuda::chunk
