"""Flags made from the declarations in `headway.config` and `headway.request`, and keywords made from flags."""

from __future__ import annotations

import argparse
import json
from typing import Any

from headway.config import EngineConfig
from headway.fields import FieldSpec, flag, specs
from headway.request import SamplingParams

API_KEY_VARIABLE = "OPENAI_API_KEY"  # of the environment, for commands that ask a server
_SUFFIXES = {"": 1, "k": 1000, "m": 10**6, "g": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
# One completion of plain text is all a terminal shows, and its seed is drawn from the engine's --seed.
_NOT_FLAGS = frozenset(
    {
        "n",
        "seed",
        "logprobs",
        "prompt_logprobs",
        "logit_bias",
        "detokenize",
        "stop_token_ids",
        "output_kind",
    }
)


def add_engine_flags(parser: argparse.ArgumentParser, *, shows_all: bool) -> None:
    group = parser.add_argument_group("engine")
    _add(group, specs(EngineConfig), shows_all)
    group.add_argument("--help-all", action="help", help="also lists the advanced flags")


def add_sampling_flags(parser: argparse.ArgumentParser, *, shows_all: bool) -> None:
    listed = {name: spec for name, spec in specs(SamplingParams).items() if name not in _NOT_FLAGS}
    _add(parser.add_argument_group("sampling"), listed, shows_all)


def add_flags(group: argparse._ArgumentGroup, owner: type, *, shows_all: bool) -> None:
    """A flag for each field of `owner` that was declared with `setting`."""
    _add(group, specs(owner), shows_all)


def given(args: argparse.Namespace, owner: type) -> dict[str, Any]:
    """Keywords of `owner` that were given on the command line."""
    return {name: getattr(args, name) for name in specs(owner) if hasattr(args, name)}


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of EngineConfig that were given on the command line."""
    return given(args, EngineConfig)


def given_params(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of SamplingParams that were given on the command line."""
    return {
        name: getattr(args, name)
        for name in specs(SamplingParams)
        if hasattr(args, name) and name not in _NOT_FLAGS
    }


def parse_size(text: str) -> int:
    """`4096`, `32k`, `4GiB` -> an integer."""
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    suffix = text[len(digits) :].lower()
    suffix = suffix if suffix in _SUFFIXES else suffix.removesuffix("b")
    try:
        return int(float(digits) * _SUFFIXES[suffix]) if suffix else int(digits)
    except (KeyError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 4096, 32k or 4GiB") from error


def parse_gb(text: str) -> int:
    """`1.5` -> bytes, in units of 10**9."""
    try:
        return int(float(text) * 10**9)
    except (OverflowError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of gigabytes such as 1.5") from error


def parse_object(text: str) -> dict[str, Any]:
    """An argparse type: a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


_TYPES = {"float": float, "bytes": parse_size, "tokens": parse_size, "int": int, "dict": parse_object}
_LISTS_OF_IDS = frozenset({"allowed_token_ids"})


def _add(group: argparse._ArgumentGroup, listed: dict[str, FieldSpec], shows_all: bool) -> None:
    """SUPPRESS as default keeps what was not given out of the namespace: defaults live in the dataclass alone."""
    for name, spec in listed.items():
        is_shown = spec.tier == "basic" or shows_all
        text = spec.help.replace("%", "%%") if is_shown else argparse.SUPPRESS
        options: dict[str, Any] = {"dest": name, "help": text, "default": argparse.SUPPRESS}
        if spec.kind == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = "ID" if name in _LISTS_OF_IDS else _metavar(spec)
            options["type"] = int if name in _LISTS_OF_IDS else _TYPES.get(spec.kind, str)
        if spec.kind == "list":
            options["action"] = "append"
        group.add_argument(flag(name), **options)
        if spec.gb_name:  # last, so that the flag of the setting's own name is the one that errors speak of
            in_gb: dict[str, Any] = {"dest": name, "help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
            group.add_argument(flag(spec.gb_name), metavar="GB", type=parse_gb, **in_gb)


def _metavar(spec: FieldSpec) -> str:
    if spec.choices:
        return "{" + ",".join(spec.choices) + "}"
    kinds = {"int": "N", "tokens": "N", "bytes": "SIZE", "float": "X", "list": "TEXT", "dict": "JSON"}
    return kinds.get(spec.kind, "PATH")
