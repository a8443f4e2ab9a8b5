"""Kernels on CUDA devices: those of `_kernels`, and these alone."""

from headway._kernels import *  # noqa: F403 - a stub hands on what it imports so

def route_hidden(
    num_tokens: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    num_groups: int,
    topk_group: int,
    score: int,
    normalise: bool,
    scale: float,
    x: int,
    x_stride: int,
    weight: int,
    logits: int,
    num_done: int,
    bias: int,
    weights: int,
    expert_ids: int,
    dtype: int,
    stream: int,
    /,
) -> None: ...
def combine_experts(
    num_tokens: int,
    hidden: int,
    top_k: int,
    results: int,
    places: int,
    weights: int,
    out: int,
    dtype: int,
    stream: int,
    /,
) -> None: ...
def has_warpgroup_experts() -> bool: ...
def skinny_linear(
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
    dtype: int,
    stream: int,
    /,
) -> None: ...
def mamba_decode(
    num_rows: int,
    query_start: int,
    row_start: int,
    num_tokens: int,
    max_query_len: int,
    num_heads: int,
    head_dim: int,
    num_groups: int,
    state_size: int,
    width: int,
    z: int,
    columns: int,
    dt: int,
    token_stride: int,
    conv_weight: int,
    conv_bias: int,
    a: int,
    d: int,
    dt_bias: int,
    dt_min: float,
    dt_max: float,
    norm_weight: int,
    norm_eps: float,
    norm_group_size: int,
    conv_state: int,
    conv_state_stride: int,
    ssm_state: int,
    ssm_state_stride: int,
    state_dtype: int,
    slots: int,
    state_base: int,
    log_columns: int,
    log_columns_stride: int,
    log_dt: int,
    log_dt_stride: int,
    log_raw: int,
    log_raw_stride: int,
    num_entries: int,
    num_raw: int,
    window: int,
    max_rewind: int,
    convolved: int,
    table: int,
    scanned: int,
    out: int,
    dtype: int,
    stream: int,
    /,
) -> None: ...
def fold_states(
    num_copies: int,
    copies: int,
    state_base: int,
    num_heads: int,
    head_dim: int,
    num_groups: int,
    state_size: int,
    a: int,
    dt_bias: int,
    dt_min: float,
    dt_max: float,
    conv_state: int,
    conv_state_stride: int,
    ssm_state: int,
    ssm_state_stride: int,
    state_dtype: int,
    log_columns: int,
    log_columns_stride: int,
    log_dt: int,
    log_dt_stride: int,
    log_raw: int,
    log_raw_stride: int,
    num_entries: int,
    num_raw: int,
    window: int,
    max_rewind: int,
    dtype: int,
    stream: int,
    /,
) -> None: ...
def sample_scan_bytes(num_sampled: int, vocab_size: int, /) -> int: ...
def sample_scratch_bytes(num_sampled: int, vocab_size: int, /) -> int: ...
def device_count() -> int:
    """Usable devices; 0 without a driver."""

def driver_version() -> int:
    """CUDA version the driver supports, such as 13000; 0 without a driver."""

def pinned_alloc(num_bytes: int, /) -> int:
    """Address of zeroed page-locked host memory that every device reads and writes."""

def pinned_free(address: int, /) -> None: ...
def launch_graph(graph: int, stream: int, device_idx: int, inbox: int, news: int, news_bytes: int, /) -> None:
    """Puts an instantiated graph (cudaGraphExec_t) on a stream behind a copy of pinned memory, if any."""
