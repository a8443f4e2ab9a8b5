// The CUDA kernels, one function an op: a parameter struct of raw device pointers, and the stream to launch on. Nothing
// here waits for the device. Every function throws std::runtime_error naming the op when a shape is not supported or
// when CUDA refuses the launch.
#pragma once

#include "params/attention.h"
#include "params/common.h"
#include "params/linear.h"
#include "params/mamba.h"
#include "params/moe.h"
#include "params/norm.h"
#include "params/records.h"
#include "params/state.h"
#include "params/step.h"

namespace headway::cuda {

void rms_norm(const RmsNormParams& params, Stream stream);
void gated_rms_norm(const GatedRmsNormParams& params, Stream stream);
void causal_conv1d(const CausalConv1dParams& params, Stream stream);
void ssm_scan(const SsmScanParams& params, Stream stream);
void mamba_decode(const MambaDecodeParams& params, Stream stream);
void fold_states(const FoldStatesParams& params, Stream stream);
void rotary(const RotaryParams& params, Stream stream);
void kv_write(const KvWriteParams& params, Stream stream);
// Bytes of scratch that paged_attention wants for these sizes; 0 when it needs none. Pointers are not read.
int64_t paged_attention_workspace_bytes(const PagedAttentionParams& params);
void paged_attention(const PagedAttentionParams& params, Stream stream);
void activation(const ActivationParams& params, Stream stream);
// bfloat16 or float16.
void skinny_linear(const SkinnyLinearParams& params, Stream stream);
void route(const RouteParams& params, Stream stream);
void route_hidden(const RouteHiddenParams& params, Stream stream);
// Up to 256 tokens of bfloat16 or float16.
void moe_experts(const MoeExpertsParams& params, Stream stream);
bool has_warpgroup_experts();  // whether moe_experts makes use of results on the current device
void combine_experts(const CombineExpertsParams& params, Stream stream);
void begin_step(const BeginStepParams& params, Stream stream);
// Bytes that SampleParams::scan must have.
int64_t sample_scan_bytes(int32_t num_sampled, int32_t vocab_size);
int64_t sample_scratch_bytes(int32_t num_sampled, int32_t vocab_size);
void sample(const SampleParams& params, Stream stream);
void finish_step(const FinishStepParams& params, Stream stream);
void copy_states(const CopyStatesParams& params, Stream stream);
void move_records(const MoveRecordsParams& params, Stream stream);

}  // namespace headway::cuda
