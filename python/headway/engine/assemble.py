"""Builds an engine from its settings: reads the configuration, budgets memory, loads weights, allocates."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from headway.config import EngineConfig, config_error
from headway.engine.bindings import core
from headway.engine.completion import Detokenizer
from headway.engine.engine import Engine
from headway.engine.graphs import row_buckets
from headway.engine.host_tier import NO_HOST_TIER, HostSizes, host_sizes, with_host_tier
from headway.engine.memory import MemoryPlan, ModelBytes, available_bytes, plan_memory
from headway.engine.prompt_cuts import prompt_cuts
from headway.engine.runner import Runner
from headway.engine.stages import with_mirror_checks, with_nvtx_ranges, with_poisoned_slots
from headway.engine.state_window import choose_window
from headway.errors import ConfigError, ModelLoadError
from headway.models.caches import ModelCaches, cache_bytes
from headway.models.config import ModelConfig
from headway.models.hybrid import HybridModel, weight_bytes
from headway.models.invariance import why_variant
from headway.models.loader import load_model
from headway.models.registry import read_model_config
from headway.ops.backend import target_of
from headway.ops.state_log import IN_PLACE, StateWindow
from headway.request import SamplingParams
from headway.sampling.defaults import GenerationDefaults, read_generation_defaults
from headway.sampling.grammar import GrammarCompiler
from headway.sampling.grammar_trial import GrammarTrial
from headway.sampling.limits import RequestLimits
from headway.text import ChatTemplate, IncrementalDetokenizer, Tokenizer

logger = logging.getLogger("headway")
DEFAULT_LAUNCH_DEPTH = {"cpu": 0, "cuda": 1}  # on a CPU running ahead takes the cores that kernels need
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SCORED_TOKENS = 512  # prompt tokens of a step whose log-probabilities are reported
Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Assembly:
    """An engine and what stands beside it."""

    engine: Engine
    model_config: ModelConfig
    memory: MemoryPlan
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    defaults: GenerationDefaults
    device: torch.device
    dtype: torch.dtype
    launch_depth: int


def embedded_model() -> Path:
    """The checkpoint that is installed with the package."""
    return Path(__file__).resolve().parents[1] / "assets" / "tiny"


def assemble(config: EngineConfig, progress: Progress | None = None) -> Assembly:
    """Raises ModelLoadError, MemoryBudgetError, ConfigError or BuildError; allocates only what is known to fit."""
    path = Path(config.model) if config.model is not None else embedded_model()
    device = resolve_device(config.device)
    target_of(torch.empty(0, device=device))  # no kernels for it: say so before anything is read
    model_config = read_model_config(path)
    dtype = resolve_dtype(config.dtype, device, model_config)
    folder = path if path.is_dir() else path.parent
    refuse_variance(config, model_config, device, dtype)
    defaults = read_generation_defaults(folder, is_applied=config.generation_config == "auto")
    tokenizer = load_tokenizer(config, folder)
    window = choose_window(config, model_config, device.type, dtype, launch_depth(config, device.type))
    ssm_dtype = _DTYPES[config.mamba_ssm_cache_dtype]
    sizes = model_bytes(model_config, config.block_size, dtype, window, ssm_dtype)
    memory = plan_memory(config, sizes, device.type, available_bytes(config, device))
    logger.info("memory plan\n%s", memory)
    model = load_weights(config, path, device, dtype, memory, progress)
    ledger_config = ledger_settings(
        config, memory, model_config, device.type, dtype, window, host_sizes(config, memory, sizes)
    )
    blocks, slots = memory.num_blocks + 1, ledger_config.num_slots + 1
    caches = ModelCaches.allocate(
        model_config, blocks, memory.block_size, slots, dtype, device, window, ssm_dtype
    )
    log_prefix_cache(config, ledger_config, sizes.per_slot)
    runner = make_runner(config, model, caches, ledger_config, device)
    limits = request_limits(config, memory, model_config, defaults, tokenizer)
    engine = make_engine(config, runner, ledger_config, limits, tokenizer)
    return Assembly(
        engine=engine,
        model_config=model_config,
        memory=memory,
        tokenizer=tokenizer,
        chat_template=load_template(folder),
        defaults=defaults,
        device=device,
        dtype=dtype,
        launch_depth=ledger_config.max_launch_depth,
    )


def log_prefix_cache(config: EngineConfig, ledger_config: core.LedgerConfig, state_bytes: int) -> None:
    if ledger_config.use_prefix_cache:
        logger.info("prefixes of %d tokens and more are cached", ledger_config.prefix_unit_tokens)
        if config.prefix_host_memory_bytes:
            num_blocks, num_states = ledger_config.num_host_blocks, ledger_config.num_host_slots
            logger.info("host memory holds %d blocks and %d states of prefixes", num_blocks, num_states)
    elif config.enable_prefix_caching:
        logger.warning(
            "no prefix is cached: not one state of %d bytes fits snapshot_memory_bytes", state_bytes
        )


def load_weights(
    config: EngineConfig,
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    memory: MemoryPlan,
    progress: Progress | None,
) -> HybridModel:
    return load_model(
        path,
        dtype=dtype,
        device=device,
        load_format=config.load_format,
        progress=progress,
        max_position=memory.max_model_len,
        seed=config.seed,
        is_batch_invariant=config.batch_invariant,
    ).model


def refuse_variance(
    config: EngineConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """Raises ConfigError where batch invariance is asked for and cannot be had."""
    if config.batch_invariant and (lack := why_variant(model, device.type, dtype)):
        raise config_error("batch_invariant", True, f"False: there is no invariant kernel for {lack}")


def make_engine(
    config: EngineConfig,
    runner: Runner,
    ledger_config: core.LedgerConfig,
    limits: RequestLimits,
    tokenizer: Tokenizer | None,
) -> Engine:
    staging = runner.staging
    engine = Engine(
        core.Ledger(ledger_config, staging.packet_ring_address, staging.result_ring_address),
        runner,
        limits,
        seed=config.seed,
        make_detokenizer=_detokenizer_factory(tokenizer),
        decode_token=_token_decoder(tokenizer),
        grammars=_grammar_compiler(tokenizer, limits),
        encode=None if tokenizer is None else partial(tokenizer.encode, add_special_tokens=False),
        has_processed_logprobs=config.logprobs_mode == "processed",
    )
    if config.check_mirror:
        engine.stages = with_mirror_checks(engine.stages, engine.ledger, runner.read_mirror)
        engine.stages = with_poisoned_slots(engine.stages, engine.ledger, runner.poison_slots)
    if runner.host_tier is not None:
        # Free slots are poisoned in the steps' order: in that debug mode copies wait until it is done.
        settle = runner.staging.synchronize if config.check_mirror else None
        engine.stages = with_host_tier(engine.stages, engine.ledger, runner.host_tier, settle)
    if config.nvtx and runner.has_gpu:
        engine.stages = with_nvtx_ranges(engine.stages)
    return engine


def make_runner(
    config: EngineConfig,
    model: HybridModel,
    caches: ModelCaches,
    ledger_config: core.LedgerConfig,
    device: torch.device,
) -> Runner:
    """A runner that is warm: on a GPU its decode graphs are captured before the first request."""
    is_cuda = device.type == "cuda"
    runner = Runner(
        model,
        caches,
        ledger_config,
        device,
        row_buckets=row_buckets(ledger_config.max_rows) if is_cuda else (),
        has_graphs=is_cuda and not config.enforce_eager,
    )
    runner.prepare(config.graph_capture_s)
    return runner


def resolve_device(name: str) -> torch.device:
    has_gpu, has_kernels = torch.cuda.is_available(), importlib.util.find_spec("headway._cuda") is not None
    if name == "cuda" and not has_gpu:
        raise ConfigError(
            "device (--device) is cuda, but torch sees no GPU", hint="--device cpu runs without one"
        )
    if name == "auto" and has_gpu and not has_kernels:
        logger.warning("a GPU is present but headway was built without CUDA kernels: running on the CPU")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and has_gpu and has_kernels) else "cpu")


def resolve_dtype(name: str, device: torch.device, model: ModelConfig) -> torch.dtype:
    """auto: what the checkpoint was saved in, but float32 on a CPU, where it is exact and no slower."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else model.dtype
    if name == "float16" and device.type == "cpu":
        raise ConfigError("dtype (--dtype) float16 has no CPU kernels", hint="--dtype float32 or bfloat16")
    return _DTYPES[name]


