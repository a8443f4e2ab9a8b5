"""The Mamba-2 mixer: project, convolve, scan, gate, project (Dao and Gu, 2024; `docs/shapes.md` for the letters)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch

from headway import ops
from headway.layers.linear import Linear
from headway.layers.params import Params, ParamSpec
from headway.layers.scratch import Take
from headway.models.config import MambaConfig

if TYPE_CHECKING:
    from headway.engine.batch import RowTensors, StepBatch
    from headway.models.caches import ModelCaches


def mamba2_specs(mamba: MambaConfig, hidden_size: int) -> dict[str, ParamSpec]:
    heads = (mamba.num_heads,)
    specs = {
        "in_proj": ParamSpec((mamba.in_proj_dim, hidden_size)),  # rows: z, x, B, C, dt
        "conv_weight": ParamSpec((mamba.conv_width, mamba.conv_dim)),  # tap-major
        "A": ParamSpec(heads, "decay", is_float32=True),  # -exp(A_log)
        "D": ParamSpec(heads, "ones", is_float32=True),
        "dt_bias": ParamSpec(heads, "dt_bias", is_float32=True),
        "gate_norm": ParamSpec((mamba.d_inner,), "ones"),
        "out_proj": ParamSpec((hidden_size, mamba.d_inner), "output"),
    }
    if mamba.conv_bias:
        specs["conv_bias"] = ParamSpec((mamba.conv_dim,), "zeros")
    if mamba.proj_bias:
        specs["in_proj_bias"] = ParamSpec((mamba.in_proj_dim,), "zeros")
        specs["out_proj_bias"] = ParamSpec((hidden_size,), "zeros")
    return specs


@dataclass(frozen=True)
class Mamba2Scratch:
    """Buffers of one step and the views the ops take."""

    projected: torch.Tensor  # [T, d_inner + conv_dim + H]
    z: torch.Tensor  # [T, d_inner], a slice of projected, likewise below
    raw_columns: torch.Tensor  # [T, conv_dim] before the convolution
    dt: torch.Tensor  # [T, H]
    columns: torch.Tensor  # [T, conv_dim] after the convolution
    x: torch.Tensor  # [T, H, P], a slice of columns, likewise below
    B: torch.Tensor  # [T, G, N]
    C: torch.Tensor  # [T, G, N]
    scanned_heads: torch.Tensor  # [T, H, P]
    scanned: torch.Tensor  # [T, d_inner], the same memory
    gated: torch.Tensor  # [T, d_inner]
    parts: dict[int, tuple[Mamba2Scratch, Mamba2Scratch]] = field(default_factory=dict)  # the last split

    def split(self, num_tokens: int) -> tuple[Mamba2Scratch, Mamba2Scratch]:
        """The first num_tokens and the rest. Kept: all layers of a step ask for the same."""
        if num_tokens not in self.parts:
            tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "parts"}
            self.parts.clear()
            self.parts[num_tokens] = (
                Mamba2Scratch(**{name: tensor[:num_tokens] for name, tensor in tensors.items()}),
                Mamba2Scratch(**{name: tensor[num_tokens:] for name, tensor in tensors.items()}),
            )
        return self.parts[num_tokens]

    @classmethod
    def allocate(cls, mamba: MambaConfig, take: Take) -> Mamba2Scratch:
        states = mamba.num_groups * mamba.state_size
        projected = take("mamba_projected", mamba.in_proj_dim, None)
        z, raw_columns, dt = torch.split(projected, [mamba.d_inner, mamba.conv_dim, mamba.num_heads], dim=1)
        columns = take("mamba_columns", mamba.conv_dim, None)
        x, B, C = torch.split(columns, [mamba.d_inner, states, states], dim=1)
        scanned = take("mamba_scanned", mamba.d_inner, None)
        heads = (mamba.num_heads, mamba.head_dim)
        groups = (mamba.num_groups, mamba.state_size)
        return cls(
            projected=projected,
            z=z,
            raw_columns=raw_columns,
            dt=dt,
            columns=columns,
            x=torch.unflatten(x, 1, heads),
            B=torch.unflatten(B, 1, groups),
            C=torch.unflatten(C, 1, groups),
            scanned_heads=torch.unflatten(scanned, 1, heads),
            scanned=scanned,
            gated=take("mamba_gated", mamba.d_inner, None),
        )


class Mamba2:
    """One mixer. `cache_idx` counts Mamba layers from 0."""

    def __init__(
        self, mamba: MambaConfig, norm_eps: float, params: Params, cache_idx: int, is_invariant: bool = False
    ) -> None:
        self.in_proj = Linear(params["in_proj"], params.get("in_proj_bias"), is_invariant=is_invariant)
        self.out_proj = Linear(params["out_proj"], params.get("out_proj_bias"), is_invariant=is_invariant)
        self.weights = ops.MixerWeights(
            conv_weight=params["conv_weight"],
            conv_bias=params.get("conv_bias"),
            A=params["A"],
            D=params["D"],
            dt_bias=params["dt_bias"],
            norm_weight=params["gate_norm"],
            norm_eps=norm_eps,
            norm_group_size=mamba.norm_group_size or mamba.d_inner // mamba.num_groups,
            dt_min=mamba.dt_min,
            dt_max=mamba.dt_max,
        )
        self.cache_idx = cache_idx

    def __call__(
        self,
        hidden: torch.Tensor,
        batch: StepBatch,
        caches: ModelCaches,
        scratch: Mamba2Scratch,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """hidden [T, C] -> out [T, C]; advances the rows' convolution and SSM state."""
        self.in_proj.into(hidden, scratch.projected)
        num_logged = batch.num_decode_rows if caches.state_log else 0
        if num_logged == 0:
            self._scan(batch.all_rows, batch.max_query_len, caches, scratch)
        elif num_logged == batch.num_rows:
            self._decode(batch, caches, scratch)
        else:
            decoded, chunks = scratch.split(num_logged)
            self._decode(batch, caches, decoded)
            self._scan(batch.chunk_rows, batch.max_query_len, caches, chunks)
        return self.out_proj(scratch.gated, out)

    def fold_states(
        self, caches: ModelCaches, state_base: torch.Tensor, copies_address: int, num_copies: int
    ) -> None:
        idx = self.cache_idx
        ops.fold_states(
            self.weights,
            caches.conv_state[idx],
            caches.ssm_state[idx],
            caches.state_log[idx],
            state_base,
            copies_address,
            num_copies,
        )

    def _scan(
        self, rows: RowTensors, max_query_len: int, caches: ModelCaches, scratch: Mamba2Scratch
    ) -> None:
        """Rows of any length, over states in place: projected -> gated."""
        weights = self.weights
        where = (rows.query_start, rows.row_start, rows.read_slots, rows.write_slots)
        ops.causal_conv1d(
            scratch.raw_columns,
            weights.conv_weight,
            weights.conv_bias,
            caches.conv_state[self.cache_idx],
            *where,
            snapshots=rows.snapshots,
            out=scratch.columns,
        )
        ops.ssm_scan(
            scratch.x,
            scratch.B,
            scratch.C,
            scratch.dt,
            weights.A,
            weights.D,
            weights.dt_bias,
            caches.ssm_state[self.cache_idx],
            *where,
            weights.dt_min,
            weights.dt_max,
            max_query_len=max_query_len,
            snapshots=rows.snapshots,
            out=scratch.scanned_heads,
        )
        ops.gated_rms_norm(
            scratch.scanned,
            scratch.z,
            weights.norm_weight,
            weights.norm_eps,
            weights.norm_group_size,
            out=scratch.gated,
        )

    def _decode(self, batch: StepBatch, caches: ModelCaches, scratch: Mamba2Scratch) -> None:
        """The step's decode rows, over slot windows: projected -> gated."""
        num_rows = batch.num_decode_rows
        ops.mamba_decode(
            scratch.z,
            scratch.raw_columns,
            scratch.dt,
            self.weights,
            caches.conv_state[self.cache_idx],
            caches.ssm_state[self.cache_idx],
            caches.state_log[self.cache_idx],
            batch.query_start[: num_rows + 1],
            batch.row_start[:num_rows],
            batch.write_slots[:num_rows],
            batch.state_base[:num_rows],
            out=scratch.gated,
        )
