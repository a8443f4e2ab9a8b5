"""Kernels on the CPU: those of `_kernels`, and these alone."""

from headway._kernels import *  # noqa: F403 - a stub hands on what it imports so

def linear(
    num_tokens: int,
    num_inputs: int,
    num_outputs: int,
    x: int,
    x_stride: int,
    weight: int,
    bias: int,
    out: int,
    out_stride: int,
    is_added: bool,
    stream: int,
    /,
) -> None: ...
def set_num_threads(count: int, /) -> None: ...
def simd_levels() -> list[str]:
    """SIMD levels this build has and this processor runs, best first; the first is in use at load."""

def set_simd_level(name: str, /) -> None: ...
