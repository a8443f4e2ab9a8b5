"""The memory a model keeps between steps: convolution and SSM state by slot, keys and values by block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from headway.models.config import MambaConfig, ModelConfig
from headway.ops.state_log import IN_PLACE, StateLog, StateWindow

_MAX_DECODE_TOKENS = 1  # that a row brings to a step over its log


@dataclass(frozen=True)
class CacheBytes:
    """Memory of one KV block and of one state slot, over all layers."""

    per_block: int
    per_slot: int


def cache_bytes(
    config: ModelConfig,
    block_size: int,
    dtype: torch.dtype,
    window: StateWindow = IN_PLACE,
    ssm_dtype: torch.dtype = torch.float32,
) -> CacheBytes:
    """What a block of block_size tokens and a slot take; 0 where the model has no such layer."""
    per_block = per_slot = 0
    if config.attention is not None:
        kv_elements = 2 * block_size * config.attention.num_kv_heads * config.attention.head_dim
        per_block = config.count("attention") * kv_elements * dtype.itemsize
    if config.mamba is not None:
        mamba = config.mamba
        conv_bytes = (mamba.conv_width - 1) * mamba.conv_dim * dtype.itemsize
        ssm_bytes = mamba.d_inner * mamba.state_size * ssm_dtype.itemsize
        log_bytes = 0 if window.num_tokens == 0 else _log(mamba, 1, window, dtype, "meta").num_bytes
        per_slot = config.count("mamba") * (conv_bytes + ssm_bytes + log_bytes)
    return CacheBytes(per_block, per_slot)


def _log(
    mamba: MambaConfig, num_slots: int, window: StateWindow, dtype: torch.dtype, device: torch.device | str
) -> StateLog:
    return StateLog.allocate(
        num_slots,
        d_inner=mamba.d_inner,
        group_states=mamba.num_groups * mamba.state_size,
        num_heads=mamba.num_heads,
        width=mamba.conv_width,
        window=window,
        max_query_len=_MAX_DECODE_TOKENS,
        dtype=dtype,
        device=device,
    )


@dataclass(frozen=True)
class ModelCaches:
    """One tensor a layer; lists count Mamba layers and attention layers each from 0.

    Index 0 of slots and blocks is the dummy: padding reads and writes it and nothing else.
    """

    state_pools: tuple[
        torch.Tensor, ...
    ]  # the two below in one piece each: [Lm, ...]; empty without Mamba layers
    conv_state: tuple[torch.Tensor, ...]  # [num_slots, W - 1, conv_dim], model dtype, oldest raw column first
    ssm_state: tuple[torch.Tensor, ...]  # [num_slots, H, P, N] float32 or float16
    keys: tuple[torch.Tensor, ...]  # [num_blocks, S, Hkv, D], model dtype
    values: tuple[torch.Tensor, ...]  # [num_blocks, S, Hkv, D], model dtype
    state_log: tuple[StateLog, ...] = ()  # empty where states are kept in place

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device | str,
        window: StateWindow = IN_PLACE,
        ssm_dtype: torch.dtype = torch.float32,
    ) -> ModelCaches:
        """Zeroed caches. num_blocks and num_slots count the dummy; they are ignored where no layer uses them."""

        def layers(kind_count: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
            return tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(kind_count))

        pools: tuple[torch.Tensor, ...] = ()
        keys: tuple[torch.Tensor, ...] = ()
        values: tuple[torch.Tensor, ...] = ()
        logs: tuple[StateLog, ...] = ()
        if config.mamba is not None:
            mamba, num_layers = config.mamba, config.count("mamba")
            conv_shape = (num_layers, num_slots, mamba.conv_width - 1, mamba.conv_dim)
            ssm_shape = (num_layers, num_slots, mamba.num_heads, mamba.head_dim, mamba.state_size)
            pools = (
                torch.zeros(conv_shape, dtype=dtype, device=device),
                torch.zeros(ssm_shape, dtype=ssm_dtype, device=device),
            )
            if window.num_tokens:
                logs = tuple(_log(mamba, num_slots, window, dtype, device) for _ in range(num_layers))
        if config.attention is not None:
            num_layers = config.count("attention")
            shape = (num_blocks, block_size, config.attention.num_kv_heads, config.attention.head_dim)
            keys, values = layers(num_layers, shape, dtype), layers(num_layers, shape, dtype)
        conv, ssm = (pool.unbind() for pool in pools) if pools else ((), ())
        return cls(pools, conv, ssm, keys, values, logs)

    @property
    def state_window(self) -> StateWindow:
        return self.state_log[0].window if self.state_log else IN_PLACE

    @property
    def num_bytes(self) -> int:
        tensors = (*self.state_pools, *self.keys, *self.values)
        num_bytes = sum(math.prod(tensor.shape) * tensor.itemsize for tensor in tensors)
        return num_bytes + sum(log.num_bytes for log in self.state_log)