def load_tokenizer(config: EngineConfig, folder: Path) -> Tokenizer | None:
    """The one asked for, else the checkpoint's; a dummy model without one borrows the embedded model's."""
    if config.tokenizer is not None:
        return Tokenizer.from_dir(config.tokenizer)
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_dir(folder)
    if config.load_format == "dummy" and (embedded_model() / "tokenizer.json").is_file():
        logger.warning(
            "%s has no tokenizer.json: the embedded model's is used, its text means nothing", folder
        )
        return Tokenizer.from_dir(embedded_model())
    logger.warning("%s has no tokenizer.json: prompts must be token ids and outputs have no text", folder)
    return None


def load_template(folder: Path) -> ChatTemplate | None:
    """The checkpoint's. A broken one costs chat alone, and is said aloud."""
    try:
        return ChatTemplate.find(folder)
    except ModelLoadError as error:
        logger.error("chat is off: %s", error)
        return None


def model_bytes(
    model: ModelConfig,
    block_size: int,
    dtype: torch.dtype,
    window: StateWindow = IN_PLACE,
    ssm_dtype: torch.dtype = torch.float32,
) -> ModelBytes:
    caches = cache_bytes(model, block_size, dtype, window, ssm_dtype)
    return ModelBytes(
        weights=weight_bytes(model, dtype),
        per_block=caches.per_block,
        per_slot=caches.per_slot,
        per_step_token=_activation_columns(model) * dtype.itemsize,
        per_sampled_row=3 * 4 * model.vocab_size,
        max_position=model.max_position,
    )


