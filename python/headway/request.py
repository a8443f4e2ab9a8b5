"""What a caller may ask of one request: `SamplingParams`, and the forms a prompt may take."""

from __future__ import annotations

import json
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self, TypedDict, TypeVar, cast

from headway.errors import RequestError
from headway.fields import nearest, refuse_values, setting, with_quick_init

T = TypeVar("T")

# What other engines take and this one does not, and why.
_NOT_HERE = {
    "logits_processors": "tokens are chosen on the device; see logit_bias, allowed_token_ids, bad_words",
    "best_of": "n completions are returned, all of them",
    "use_beam_search": "there is no beam search",
}

GREEDY_BELOW = 1e-5
MIN_TEMPERATURE = 0.01  # positive temperatures below are raised to it: logits / t must stay finite
MAX_BIAS = 100.0


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: Sequence[int]


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class RequestOutputKind(StrEnum):
    """What an output of a growing request holds. Read by `AsyncLLM`; `LLM.generate` returns the end alone."""

    CUMULATIVE = "cumulative"  # all so far
    DELTA = "delta"  # what is new
    FINAL_ONLY = "final_only"  # one output, the end


Prompt = str | TextPrompt | TokensPrompt | Sequence[int]
ChatMessage = Mapping[str, Any]


@with_quick_init
@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it ends. Names and defaults are vLLM's.

    Raises RequestError naming the parameter, its value and its limit; unknown keywords name the nearest known one.
    """

    n: int = setting(
        1, kind="int", low=1, high=1024, help="completions of the prompt, each with a seed of its own"
    )
    temperature: float = setting(
        1.0, kind="float", low=0, high=2, help="divides the logits; 0 takes the most likely token"
    )
    top_p: float = setting(
        1.0,
        kind="float",
        low=0,
        high=1,
        is_low_open=True,
        help="keeps the most likely tokens up to this mass",
    )
    top_k: int = setting(
        0, kind="int", low=-1, high=2**31 - 1, help="keeps this many tokens; 0 or -1 keeps all"
    )
    min_p: float = setting(
        0.0,
        kind="float",
        low=0,
        high=1,
        help="drops tokens less likely than this share of the most likely one",
    )
    seed: int | None = setting(
        None,
        kind="int",
        low=-1,
        high=2**64 - 1,
        help="of this request; unset or -1: drawn from the engine's seed",
    )
    max_tokens: int | None = setting(
        16,
        kind="int",
        low=1,
        high=2**31 - 1,
        is_optional=True,
        help="tokens to generate at most; None: up to max_model_len",
    )
    min_tokens: int = setting(
        0, kind="int", low=0, high=2**31 - 1, help="tokens before the end token or a stop may appear"
    )
    stop: str | Sequence[str] | None = setting(
        None, kind="list", help="strings that end the text; cut from it"
    )
    stop_token_ids: Sequence[int] | None = setting(None, kind="list", help="further tokens that end the text")
    ignore_eos: bool = setting(False, kind="bool", help="go on past the model's end token")
    presence_penalty: float = setting(
        0.0, kind="float", low=-2, high=2, help="subtracted from the logit of every token generated before"
    )
    frequency_penalty: float = setting(
        0.0, kind="float", low=-2, high=2, help="subtracted once for each time a token was generated before"
    )
    repetition_penalty: float = setting(
        1.0,
        kind="float",
        low=0,
        high=100,
        is_low_open=True,
        help="divides the odds of tokens seen before; 1: off",
    )
    logprobs: int | None = setting(
        None,
        kind="int",
        low=-1,
        high=1024,
        help="top alternatives to report beside the chosen token; -1: the whole vocabulary; None: none at all",
    )
    prompt_logprobs: int | None = setting(
        None,
        kind="int",
        low=-1,
        high=1024,
        help="the same for each token of the prompt but the first, by the model's own logits",
    )
    allowed_token_ids: Sequence[int] | None = setting(
        None, kind="list", help="nothing but these tokens is sampled"
    )
    bad_words: Sequence[str | Sequence[int]] | None = setting(
        None,
        kind="list",
        help="texts or token sequences that are never completed, be it in the prompt that they begin",
    )
    logit_bias: Mapping[int, float] | None = setting(
        None, kind="dict", help="token id -> number in [-100, 100] added to its logit"
    )
    structured_outputs: Mapping[str, Any] | None = setting(
        None,
        kind="dict",
        is_optional=True,
        help="one of json (a schema), json_object (True), regex, choice (texts), grammar (Lark or GBNF): the output is "
        "of that form",
    )
    detokenize: bool = setting(True, kind="bool", help="produce text; False returns token ids alone")
    skip_special_tokens: bool = setting(True, kind="bool", help="leave special tokens out of the text")
    spaces_between_special_tokens: bool = setting(
        True, kind="bool", help="keep what a decoder puts between special tokens that follow each other"
    )
    truncate_prompt_tokens: int | None = setting(
        None,
        kind="int",
        low=-1,
        high=2**31 - 1,
        help="keep this many tokens of the prompt, the last ones; -1: as many as the model's length allows",
    )
    include_stop_str_in_output: bool = setting(
        False, kind="bool", help="keep the stop string or token in the text"
    )

    output_kind: str = setting(
        RequestOutputKind.CUMULATIVE,
        kind="str",
        choices=tuple(RequestOutputKind),
        help="what each output of AsyncLLM.generate holds: all so far, what is new, or the end alone",
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        for name, value in kwargs.items():
            if name in cls.__dataclass_fields__:
                continue
            if name in _NOT_HERE:
                raise RequestError(name, value, "left out: " + _NOT_HERE[name])
            hint = nearest(name, cls.__dataclass_fields__)
            raise RequestError(name, value, "a known sampling parameter", hint=hint)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))  # normalising construction, not later mutation
        refuse_values(self, RequestError)
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        if self.truncate_prompt_tokens == 0:
            raise RequestError("truncate_prompt_tokens", 0, "at least 1, or -1")
        self._check_choice()
        if self.structured_outputs is not None:
            check_form(self.structured_outputs)
            self._check_structured_pairs()
        self._check_stops()
        self._check_bias()
        self._check_pairs()

    def _check_stops(self) -> None:
        for text in self.stop or ():
            if not isinstance(text, str) or not text:
                raise RequestError("stop", self.stop, "non-empty strings")
        for token in self.stop_token_ids or ():
            if not is_int(token) or not 0 <= token < 2**31:
                raise RequestError("stop_token_ids", token, "token ids of at least 0")

    def _check_choice(self) -> None:
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids", self.allowed_token_ids, "at least one token id")
        for token in self.allowed_token_ids or ():
            if not is_int(token) or not 0 <= token < 2**31:
                raise RequestError("allowed_token_ids", token, "token ids of at least 0")
        for word in self.bad_words or ():
            is_tokens = isinstance(word, (list, tuple)) and all(is_int(token) for token in word)
            if not word or not (isinstance(word, str) or is_tokens):
                raise RequestError("bad_words", word, "non-empty strings or lists of token ids")

    def _check_structured_pairs(self) -> None:
        """What could leave no token to sample, or go on behind the end."""
        for name in ("allowed_token_ids", "min_tokens", "ignore_eos"):
            if getattr(self, name):
                raise RequestError(name, getattr(self, name), "unset with structured_outputs")

    def _check_bias(self) -> None:
        for token, bias in (self.logit_bias or {}).items():
            if not is_int(token) or not 0 <= token < 2**31:
                raise RequestError("logit_bias", token, "keyed by token ids of at least 0")
            is_number = isinstance(bias, numbers.Real) and not isinstance(bias, bool)
            if not is_number or not -MAX_BIAS <= bias <= MAX_BIAS:
                raise RequestError("logit_bias", bias, f"in [-{MAX_BIAS:g}, {MAX_BIAS:g}] for each token")

    def _check_pairs(self) -> None:
        if self.n > 1 and self.is_greedy:
            raise RequestError("n", self.n, "1 when temperature is 0: all completions would be equal")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        if self.stop and not self.detokenize:
            raise RequestError(
                "stop", self.stop, "unset when detokenize is False: there is no text to search"
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def effective_temperature(self) -> float:
        return 0.0 if self.is_greedy else max(self.temperature, MIN_TEMPERATURE)


FORMS = ("json", "json_object", "regex", "choice", "grammar")
MAX_FORM_CHARS = 1 << 17
MAX_FORM_DEPTH = 64
MAX_CHOICES = 4096


def check_form(form: Mapping[str, Any]) -> None:
    """Raises RequestError unless it is exactly one form, of a size that can be compiled."""
    if len(form) != 1 or next(iter(form)) not in FORMS:
        raise RequestError("structured_outputs", sorted(map(str, form)), f"exactly one of {', '.join(FORMS)}")
    kind, value = next(iter(form.items()))
    is_kind = {
        "json": isinstance(value, (str, Mapping)),
        "json_object": value is True,
        "choice": isinstance(value, (list, tuple)) and all(isinstance(t, str) and t for t in value),
    }.get(kind, isinstance(value, str))
    if not is_kind or not value:
        raise RequestError(f"structured_outputs.{kind}", type(value).__name__, _FORM_LIMITS[kind])
    if kind == "choice" and len(value) > MAX_CHOICES:
        raise RequestError("structured_outputs.choice", len(value), f"at most {MAX_CHOICES} texts")
    if depth_of(value) > MAX_FORM_DEPTH:
        raise RequestError(
            f"structured_outputs.{kind}", "a deeper one", f"at most {MAX_FORM_DEPTH} levels deep"
        )
    num_chars = len(value) if isinstance(value, str) else len(json.dumps(value, default=str))
    if num_chars > MAX_FORM_CHARS:
        raise RequestError(f"structured_outputs.{kind}", num_chars, f"at most {MAX_FORM_CHARS} characters")


_FORM_LIMITS = {
    "json": "a schema as a dictionary or as JSON text",
    "json_object": "True",
    "regex": "a regular expression",
    "choice": "a list of non-empty strings",
    "grammar": "a grammar in Lark's notation or GBNF",
}


def depth_of(value: object) -> int:
    """Levels of dictionaries and lists; of text, of its brackets. Does not recurse: the value is a stranger's."""
    if isinstance(value, str):
        depth = deepest = 0
        for character in value:
            depth += (character in "[{(") - (character in "]})")
            deepest = max(deepest, depth)
        return deepest
    level, depth = [value], 0
    while level and depth <= MAX_FORM_DEPTH:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, (Mapping, list, tuple))
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
    return depth


