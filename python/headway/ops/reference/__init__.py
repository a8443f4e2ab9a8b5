"""Every op in plain torch with the op's own signature: `<op>_ref`. Slow, sequential, and right."""

from headway.ops.reference.attention import kv_write_ref, paged_attention_ref, rotary_ref
from headway.ops.reference.linear import linear_ref
from headway.ops.reference.mamba import causal_conv1d_ref, ssm_scan_ref
from headway.ops.reference.mamba_decode import fold_states_ref, mamba_decode_ref
from headway.ops.reference.moe import activation_ref, moe_experts_ref, route_ref
from headway.ops.reference.move_records import move_records_ref
from headway.ops.reference.norm import add_rms_norm_ref, gated_rms_norm_ref, rms_norm_ref
from headway.ops.reference.sample import sample_ref, score_ref
from headway.ops.reference.state import copy_states_ref
from headway.ops.reference.step import begin_step_ref, finish_step_ref

__all__ = [
    "activation_ref",
    "add_rms_norm_ref",
    "begin_step_ref",
    "causal_conv1d_ref",
    "copy_states_ref",
    "finish_step_ref",
    "fold_states_ref",
    "gated_rms_norm_ref",
    "kv_write_ref",
    "linear_ref",
    "mamba_decode_ref",
    "moe_experts_ref",
    "move_records_ref",
    "paged_attention_ref",
    "rms_norm_ref",
    "rotary_ref",
    "route_ref",
    "sample_ref",
    "score_ref",
    "ssm_scan_ref",
]