def _activation_columns(model: ModelConfig) -> int:
    """Columns alive for one token at the widest layer of each kind, and the residual stream beside them."""
    columns = 4 * model.hidden_size
    if model.mamba:
        columns += model.mamba.in_proj_dim + model.mamba.conv_dim + 2 * model.mamba.d_inner
    if model.attention:
        heads = 2 * (model.attention.num_heads + model.attention.num_kv_heads)
        columns += heads * model.attention.head_dim
    if model.mlp:
        columns += 3 * model.mlp.intermediate_size
    if model.moe:
        expert = model.moe.top_k * (3 * model.moe.intermediate_size + 2 * model.hidden_size)
        columns += expert + 3 * model.moe.shared_intermediate_size
    return columns


def launch_depth(config: EngineConfig, device_type: str) -> int:
    return DEFAULT_LAUNCH_DEPTH[device_type] if config.launch_depth is None else config.launch_depth


def ledger_settings(
    config: EngineConfig,
    memory: MemoryPlan,
    model: ModelConfig,
    device_type: str,
    dtype: torch.dtype,
    window: StateWindow = IN_PLACE,
    host: HostSizes = NO_HOST_TIER,
) -> core.LedgerConfig:
    cuts = prompt_cuts(model, device_type, dtype)
    if memory.max_step_tokens < cuts.min_step_tokens:
        limit = (
            f"at least {cuts.min_step_tokens}: the kernels on this device take no shorter pieces of a prompt"
        )
        raise config_error("max_num_batched_tokens", memory.max_step_tokens, limit)
    is_exact = config.batch_invariant and config.enable_prefix_caching
    # With Mamba layers a prefix ends where a state is, and states are kept on the grid; else at any block's end.
    if is_exact and not model.mamba and memory.block_size % cuts.grid_tokens:
        limit = f"a multiple of {cuts.grid_tokens}, where cached prefixes may end with batch_invariant"
        raise config_error("block_size", memory.block_size, limit)
    return core.LedgerConfig(
        max_rows=memory.max_rows,
        num_blocks=memory.num_blocks,
        block_size=memory.block_size,
        num_slots=memory.num_slots + memory.num_snapshots,
        max_model_len=memory.max_model_len,
        max_step_tokens=memory.max_step_tokens,
        vocab_size=model.vocab_size,
        max_logprobs=config.max_logprobs,
        max_launch_depth=launch_depth(config, device_type),
        prompt_grid_tokens=cuts.grid_tokens,
        min_last_chunk_tokens=cuts.min_last_tokens,
        max_scored_tokens=max(cuts.min_step_tokens, min(MAX_SCORED_TOKENS, memory.max_step_tokens)),
        # Keys and values alone, without a state to go on from, are of no use.
        use_prefix_cache=config.enable_prefix_caching and (not model.mamba or memory.num_snapshots > 0),
        max_snapshots=memory.num_snapshots,
        max_waypoints=_num_waypoints(config, memory.num_snapshots),
        snapshot_stride_tokens=config.snapshot_stride_tokens,
        decode_snapshot_stride_tokens=config.decode_snapshot_stride_tokens,
        weighs_snapshot_cost=config.snapshot_eviction == "cost",
        caches_outputs=not config.batch_invariant,
        state_window=window.num_tokens,
        max_rewind=window.max_rewind,
        num_host_blocks=host.num_blocks,
        num_host_slots=host.num_slots,
    )


