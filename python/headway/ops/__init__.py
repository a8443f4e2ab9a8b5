"""One thin function an op over torch tensors: checks shapes by name, fills the arguments, launches.

Each op `f` has a twin `f_ref` in `ops.reference` with the same signature in plain torch, which judges it in tests.
`ops.library` registers the kernels as `torch.ops.headway.*` for users and torch.compile; layers call these functions.
"""

from headway.ops.attention import kv_write, paged_attention, rotary
from headway.ops.backend import set_num_threads
from headway.ops.fold_states import fold_states
from headway.ops.linear import MAX_SKINNY_TOKENS, PackedMatrix, linear, pack_linear, skinny_linear
from headway.ops.mamba import causal_conv1d, ssm_scan
from headway.ops.mamba_decode import mamba_decode
from headway.ops.moe import moe_experts
from headway.ops.move_records import RecordPools, move_records
from headway.ops.norm import add_rms_norm, gated_rms_norm, rms_norm
from headway.ops.pointwise import activation
from headway.ops.records import ActivationKind, Routing, ScoreKind, Snapshots
from headway.ops.routing import NUM_ROUTE_GROUPS, fits_route_hidden, route, route_hidden
from headway.ops.sample import sample, score
from headway.ops.state import copy_states
from headway.ops.state_log import MixerWeights, StateLog, StateWindow
from headway.ops.step import StepBuffers, begin_step, finish_step

__all__ = [
    "MAX_SKINNY_TOKENS",
    "NUM_ROUTE_GROUPS",
    "ActivationKind",
    "MixerWeights",
    "PackedMatrix",
    "RecordPools",
    "Routing",
    "ScoreKind",
    "Snapshots",
    "StateLog",
    "StateWindow",
    "StepBuffers",
    "activation",
    "add_rms_norm",
    "begin_step",
    "causal_conv1d",
    "copy_states",
    "finish_step",
    "fits_route_hidden",
    "fold_states",
    "gated_rms_norm",
    "kv_write",
    "linear",
    "mamba_decode",
    "moe_experts",
    "move_records",
    "pack_linear",
    "paged_attention",
    "rms_norm",
    "rotary",
    "route",
    "route_hidden",
    "sample",
    "score",
    "set_num_threads",
    "skinny_linear",
    "ssm_scan",
]
