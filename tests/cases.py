"""Cases of every op as data, shared by the tests (small, awkward shapes) and the benchmarks (shapes of real models).

Builders turn a case into tensors on a device. What an op must not read is NaN: gaps between strided tokens, slots and
blocks of nobody, the unused end of a row's last block, the state of a row that starts afresh.
"""

from __future__ import annotations

from dataclasses import dataclass, field

NAN = float("nan")


@dataclass(frozen=True)
class Rows:
    """Ragged rows: tokens of this step and the absolute position of the first, for each row."""

    lengths: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def max_query_len(self) -> int:
        return max(self.lengths, default=0)

    @property
    def max_kv_len(self) -> int:
        return max((s + n for s, n in zip(self.starts, self.lengths, strict=True)), default=0)


def decode_rows(num_rows: int, kv_len: int) -> Rows:
    return Rows((1,) * num_rows, (kv_len - 1,) * num_rows)


ROWS = {
    "one_prompt": Rows((37,), (0,)),
    "one_token": Rows((1,), (0,)),
    "decode": Rows((1, 1, 1, 1, 1), (3, 17, 1, 64, 200)),
    "mixed": Rows((1, 1, 19, 5, 33), (40, 7, 0, 12, 0)),
    "tile_edges": Rows((15, 16, 17, 32, 31), (1, 0, 16, 32, 33)),
    "empty_rows": Rows((0, 3, 0, 0, 2), (5, 0, 0, 9, 4)),
    "no_tokens": Rows((0, 0), (0, 6)),
    "no_rows": Rows((), ()),
}


@dataclass(frozen=True)
class NormCase:
    num_tokens: int
    hidden: int
    gap: int = 0  # elements between tokens
    group_size: int = 0  # of the gated norm; 0 = hidden


NORM_CASES = {
    "regular": NormCase(5, 128),
    "odd": NormCase(3, 131, gap=7),
    "one_lane": NormCase(4, 1),
    "short": NormCase(2, 3),
    "strided": NormCase(7, 96, gap=32, group_size=24),
    "wide": NormCase(2, 4096, gap=8, group_size=2048),
    "empty": NormCase(0, 64),
    "many": NormCase(300, 256, group_size=64),
}


@dataclass(frozen=True)
class MambaCase:
    """Sizes of one mixer; gap counts elements between tokens of strided inputs."""

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    width: int = 4
    gap: int = 0
    has_bias: bool = True
    dt_max: float = float("inf")

    @property
    def d_inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        return self.d_inner + 2 * self.num_groups * self.state_size


MAMBA_CASES = {
    "regular": MambaCase(4, 16, 1, 64),
    "nano": MambaCase(8, 64, 2, 128, gap=24),
    "wide_state": MambaCase(2, 80, 1, 256, width=3),
    "odd": MambaCase(3, 5, 3, 20, width=2, gap=3, has_bias=False),
    "narrow": MambaCase(6, 24, 2, 16, width=4, dt_max=0.1),
}


@dataclass(frozen=True)
class AttentionCase:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    rotary_dim: int = 0  # 0 = head_dim
    gap: int = 0


ATTENTION_CASES = {
    "regular": AttentionCase(4, 2, 64),
    "one_kv_head": AttentionCase(8, 1, 32, block_size=8, gap=16),
    "no_group": AttentionCase(3, 3, 80, block_size=32, rotary_dim=40),
    "wide": AttentionCase(6, 2, 128, block_size=16, gap=8),
    "odd": AttentionCase(5, 5, 36, block_size=5, rotary_dim=18, gap=1),
}


@dataclass(frozen=True)
class RouteCase:
    num_tokens: int
    num_experts: int
    top_k: int
    options: dict[str, object] = field(default_factory=dict)
    has_bias: bool = False
    is_tied: bool = False  # logits take a few values only, so that ties decide


ROUTE_CASES = {
    "softmax": RouteCase(9, 8, 2),
    "softmax_raw": RouteCase(9, 60, 4, {"normalise": False}),
    "sigmoid": RouteCase(7, 128, 6, {"score": "sigmoid", "scale": 2.5}, has_bias=True),
    "groups": RouteCase(11, 64, 6, {"score": "sigmoid", "num_groups": 8, "topk_group": 3}, has_bias=True),
    "one_expert_groups": RouteCase(5, 8, 2, {"num_groups": 8, "topk_group": 4}),
    "ties": RouteCase(16, 24, 5, is_tied=True),
    "all": RouteCase(3, 4, 4),
    "empty": RouteCase(0, 8, 2),
}


@dataclass(frozen=True)
class MoeCase:
    num_tokens: int
    hidden: int
    width: int
    num_experts: int
    top_k: int
    is_gated: bool
    activation: str


MOE_CASES = {
    "gated": MoeCase(9, 32, 48, 8, 2, True, "silu"),
    "relu2": MoeCase(5, 64, 40, 16, 3, False, "relu2"),
    "one_token": MoeCase(1, 32, 16, 8, 2, False, "silu"),
    "few_experts": MoeCase(70, 32, 24, 2, 2, True, "gelu"),
    "empty": MoeCase(0, 32, 16, 4, 2, True, "silu"),
}


@dataclass(frozen=True)
class ModelShape:
    """What the benchmarks need of a published model."""

    hidden: int
    mamba: MambaCase
    attention: AttentionCase
    intermediate: int
    num_experts: int = 0
    top_k: int = 0


MODEL_SHAPES = {
    "nano30b": ModelShape(2688, MambaCase(64, 64, 8, 128), AttentionCase(32, 2, 128), 1856, 128, 6),
    "nano9b": ModelShape(4480, MambaCase(128, 80, 8, 128), AttentionCase(40, 8, 128), 15680),
    "granite_tiny": ModelShape(1536, MambaCase(48, 64, 1, 128), AttentionCase(12, 4, 128), 512, 64, 6),
    "mamba2_2.7b": ModelShape(2560, MambaCase(80, 64, 1, 128), AttentionCase(20, 20, 128), 5120),
    "small": ModelShape(256, MambaCase(8, 64, 1, 64), AttentionCase(4, 2, 64), 768, 8, 2),
}
