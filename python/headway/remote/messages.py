"""What a server and its engine's process say to each other: typed records, checked field by field when they arrive.

A frame is a list of messages in msgpack. Nothing in it can be code; an unknown field, a wrong type or a missing one is
refused. Both sides have a cap on a frame's length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from headway.errors import HeadwayError
from headway.outputs import PromptLogprobs, RequestMetrics, StepSpan, TokenLogprobs
from headway.server.client import EngineStats, Health, ModelInfo

MIB = 1 << 20
PROTOCOL_VERSION = 2
MAX_ENGINE_FRAME_BYTES = (
    256 * MIB
)  # engine to server; 131,072 prompt tokens with 20 logprobs each are 140 MiB
MAX_SERVER_FRAME_BYTES = 64 * MIB  # server to engine; a token id takes 5 bytes at most


class ProtocolError(HeadwayError):
    """What came is no message of this version of Headway."""


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True, gc=False):
    """Of either side. Requests go by a number that the server gives them, from 1 on."""


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of JSON, the first thing on the engine's stdin. The pipe stays open while the server lives.

    Attributes:
        secret: to be repeated in `Hello`: who does not know it is not heard.
        options: what `command` makes an engine of; keywords of `AsyncLLM` by default.
        dies_with_parent: the kernel kills the engine when the server's thread that started it ends.
    """

    version: int
    address: str
    secret: str
    parent_pid: int
    dies_with_parent: bool
    watchdog_timeout_s: float
    log_level: int
    options: dict[str, Any]


# --- engine to server -------------------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    version: int
    secret: str


class Loading(Message, frozen=True):
    num_done_bytes: int
    num_total_bytes: int


class Ready(Message, frozen=True):
    """The engine takes requests. The tokenizer travels: both sides have the very same one."""

    info: ModelInfo
    tokenizer_json: str | None
    special_tokens: dict[str, str]
    template: str | None
    template_tokens: dict[str, str]


class Fault(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An error of `headway.errors` in words; see `headway.remote.faults`."""

    kind: str
    message: str
    hint: str = ""
    parameter: str = ""
    value: str = ""
    limit: str = ""
    retry_after_s: float = 0.0


class Failed(Message, frozen=True):
    """The engine did not come to be, or has stopped for good: nothing follows."""

    fault: Fault


class Output(Message, frozen=True):
    """`EngineOutput` of one request, with an empty text where the server makes it: see `headway.remote.reading`."""

    number: int
    index: int
    text: str
    token_ids: list[int]
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    finish_reason: Literal["stop", "length", "abort", "error"] | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    metrics: RequestMetrics | None = None


class Growth(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Tokens of a request's only completion, which has begun and goes on: all else of an `Output` is as before."""

    number: int
    token_ids: list[int]


class Grown(Message, frozen=True):
    """What most messages would be: several in one cost either side less."""

    growths: list[Growth]


class Refused(Message, frozen=True):
    """One request is over: this is why."""

    number: int
    fault: Fault


class Beat(Message, frozen=True):
    """A sign of life, also of an engine that has nothing to do."""

    stats: EngineStats
    health: Health


class StatsAnswer(Message, frozen=True):
    call: int
    stats: EngineStats


class StepsAnswer(Message, frozen=True):
    call: int
    steps: list[StepSpan]


class TextAnswer(Message, frozen=True):
    """Of `stop_profile`; of actions that have nothing to tell, empty."""

    call: int
    text: str


class FlagAnswer(Message, frozen=True):
    call: int
    is_done: bool


class FaultAnswer(Message, frozen=True):
    call: int
    fault: Fault


Answer = StatsAnswer | StepsAnswer | TextAnswer | FlagAnswer | FaultAnswer
EngineMessage = Hello | Loading | Ready | Failed | Output | Grown | Refused | Beat | Answer


# --- server to engine -------------------------------------------------------------------------------------------------

Question = Literal["stats", "recent_steps", "reset_prefix_cache", "start_profile", "stop_profile"]


class Add(Message, frozen=True):
    """`EngineRequest` without its text, which the engine does not read."""

    number: int
    request_id: str
    prompt_token_ids: list[int]
    params: msgspec.Raw  # see `headway.remote.records`
    priority: int
    cache_salt: str | None
    use_prefix_cache: bool


class Leave(Message, frozen=True):
    """Nobody reads it any more."""

    number: int


class Abort(Message, frozen=True):
    """Its reader gets what there is."""

    number: int


class Ask(Message, frozen=True):
    call: int
    question: Question


class Seen(Message, frozen=True):
    """How many frames the server has read since `Ready`: the engine sends so many more and no further ones."""

    num_frames: int


class Close(Message, frozen=True):
    """End everything and the process with it."""


ServerMessage = Add | Leave | Abort | Ask | Seen | Close


# --- bytes ------------------------------------------------------------------------------------------------------------

_encode = msgspec.msgpack.Encoder().encode
_decode_for_server = msgspec.msgpack.Decoder(list[EngineMessage]).decode
_decode_for_engine = msgspec.msgpack.Decoder(list[ServerMessage]).decode
M = TypeVar("M")


def engine_messages(frame: bytes) -> list[EngineMessage]:
    """What an engine said. Raises ProtocolError."""
    return _checked(_decode_for_server, frame)


def server_messages(frame: bytes) -> list[ServerMessage]:
    """What a server said. Raises ProtocolError."""
    return _checked(_decode_for_engine, frame)


def _checked(decode: Callable[[bytes], list[M]], frame: bytes) -> list[M]:
    try:
        return decode(frame)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise ProtocolError(f"a frame of {len(frame)} bytes is no message: {error}") from error


def to_frames(messages: Sequence[M], max_bytes: int) -> tuple[list[bytes], list[M]]:
    """Frames that hold the messages in their order, and those messages that alone are more than max_bytes."""
    frame = _encode(messages)
    if len(frame) <= max_bytes:
        return [frame], []
    if len(messages) == 1:
        return [], list(messages)
    half = len(messages) // 2
    frames, too_large = to_frames(messages[:half], max_bytes)
    more_frames, more_too_large = to_frames(messages[half:], max_bytes)
    return frames + more_frames, too_large + more_too_large
