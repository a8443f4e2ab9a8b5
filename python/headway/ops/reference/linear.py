"""Matrix products over packed weights."""

from __future__ import annotations

from torch import Tensor

from headway.ops.linear import PackedMatrix


def linear_ref(
    x: Tensor,
    matrix: PackedMatrix,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    is_added: bool = False,
) -> Tensor:
    weight = matrix.panels.transpose(1, 2).reshape(-1, matrix.num_inputs)[: matrix.num_outputs]  # [out, in]
    result = x @ weight.to(x.dtype).t()
    if bias is not None:
        result = result + bias
    if out is None:
        return result
    return out.add_(result) if is_added else out.copy_(result)
