"""Records and names the ops share."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

ActivationKind = Literal["silu", "relu2", "gelu"]
ScoreKind = Literal["softmax", "sigmoid"]

# Enumerators of csrc/params/*.h.
DTYPE_CODES: Final[dict[torch.dtype, int]] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATION_CODES: Final[dict[ActivationKind, int]] = {"silu": 0, "relu2": 1, "gelu": 2}
SCORE_CODES: Final[dict[ScoreKind, int]] = {"softmax": 0, "sigmoid": 1}


class Snapshots(NamedTuple):
    """States to keep beside the rows' own. Those of row r are entries starts[r] up to starts[r + 1]. int32."""

    starts: Tensor  # [R + 1]
    positions: Tensor  # [n] absolute, in (row_start, row_start + tokens], ascending within a row
    slots: Tensor  # [n] none of them read or written otherwise in the same call


class Routing(NamedTuple):
    """Which experts serve each token, best first."""

    weights: Tensor  # [T, K] float32
    expert_ids: Tensor  # [T, K] int32
