// The kernels behind ssm_scan, and which tokens of a row run in chunks.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params/mamba.h"

namespace headway::cuda {

// The chunk grid: chunks end at absolute positions that are multiples of this, whatever the step's cuts.
inline constexpr int kChunkTokens = 64;

// Rows, and last chunks behind a full one, of at most this many tokens run token by token. So does every decode row.
inline constexpr int kMaxRecurrentTokens = 8;

// How many of a row's first tokens run in chunks. The rest, at most kMaxRecurrentTokens, run token by token. A function
// of the row's absolute positions alone, so that the cuts of a prompt at multiples of kChunkTokens change no bit: the
// last few tokens run alike whether they come alone or not.
__host__ __device__ constexpr int num_chunked_tokens(int start, int num_tokens) {
  if (num_tokens <= kMaxRecurrentTokens) return 0;
  const int tail = (start + num_tokens) % kChunkTokens;
  return tail <= kMaxRecurrentTokens && tail < num_tokens ? num_tokens - tail : num_tokens;
}

// Rows that may have chunks, as far as the host can tell.
inline int64_t max_chunked_rows(const SsmScanParams& params) {
  const int64_t most = params.num_tokens / (kMaxRecurrentTokens + 1);
  return most < params.rows.num_rows ? most : params.rows.num_rows;
}

// Every token of every row, token by token, the state in fp32 registers: the same bits whatever the cuts.
void launch_recurrent_scan(const SsmScanParams& params, cudaStream_t stream);

// The same for the rows that have no chunks; the others are left alone.
void launch_short_rows_scan(const SsmScanParams& params, cudaStream_t stream);

// True when the wide kernel has code for these shapes, strides and this device: heads of multiples of 80 channels.
bool can_scan_wide(const SsmScanParams& params);

// What launch_chunked_scan does, in a second launch for rows without chunks where there may be some.
void launch_wide_scan(const SsmScanParams& params, cudaStream_t stream);

// True when the warpgroup kernel has code for these shapes, strides and this device.
bool can_scan_warpgroups(const SsmScanParams& params);

// As launch_wide_scan.
void launch_warpgroup_scan(const SsmScanParams& params, cudaStream_t stream);

// Among the shapes of can_scan_warpgroups: whether blocks of two warpgroups take these rows in less time.
bool prefers_paired_scan(const SsmScanParams& params);

// As launch_warpgroup_scan, which calls it where it is preferred.
void launch_paired_scan(const SsmScanParams& params, cudaStream_t stream);

// True when the chunked kernel has code for these shapes, strides and this device.
bool can_scan_chunks(const SsmScanParams& params);

// The first num_chunked_tokens of every row on the tensor cores, the rest token by token, in one launch.
void launch_chunked_scan(const SsmScanParams& params, cudaStream_t stream);

}  // namespace headway::cuda
