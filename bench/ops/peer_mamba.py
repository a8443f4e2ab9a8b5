"""The same layer on vLLM's Triton kernels, where vLLM is installed: the figures that ours are compared with.

The kernels run on the same bench_mamba.Mixers in turn as ours do, so neither finds its states in the cache. Their
time is the sum of their own durations by the profiler: some synchronise, so they cannot be captured in a graph.
Where vLLM is not installed, times that were recorded on the same kind of GPU stand in for it, under another name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.ops.peers import is_vllm_installed, kernel_us, vllm_configured
from bench.ops.report import device_name

if TYPE_CHECKING:
    from bench.ops.bench_mamba import Mixer


RECORDED = Path(__file__).with_name("recorded_vllm_h200.json")
DECODE_KERNELS = ("conv_step", "ssm_step", "gated_norm")
DECODE_CHAINS = ("decode_chain", "decode_window")


def peers_of(mixers: Sequence[Mixer], entry: str) -> dict[str, Callable[[], float]]:
    """What measures the peer's time for a bench_mamba entry, by the peer's name; none where there is no such time."""
    kind = entry.split("/")[0]
    if is_vllm_installed():
        return {"vllm": partial(peer_us, mixers, "decode_chain" if kind in DECODE_CHAINS else kind)}
    us = recorded_us(entry, device_name())
    return {} if us is None else {"vllm, another sitting": lambda: us}


def peer_us(mixers: Sequence[Mixer], kind: str) -> float:
    """Time of the calls that do what bench_mamba's entry of this kind does."""
    with vllm_configured():
        return kernel_us([PeerMixer(mixer).calls()[kind] for mixer in mixers])


def recorded_us(entry: str, gpu: str) -> float | None:
    """The peer's recorded time, if there is one and it was taken on this kind of GPU; a decode chain's is its sum."""
    recorded = _recorded()
    if recorded["gpu"] != gpu:
        return None
    kind, shape, load = entry.split("/")[:3]
    kinds = DECODE_KERNELS if kind in DECODE_CHAINS else (kind,)
    names = [f"{part}/{shape}/{load}" + ("/fp32" if part == "ssm_step" else "") for part in kinds]
    times = [recorded["us"].get(name) for name in names]
    return None if None in times else sum(times)


@cache
def _recorded() -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads(RECORDED.read_text())
    return recorded


class PeerMixer:
    """vLLM's calls for one Mixer; entry names as in bench_mamba."""

    def __init__(self, mixer: Mixer) -> None:
        self.mixer = mixer
        shape, rows = mixer.shape, mixer.rows
        self.query_start, self.slots = rows[0], rows[3]
        self.has_state = torch.ones_like(self.slots, dtype=torch.bool)
        self.conv_state = mixer.conv_state.transpose(1, 2)  # [slots, conv_dim, W - 1], channels contiguous
        self.conv_weight = mixer.conv_weight.t().contiguous()
        self.initial = mixer.ssm_state[self.slots.long()]
        self.heads = [value[:, None, None] for value in (mixer.A, mixer.D, mixer.dt_bias)]
        self.chunks = self._chunks(self.query_start.tolist(), shape.chunk_size)

    def calls(self) -> dict[str, Callable[[], object]]:
        return {
            "ssd": self.scan,
            "conv": self.conv,
            "gated_norm_prefill": self.norm,
            "chain": self.chain,
            "conv_step": self.conv_step,
            "ssm_step": self.scan_step,
            "gated_norm": self.norm,
            "decode_chain": self.decode_chain,
        }

    @staticmethod
    def _chunks(query_start: list[int], chunk_size: int) -> dict[str, Any]:
        """Chunks in whole rows: their bounds, their rows, and each row's last."""
        bounds, row_ids, last = [0], [], []
        for row, end in enumerate(query_start[1:]):
            while bounds[-1] < end:
                bounds.append(min(bounds[-1] + chunk_size, end))
                row_ids.append(row)
            last.append(len(row_ids) - 1)
        on_device = [torch.tensor(v, dtype=torch.int32, device="cuda") for v in (bounds, last, row_ids)]
        return dict(zip(("cu_chunk_seqlens", "last_chunk_indices", "seq_idx"), on_device, strict=True))

    def conv(self) -> torch.Tensor:
        """[conv_dim, T]"""
        from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn

        return causal_conv1d_fn(
            self.mixer.raw.t(), self.conv_weight, self.mixer.conv_bias, self.conv_state, self.query_start,
            cache_indices=self.slots, has_initial_state=self.has_state, activation="silu",
        )  # fmt: skip

    def scan(self) -> torch.Tensor:
        """The rows' last states; outputs are in the mixer."""
        from vllm.model_executor.layers.mamba.ops.ssd_combined import mamba_chunk_scan_combined_varlen

        m = self.mixer
        return mamba_chunk_scan_combined_varlen(
            m.x, m.dt, m.A, m.B, m.C, m.shape.chunk_size, cu_seqlens=self.query_start, **self.chunks, out=m.y,
            D=m.D, z=None, dt_bias=m.dt_bias, initial_states=self.initial, dt_softplus=True,
            state_dtype=torch.float32,
        )  # fmt: skip

    def norm(self) -> torch.Tensor:
        from vllm.model_executor.layers.mamba.ops.layernorm_gated import rms_norm_gated

        m = self.mixer
        group_size = m.shape.d_inner // m.shape.num_groups
        return rms_norm_gated(
            m.y.flatten(1),
            m.norm_weight,
            None,
            z=m.z,
            eps=1e-5,
            group_size=group_size,
            norm_before_gate=False,
        )

    def chain(self) -> None:
        self.conv()
        self.scan()
        self.norm()

    def conv_step(self) -> torch.Tensor:
        """[rows, conv_dim], which may be the input's memory"""
        from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update

        m = self.mixer
        return causal_conv1d_update(
            m.raw, self.conv_state, self.conv_weight, m.conv_bias, "silu", conv_state_indices=self.slots
        )

    def scan_step(self) -> None:
        from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_state_update

        m = self.mixer
        state_shape = m.ssm_state.shape[1:]
        A, D, dt_bias = self.heads
        selective_state_update(
            m.ssm_state, m.x, m.dt[:, :, None].expand(m.x.shape), A.expand(state_shape), m.B, m.C,
            D[:, :, 0].expand(state_shape[:2]), dt_bias=dt_bias[:, :, 0].expand(state_shape[:2]), z=None,
            dt_softplus=True, state_batch_indices=self.slots, out=m.y,
        )  # fmt: skip

    def decode_chain(self) -> None:
        self.conv_step()
        self.scan_step()
        self.norm()