def is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many -> many. A flat list of integers is one prompt of token ids."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    plain = _as_list(prompts)
    if plain is None:
        raise RequestError("prompts", prompts, "a string, token ids, a dictionary, or a list of these")
    if not plain:
        return []
    is_flat = not isinstance(plain[0], (str, bytes, Mapping)) and _as_list(plain[0]) is None
    return [cast(Prompt, plain)] if is_flat else plain


def _as_list(value: object) -> list[Any] | None:
    """A list, tuple, NumPy array or torch tensor as a list; None for what is none of these."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return list(value)
    plain = value.tolist() if hasattr(value, "tolist") else None
    return plain if isinstance(plain, list) else None


def prompt_parts(prompt: Prompt) -> tuple[str | None, Sequence[int] | None]:
    """Text and token ids of a prompt; one of them may be None. Raises RequestError for any other form."""
    if isinstance(prompt, Mapping):
        text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    else:
        text, token_ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
    plain = _as_list(token_ids)
    if plain is not None and (text is None or isinstance(text, str)):
        return text, plain
    if token_ids is not None or not isinstance(text, str):
        raise RequestError(
            "prompt", prompt, 'text, token ids, or a dictionary with "prompt" or "prompt_token_ids"'
        )
    if not text:
        raise RequestError("prompt", text, "at least one character")
    return text, None


def one_per_prompt(name: str, values: T | Sequence[T], num_prompts: int) -> list[T]:
    """One value for all prompts, or one for each -> one for each. `name` is the caller's parameter."""
    if not isinstance(values, (list, tuple)):
        return [cast(T, values)] * num_prompts
    if len(values) != num_prompts:
        raise RequestError(name, f"{len(values)} of them", f"one, or {num_prompts}: one per prompt")
    return list(values)


def is_conversation(messages: Sequence[Any]) -> bool:
    if len(messages) == 0:
        raise RequestError("messages", messages, "at least one message")
    return isinstance(messages[0], Mapping)
