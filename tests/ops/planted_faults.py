"""Our own kernels, called wrongly past the checks, for compute-sanitizer to find.

usage: python -m tests.ops.planted_faults {memcheck,initcheck}
"""

from __future__ import annotations

import sys

import torch

from headway import _cuda
from headway.ops.checks import dtype_code

HIDDEN = 256


def normalise(x: torch.Tensor, num_tokens: int) -> None:
    """rms_norm of num_tokens tokens, whatever x holds."""
    out, weight = torch.zeros_like(x), torch.ones(HIDDEN).to(x)
    stream = torch.cuda.current_stream().cuda_stream
    code = dtype_code("rms_norm", "x", x)
    _cuda.rms_norm(
        num_tokens,
        HIDDEN,
        x.data_ptr(),
        HIDDEN,
        0,
        1.0,
        weight.data_ptr(),
        out.data_ptr(),
        1e-5,
        code,
        stream,
    )
    torch.cuda.synchronize()


def main(tool: str) -> None:
    if tool == "memcheck":
        normalise(torch.zeros(4, HIDDEN).cuda(), num_tokens=5)
    elif tool == "initcheck":
        normalise(torch.empty(4, HIDDEN, device="cuda"), num_tokens=4)
    else:
        raise SystemExit(f"no fault is planted for {tool}")


if __name__ == "__main__":
    main(sys.argv[1])