def _num_waypoints(config: EngineConfig, num_snapshots: int) -> int:
    """Of the snapshots; none where nothing is kept at a stride, so that all are there for the others."""
    has_stride = config.snapshot_stride_tokens > 0 or config.decode_snapshot_stride_tokens > 0
    return int(config.waypoint_share * num_snapshots) if has_stride else 0


def request_limits(
    config: EngineConfig,
    memory: MemoryPlan,
    model: ModelConfig,
    defaults: GenerationDefaults,
    tokenizer: Tokenizer | None,
) -> RequestLimits:
    ends = {*model.eos_token_ids, *defaults.eos_token_ids}
    if not ends and tokenizer is not None and tokenizer.eos_token_id is not None:
        ends = {tokenizer.eos_token_id}
    return RequestLimits(
        vocab_size=model.vocab_size,
        max_model_len=memory.max_model_len,
        max_logprobs=config.max_logprobs,
        max_stop_ids=core.MAX_STOP_IDS,
        max_logit_bias=core.MAX_LOGIT_BIAS,
        max_bad_word_entries=core.MAX_BAD_WORD_ENTRIES,
        eos_token_ids=tuple(sorted(token for token in ends if token < model.vocab_size)),
    )


def _detokenizer_factory(
    tokenizer: Tokenizer | None,
) -> Callable[[Sequence[int], SamplingParams], Detokenizer] | None:
    if tokenizer is None:
        return None
    return lambda prompt_ids, params: IncrementalDetokenizer(
        tokenizer,
        prompt_ids,
        params.skip_special_tokens,
        spaces_between_special_tokens=params.spaces_between_special_tokens,
    )


def _grammar_compiler(tokenizer: Tokenizer | None, limits: RequestLimits) -> GrammarCompiler | None:
    if tokenizer is None or not limits.eos_token_ids:
        return None
    vocabulary = tokenizer.to_json(), limits.vocab_size, limits.eos_token_ids
    return GrammarCompiler(*vocabulary, GrammarTrial(*vocabulary))


def _token_decoder(tokenizer: Tokenizer | None) -> Callable[[int], str] | None:
    if tokenizer is None:
        return None
    cache: dict[int, str] = {}

    def decode(token: int) -> str:
        text = cache.get(token)
        if text is None:
            text = cache[token] = tokenizer.decode([token], skip_special_tokens=False)
        return text

    return decode
