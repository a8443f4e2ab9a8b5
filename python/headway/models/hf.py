"""Reads a checkpoint's `config.json` by name and type, and refuses by name what Headway does not compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from headway.errors import ModelLoadError
from headway.models.config import RopeConfig

Activation = Literal["silu", "relu2", "gelu"]
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "relu2": "relu2", "gelu": "gelu"}

# Scaling kinds of rotary embedding and the constants each cannot do without.
MAX_COUNT = 4096
_ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
# As transformers 5 writes them: {"__float__": "Infinity"}.
_NAMED_NUMBERS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_ROPE_DIVISORS = ("short_factor", "long_factor")
_ROPE_CONSTANTS = (
    *("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"),
    *("mscale", "mscale_all_dim", "original_max_position_embeddings", "max_position_embeddings"),
)


class HfConfig:
    """Typed access to the dictionary of a `config.json`. Every failure names key, value and what is accepted."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self.values = values

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, *keys: str) -> object:
        """The first of the keys that is there and not null, else None."""
        return next((self.values[key] for key in keys if self.has(key)), None)

    def integer(self, *keys: str, default: int | None = None) -> int:
        """A non-negative integer under the first key present; later keys are its older names."""
        value = self._value(keys, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise _wrong(keys[0], value, "a non-negative integer")
        if value >= 2**63:
            raise _wrong(keys[0], str(value)[:40], "below 2**63")
        return value

    def count(self, *keys: str, default: int | None = None) -> int:
        """How many layers or experts: a loader looks at each of them."""
        value = self.integer(*keys, default=default)
        if value > MAX_COUNT:
            raise _wrong(keys[0], value, f"at most {MAX_COUNT}")
        return value

    def size(self, *keys: str, default: int | None = None) -> int:
        """An integer of at least 1: what other sizes are divided by."""
        value = self.integer(*keys, default=default)
        if value < 1:
            raise _wrong(keys[0], value, "at least 1")
        return value

    def number(self, *keys: str, default: float | None = None) -> float:
        return _as_number(keys[0], self._value(keys, default))

    def flag(self, *keys: str, default: bool) -> bool:
        value = self._value(keys, default)
        if not isinstance(value, bool):
            raise _wrong(keys[0], value, "true or false")
        return value

    def text(self, *keys: str, default: str | None = None) -> str:
        value = self._value(keys, default)
        if not isinstance(value, str):
            raise _wrong(keys[0], value, "a string")
        return value

    def activation(self, key: str, default: Activation = "silu") -> Activation:
        name = self.text(key, default=default)
        if name not in _ACTIVATIONS:
            raise _wrong(key, name, "one of " + ", ".join(_ACTIVATIONS))
        return _ACTIVATIONS[name]

    def id_list(self, key: str) -> tuple[int, ...]:
        """Token ids given as null, one id or a list."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in ids):
            raise _wrong(key, value, "a token id or a list of them")
        return tuple(ids)

    def limits(self, key: str) -> tuple[float, float]:
        """A [low, high] pair, infinity in any of the spellings found in checkpoints; (0, inf) when absent."""
        value = self.values.get(key)
        if value is None:
            return 0.0, math.inf
        if not isinstance(value, list) or len(value) != 2:
            raise _wrong(key, value, "a [low, high] pair")
        return _as_number(key, value[0]), _as_number(key, value[1])

    def accept_only(self, key: str, *accepted: object, why: str = "") -> None:
        """Refuses the checkpoint when the key is present and its value is none of `accepted` (null always is)."""
        value = self.values.get(key)
        if value is not None and value not in accepted:
            allowed = ", ".join(repr(item) for item in accepted) or "null"
            raise _wrong(key, value, allowed, why)

    def refuse_sliding_window(self, *, max_position: int) -> None:
        """Refuses attention that forgets; a window no sequence outgrows is none."""
        window = self.get("sliding_window")
        is_used = self.flag("use_sliding_window", default=True) and window is not None
        if is_used and self.integer("sliding_window") < max_position:
            raise _wrong("sliding_window", window, "null", "sliding-window attention is not supported")

    def rope(
        self, head_dim: int, *, default_theta: float = 10000.0, default_fraction: float = 1.0
    ) -> RopeConfig:
        """Rotary settings from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
        scaling = dict(self._rope_parameters())
        kind = scaling.setdefault("rope_type", scaling.pop("type", None) or "default")
        if kind == "su":  # the first name of longrope
            kind = scaling["rope_type"] = "longrope"
        if not isinstance(kind, str) or kind not in _ROPE_KINDS:
            raise _wrong("rope_type", kind, "one of " + ", ".join(_ROPE_KINDS))
        if kind != "default":
            self._complete_scaling(scaling, kind)
        theta = scaling.pop("rope_theta", None) or self.number("rope_theta", default=default_theta)
        fraction = scaling.pop("partial_rotary_factor", None) or self.number(
            "partial_rotary_factor", default=default_fraction
        )
        rotary_dim = int(head_dim * _as_number("partial_rotary_factor", fraction))
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise _wrong("partial_rotary_factor", fraction, f"an even number of channels of {head_dim}")
        _check_scaling(scaling, rotary_dim)
        return RopeConfig(_positive("rope_theta", theta), rotary_dim, scaling)

    def _rope_parameters(self) -> Mapping[str, object]:
        value = self.get("rope_parameters", "rope_scaling")
        if value is None:
            return {}
        if not isinstance(value, dict) or any(isinstance(item, dict) for item in value.values()):
            raise _wrong("rope_parameters", value, "one dictionary for all layers")
        return value

    def _complete_scaling(self, scaling: dict[str, object], kind: str) -> None:
        """Puts in the lengths that some checkpoints keep outside the dictionary; a missing constant is an error."""
        trained = self.integer("max_position_embeddings")
        scaling["max_position_embeddings"] = trained
        outer = self.get("original_max_position_embeddings")
        original = outer or scaling.get("original_max_position_embeddings") or trained
        scaling["original_max_position_embeddings"] = original
        for key in _ROPE_KINDS[kind]:
            if scaling.get(key) is None and kind == "yarn":
                scaling[key] = trained / _positive("original_max_position_embeddings", original)
            elif scaling.get(key) is None:
                raise ModelLoadError(f"config.json: rope_parameters of kind {kind!r} lack {key!r}")

    def _value(self, keys: tuple[str, ...], default: object) -> object:
        value = self.get(*keys)
        if value is None and default is None:
            raise ModelLoadError(f"config.json lacks {keys[0]!r}")
        return default if value is None else value


def _check_scaling(scaling: Mapping[str, object], rotary_dim: int) -> None:
    """Constants that are there are positive numbers; LongRoPE has one divisor for each pair of channels."""
    for key, value in scaling.items():
        if key in _ROPE_DIVISORS:
            if not isinstance(value, list) or len(value) != rotary_dim // 2:
                raise _wrong(key, value, f"a list of {rotary_dim // 2} numbers")
            for divisor in value:
                _positive(key, divisor)
        elif key in _ROPE_CONSTANTS and value is not None:
            _positive(key, value)


def _positive(key: str, value: object) -> float:
    number = _as_number(key, value)
    if number <= 0.0:
        raise _wrong(key, value, "above 0")
    return number


def _as_number(key: str, value: object) -> float:
    if isinstance(value, dict) and set(value) == {"__float__"}:
        value = _NAMED_NUMBERS.get(str(value["__float__"]), value)
    if isinstance(value, int) and value.bit_length() > 64:  # may be more than a float can hold
        raise _wrong(key, str(value)[:40], "a number of at most 64 bits")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise _wrong(key, value, "a number")
    return float(value)


def _wrong(key: str, value: object, accepted: str, why: str = "") -> ModelLoadError:
    return ModelLoadError(f"config.json: {key} must be {accepted}, got {value!r}", hint=why)
