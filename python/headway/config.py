"""The engine's settings, declared once: Python keywords, flags, their checks and docs/settings.md come from here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

from headway.errors import ConfigError
from headway.fields import flag, nearest, refuse_values, setting, specs

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine. None means "chosen for this model and machine", as the field's help says.

    Raises ConfigError naming the setting, its value and its limit; unknown keywords name the nearest known one.
    """

    model: str | None = setting(None, kind="str", help="checkpoint folder; unset: the embedded model")
    tokenizer: str | None = setting(
        None, kind="str", help="folder of tokenizer.json; unset: the checkpoint's"
    )
    device: str = setting(
        "auto",
        kind="str",
        choices=("auto", "cpu", "cuda"),
        help="where to run; auto: a GPU when there is one",
    )
    dtype: str = setting(
        "auto",
        kind="str",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of weights and KV; auto: the checkpoint's on a GPU, float32 on a CPU",
    )
    mamba_ssm_cache_dtype: str = setting(
        "float32",
        kind="str",
        choices=("float32", "float16"),
        tier="advanced",
        help="of the Mamba states that are kept between steps; float16 takes half the memory and is rounded at random, "
        "by position, so that the mean is kept; prompts then take several times as long to scan on a GPU",
    )
    load_format: str = setting(
        "auto",
        kind="str",
        choices=("auto", "safetensors", "dummy"),
        help="dummy: random weights, needs config.json alone",
    )
    max_model_len: int | None = setting(
        None,
        kind="tokens",
        low=2,
        high=2**24,
        unit="tokens",
        help="prompt and output of one request; unset: the model's limit, less where memory is short",
    )
    max_num_seqs: int | None = setting(
        None,
        kind="int",
        low=1,
        high=65536,
        unit="requests",
        help="running at once; unset: 256 on a GPU, 64 on a CPU",
    )
    max_num_batched_tokens: int | None = setting(
        None,
        kind="tokens",
        low=1,
        high=2**20,
        unit="tokens",
        help="computed in one step; unset: 8192 on a GPU, 2048 on a CPU",
    )
    gpu_memory_utilization: float = setting(
        0.9,
        kind="float",
        low=0,
        high=1,
        is_low_open=True,
        help="share of the GPU's memory this engine may fill",
    )
    cpu_memory_bytes: int | None = setting(
        None,
        kind="bytes",
        low=1,
        unit="bytes",
        help="for weights and caches on a CPU; unset: 70 % of what is free",
    )
    kv_cache_memory_bytes: int | None = setting(
        None,
        kind="bytes",
        low=1,
        unit="bytes",
        tier="advanced",
        help="for KV blocks and state slots; unset: what the weights leave, at most 4 GiB on a CPU",
    )
    block_size: int = setting(
        16, kind="tokens", low=1, high=1024, unit="tokens", tier="advanced", help="of a KV block"
    )
    num_state_slots: int | None = setting(
        None,
        kind="int",
        low=1,
        tier="advanced",
        unit="slots",
        help="Mamba states kept at once; unset: max_num_seqs",
    )
    enable_prefix_caching: bool = setting(
        True,
        kind="bool",
        help="what requests begin with alike is computed once; on a GPU its last bits may differ",
    )
    snapshot_memory_bytes: int | None = setting(
        None,
        kind="bytes",
        low=0,
        unit="bytes",
        tier="advanced",
        gb_name="mamba_cache_gb",
        help="for the Mamba states that cached prefixes end with (--mamba-cache-gb says it in 10**9 bytes); unset: a "
        "third of the memory for caches, or what KV of all requests at full length leaves",
    )
    snapshot_stride_tokens: int = setting(
        512,
        kind="tokens",
        low=0,
        high=2**24,
        unit="tokens",
        tier="advanced",
        help="also keep a prompt's state at each multiple of it, and closer near its ends; 0: at its end and where "
        "prompts part alone",
    )
    decode_snapshot_stride_tokens: int = setting(
        0,
        kind="tokens",
        low=0,
        high=2**24,
        unit="tokens",
        tier="advanced",
        help="also keep the state of what is generated at each multiple of it; 0: at its end alone",
    )
    waypoint_share: float = setting(
        0.5,
        kind="float",
        low=0,
        high=1,
        tier="advanced",
        help="of the memory for cached states, what those at strides may fill; they push out no others",
    )
    snapshot_eviction: str = setting(
        "lru",
        kind="str",
        choices=("lru", "cost"),
        tier="advanced",
        help="which state goes first: the one unused longest, or of the oldest the one that spares least",
    )
    prefix_host_memory_bytes: int = setting(
        0,
        kind="bytes",
        low=0,
        unit="bytes",
        tier="advanced",
        help="host memory, pinned for a GPU, that cached prefixes move to before they are evicted; they come back when "
        "a request begins with one; 0: none",
    )
    state_window: int | None = setting(
        None,
        kind="tokens",
        low=0,
        high=16,
        tier="advanced",
        unit="tokens",
        help="0 or 16: a decoding request's Mamba state is rewritten once in so many tokens, its inputs are logged "
        "meanwhile; 0: at every token; unset: 16 on a GPU that has the kernel for the model, 0 elsewhere",
    )
    max_rewind_tokens: int | None = setting(
        None,
        kind="tokens",
        low=1,
        high=16,
        tier="advanced",
        unit="tokens",
        help="outputs that a request can take back without computing its state anew, with a state window; unset: "
        "launch_depth, at least 1",
    )
    batch_invariant: bool = setting(
        False,
        kind="bool",
        tier="advanced",
        help="a request's tokens and logprobs do not depend on the requests beside it: long prompts take several times "
        "as long, and the prefix cache keeps prompts alone",
    )
    seed: int = setting(
        0, kind="int", low=0, high=2**63 - 1, help="of the requests that bring none, and of dummy weights"
    )
    launch_depth: int | None = setting(
        None,
        kind="int",
        low=0,
        high=8,
        tier="advanced",
        unit="steps",
        help="launched beyond the one being waited for; unset: 1 on a GPU, 0 on a CPU",
    )
    enforce_eager: bool = setting(
        False, kind="bool", tier="advanced", help="launch a step kernel by kernel, not as a CUDA graph"
    )
    graph_capture_s: float = setting(
        4.0,
        kind="float",
        low=0,
        tier="advanced",
        unit="seconds",
        help="spent at start-up on CUDA graphs, smallest batches first; the others follow when first needed",
    )
    max_logprobs: int = setting(
        20, kind="int", low=0, high=1024, tier="advanced", help="the largest logprobs a request may ask for"
    )
    check_mirror: bool = setting(
        False,
        kind="bool",
        tier="advanced",
        help="compare the device's rows with the host's after every step, waiting for the device, and fill free state "
        "slots with NaN: to hunt bugs",
    )
    logprobs_mode: str = setting(
        "raw",
        kind="str",
        choices=("raw", "processed"),
        tier="advanced",
        help="logprobs of sampled tokens are of the model's logits, or of those after bias, masks, penalties and "
        "temperature",
    )
    nvtx: bool = setting(
        False, kind="bool", tier="advanced", help="NVTX ranges around the stages of a step; nothing on a CPU"
    )
    generation_config: str = setting(
        "auto",
        kind="str",
        choices=("auto", "none"),
        help="auto: generation_config.json of the checkpoint sets the sampling defaults",
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        known = {f.name for f in fields(cls)}
        for name in kwargs:
            if name not in known:
                in_bytes = {spec.gb_name: f"{ours} says it, in bytes" for ours, spec in specs(cls).items()}
                raise ConfigError(f"{name} is not a setting", hint=in_bytes.get(name) or nearest(name, known))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        refuse_values(self, config_error)
        if self.state_window not in (None, 0, 16):
            raise config_error("state_window", self.state_window, "0 or 16")
        tokens, seqs = self.max_num_batched_tokens, self.max_num_seqs
        if tokens is not None and seqs is not None and tokens < seqs:
            raise config_error("max_num_batched_tokens", tokens, f"at least max_num_seqs ({seqs})")


def config_error(name: str, value: object, limit: str) -> ConfigError:
    return ConfigError(f"{name} ({flag(name)}) must be {limit}, got {value!r}")


def render_settings() -> str:
    """docs/settings.md."""
    lines = [
        "# Engine settings",
        "",
        "Each is a keyword of `headway.LLM(...)` and a flag of every command that runs a model. This page is rendered",
        "from `headway.config.EngineConfig` (`python -m headway.config > docs/settings.md`).",
        "",
        "| setting | flag | default | accepts | tier | meaning |",
        "|---|---|---|---|---|---|",
    ]
    defaults = {f.name: f.default for f in fields(EngineConfig)}
    for name, spec in specs(EngineConfig).items():
        default = "unset" if defaults[name] is None else f"`{defaults[name]}`"
        lines.append(f"| `{name}` | `{flag(name)}` | {default} | {spec.limit} | {spec.tier} | {spec.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render_settings(), end="")
