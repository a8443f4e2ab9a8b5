"""Dataclass fields that carry their own documentation, limits and command-line spelling.

`EngineConfig` and `SamplingParams` are declared with `setting(...)`; Python keywords, flags, checks and the settings
page all come from that one declaration. Knows nothing of engines, models or torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Kind = Literal["int", "float", "bool", "str", "bytes", "tokens", "list", "dict"]
Tier = Literal["basic", "advanced"]
_NUMBER_KINDS = frozenset({"int", "bytes", "tokens", "float"})

_KIND_TYPES: dict[Kind, type | tuple[type, ...]] = {
    "bool": bool,
    "str": str,
    "list": (list, tuple),
    "dict": Mapping,
}
_KIND_WORDS: dict[Kind, str] = {
    "int": "an integer",
    "float": "a number",
    "bool": "True or False",
    "str": "a string",
    "bytes": "a number of bytes",
    "tokens": "a number of tokens",
    "list": "a list",
    "dict": "a dictionary",
}


@dataclass(frozen=True)
class FieldSpec:
    """What a field accepts and how it is explained."""

    help: str
    kind: Kind
    unit: str = ""
    tier: Tier = "basic"
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    is_low_open: bool = False
    is_optional: bool = False  # None is accepted and means what `help` says
    gb_name: str = ""  # another name, of flags alone, for a number of bytes in units of 10**9

    @property
    def limit(self) -> str:
        """The accepted values, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        base = _KIND_WORDS[self.kind]
        return base + self._range_words()

    def _range_words(self) -> str:
        if self.low is not None and self.high is not None:
            return f" in {'(' if self.is_low_open else '['}{_plain(self.low)}, {_plain(self.high)}]"
        if self.low is not None:
            return f" {'above' if self.is_low_open else 'of at least'} {_plain(self.low)}"
        return ""

    def accepts(self, value: object) -> bool:
        if value is None:
            return self.is_optional
        if self.choices:
            return value in self.choices
        if type(value) is int and self.kind in _NUMBER_KINDS:  # the usual case; what follows is slower
            return self._in_range(value)
        if self.kind in ("int", "bytes", "tokens"):
            return (
                isinstance(value, numbers.Integral)
                and not isinstance(value, bool)
                and self._in_range(int(value))
            )
        if self.kind == "float":
            return (
                isinstance(value, numbers.Real)
                and not isinstance(value, bool)
                and self._in_range(float(value))
            )
        return isinstance(value, _KIND_TYPES[self.kind])

    def _in_range(self, value: float) -> bool:
        # Written as lo <= x <= hi, never as its negation, so that NaN is refused.
        low = float("-inf") if self.low is None else self.low
        high = float("inf") if self.high is None else self.high
        return (low < value if self.is_low_open else low <= value) and value <= high


def setting(default: Any, *, help: str, kind: Kind, **limits: Any) -> Any:
    """A dataclass field with its `FieldSpec`; `limits` are further fields of that class."""
    spec = FieldSpec(help=help, kind=kind, **{"is_optional": default is None, **limits})
    return dataclasses.field(default=default, metadata={"spec": spec})


def specs(owner: type) -> dict[str, FieldSpec]:
    """Name -> spec of every field declared with `setting`, in order of declaration."""
    return {f.name: f.metadata["spec"] for f in dataclasses.fields(owner) if "spec" in f.metadata}


def _plain(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def refuse_values(owner: Any, refuse: Callable[[str, object, str], Exception]) -> None:
    """Raises `refuse(name, value, limit)` for the first field of a dataclass instance that is out of range."""
    values = vars(owner)
    for name, spec, default in _declared(type(owner)):  # type: ignore[arg-type]  # a class has a hash
        if (value := values[name]) is not default and not spec.accepts(value):
            raise refuse(name, value, spec.limit)


def with_quick_init(owner: type[T]) -> type[T]:
    """For frozen dataclasses of many fields, all with defaults: keywords go into the instance's dictionary at once.

    The __init__ that dataclass writes calls object.__setattr__ for each field, which is most of such a record's cost.
    """
    slow_init: Any = owner.__init__
    defaults = {f.name: f.default for f in dataclasses.fields(owner)}  # type: ignore[arg-type]  # it is a dataclass

    @functools.wraps(slow_init)
    def init(self: Any, *args: Any, **given: Any) -> None:
        if args or not given.keys() <= defaults.keys():
            slow_init(self, *args, **given)
            return
        vars(self).update(defaults, **given)
        self.__post_init__()

    owner.__init__ = init  # type: ignore[method-assign]
    return owner


@functools.cache
def _declared(owner: type) -> Sequence[tuple[str, FieldSpec, object]]:
    """Name, spec and default. A default is in range by its own declaration and need not be looked at."""
    fields = dataclasses.fields(owner)
    return [(f.name, f.metadata["spec"], f.default) for f in fields if "spec" in f.metadata]


def nearest(name: str, known: Iterable[str]) -> str:
    """`, did you mean x?` for the known name most like `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else ""
