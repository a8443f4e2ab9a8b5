"""Which compiled module serves a tensor's device, and on which stream.

The modules take addresses, sizes and a stream; this file is the only one that knows their names.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from headway.errors import BuildError


class KernelModule(Protocol):
    """The functions `_cpu` and `_cuda` share; their stubs name every argument, a number or an address.

    Records of addresses (the mirror, the step's inputs) are tuples in the order of their fields.
    """

    def rms_norm(self, *args: float | tuple[int, ...]) -> None: ...
    def gated_rms_norm(self, *args: float | tuple[int, ...]) -> None: ...
    def causal_conv1d(self, *args: float | tuple[int, ...]) -> None: ...
    def ssm_scan(self, *args: float | tuple[int, ...]) -> None: ...
    def mamba_decode(self, *args: float | tuple[int, ...]) -> None: ...  # in _cuda only
    def fold_states(self, *args: float) -> None: ...  # in _cuda only
    def rotary(self, *args: float | tuple[int, ...]) -> None: ...
    def kv_write(self, *args: float | tuple[int, ...]) -> None: ...
    def paged_attention_workspace_bytes(self, *args: float | tuple[int, ...]) -> int: ...
    def paged_attention(self, *args: float | tuple[int, ...]) -> None: ...
    def activation(self, *args: float | tuple[int, ...]) -> None: ...
    def linear(self, *args: float | tuple[int, ...]) -> None: ...  # in _cpu only
    def skinny_linear(self, *args: float | tuple[int, ...]) -> None: ...  # in _cuda only
    def route(self, *args: float | tuple[int, ...]) -> None: ...
    def route_hidden(self, *args: float | tuple[int, ...]) -> None: ...  # in _cuda only
    def moe_experts(self, *args: float | tuple[int, ...]) -> None: ...
    def combine_experts(self, *args: float | tuple[int, ...]) -> None: ...  # in _cuda only
    def has_warpgroup_experts(self) -> bool: ...  # in _cuda only
    def begin_step(self, *args: float | tuple[int, ...]) -> None: ...
    def sample(self, *args: float | tuple[int, ...]) -> None: ...
    def sample_scan_bytes(self, num_sampled: int, vocab_size: int) -> int: ...  # in _cuda only
    def sample_scratch_bytes(self, num_sampled: int, vocab_size: int) -> int: ...  # in _cuda only
    def finish_step(self, *args: float | tuple[int, ...]) -> None: ...
    def copy_states(self, *args: int | list[tuple[int, int, int]]) -> None: ...
    def move_records(self, *args: int) -> None: ...
    def launch_graph(self, *args: int) -> None: ...  # in _cuda only


class Target(NamedTuple):
    """Where an op runs."""

    kernels: KernelModule
    stream: int  # cudaStream_t, 0 on a CPU


def target_of(tensor: Tensor) -> Target:
    """The kernels for tensor's device and torch's current stream there.

    Raises:
        BuildError: the device has no compiled module here.
    """
    if tensor.is_cpu:
        return _cpu_target()
    if tensor.is_cuda:
        return Target(_cuda_kernels(), torch._C._cuda_getCurrentRawStream(tensor.get_device()))
    raise BuildError(f"headway has no kernels for device {tensor.device}", hint="use cpu or cuda")


def set_num_threads(num_threads: int) -> None:
    """Threads a CPU kernel may use; the default is torch.get_num_threads() at first use."""
    _load("_cpu", "cpu").set_num_threads(num_threads)


@cache
def _cpu_target() -> Target:
    module = _load("_cpu", "cpu")
    module.set_num_threads(torch.get_num_threads())
    return Target(cast(KernelModule, module), 0)


@cache
def _cuda_kernels() -> KernelModule:
    return cast(KernelModule, _load("_cuda", "cuda"))


class _LoadedModule(Protocol):
    def set_num_threads(self, num_threads: int) -> None: ...


def _load(name: str, device: str) -> _LoadedModule:
    try:
        return cast(_LoadedModule, importlib.import_module(f"headway.{name}"))
    except ImportError as cause:
        raise BuildError(
            f"the compiled module headway.{name} is missing or does not load: {cause}",
            hint=f"build it with: HEADWAY_DEVICE={device} pip install --force-reinstall --no-deps .",
        ) from cause
