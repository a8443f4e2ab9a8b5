// The CPU kernels, one function an op. They finish before they return; the stream is unused and kept so that CPU and
// GPU kernels are called alike. A row's result never depends on its batch mates, on the threads, or on how its tokens
// are split over calls; it does depend, within rounding, on the SIMD level.
#pragma once

#include <string>
#include <vector>

#include "params/attention.h"
#include "params/common.h"
#include "params/linear.h"
#include "params/mamba.h"
#include "params/moe.h"
#include "params/norm.h"
#include "params/records.h"
#include "params/state.h"
#include "params/step.h"

namespace headway::cpu {

void rms_norm(const RmsNormParams& params, Stream stream);
void gated_rms_norm(const GatedRmsNormParams& params, Stream stream);
void causal_conv1d(const CausalConv1dParams& params, Stream stream);
void ssm_scan(const SsmScanParams& params, Stream stream);
void rotary(const RotaryParams& params, Stream stream);
void kv_write(const KvWriteParams& params, Stream stream);
int64_t paged_attention_workspace_bytes(const PagedAttentionParams& params);  // 0
void paged_attention(const PagedAttentionParams& params, Stream stream);
void activation(const ActivationParams& params, Stream stream);
void linear(const LinearParams& params, Stream stream);
void route(const RouteParams& params, Stream stream);
void moe_experts(const MoeExpertsParams& params, Stream stream);
void begin_step(const BeginStepParams& params, Stream stream);
void sample(const SampleParams& params, Stream stream);
void finish_step(const FinishStepParams& params, Stream stream);
void copy_states(const CopyStatesParams& params, Stream stream);
void move_records(const MoveRecordsParams& params, Stream stream);

// SIMD levels this build has and this processor runs, best first; the first is in use until another is set.
std::vector<std::string> simd_levels();
void set_simd_level(const std::string& name);

}  // namespace headway::cpu
