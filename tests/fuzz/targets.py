"""What strangers' bytes reach: each target takes any bytes, and only an error of ours may come out of it.

`tests.fuzz.run` hands them to a coverage-guided fuzzer, which keeps whatever input reaches new code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from headway.errors import HeadwayError
from headway.models.checkpoint import Checkpoint
from headway.models.registry import read_model_config
from headway.remote.messages import Add, engine_messages, server_messages, to_frames
from headway.remote.records import to_add, to_request
from headway.request import SamplingParams, check_form
from headway.sampling.defaults import read_generation_defaults
from headway.server.client import EngineRequest
from headway.server.decode import decode_body
from headway.server.errors import ApiError
from headway.server.sampling import sampling_params
from headway.server.schemas.chat import ChatRequest
from headway.server.schemas.completions import CompletionRequest
from headway.text import ChatTemplate, IncrementalDetokenizer, Tokenizer
from headway.text.parsers import OutputFormat, joined

ASSETS = Path(__file__).parents[2] / "python" / "headway" / "assets" / "tiny"
FORMATS = ("granite", "hermes", "llama3_json", "nemotron_json", "pythonic", "qwen3_coder")
TOOLS = [{"function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}, "b": {}}}}}]
CALL = '{"name": "f", "arguments": {"a": "x", "b": [1, null]}}'


@dataclass(frozen=True)
class Target:
    """`run` raises what is none of ours where it has found something."""

    run: Callable[[bytes], None]
    seeds: list[bytes] = field(default_factory=list)
    max_bytes: int = 4096


def of_file(
    scratch: Path, name: str, read: Callable[[Path], object], seeds: list[bytes], max_bytes: int = 4096
) -> Target:
    """A checkpoint folder for all inputs of a run, of which this one file is written anew for each."""
    folder = scratch / name
    folder.mkdir()
    for other in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ASSETS / other, folder / other)

    def run(data: bytes) -> None:
        (folder / name).write_bytes(data)
        with suppress(HeadwayError):
            read(folder)

    return Target(run, seeds, max_bytes)


def _read_tensors(folder: Path) -> None:
    with Checkpoint(folder) as found:
        for name in found.names():
            found.shape(name), found.dtype(name)


def _read_texts(folder: Path) -> None:
    template = ChatTemplate.find(folder)
    if template is not None:
        template.render([{"role": "user", "content": "x"}])


def _body(kind: type[CompletionRequest] | type[ChatRequest]) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        with suppress(HeadwayError, ApiError):
            fields = decode_body(kind, data)
            sampling_params(fields, {})
            if fields.structured_outputs is not None:
                check_form(msgspec.to_builtins(fields.structured_outputs))

    return run


def _to_engine(data: bytes) -> None:
    with suppress(HeadwayError):
        for message in server_messages(data):
            if isinstance(message, Add):
                to_request(message)


def _to_server(data: bytes) -> None:
    with suppress(HeadwayError):
        engine_messages(data)


def _tool_calls(data: bytes) -> None:
    """However a text is cut, the same is found in it."""
    if len(data) < 2:
        return
    name, text = FORMATS[data[0] % len(FORMATS)], data[2:].decode("utf-8", "replace")
    cut = data[1] % 16 + 1
    whole, cut_up = (OutputFormat(name, "think").parser("", TOOLS) for _ in range(2))
    pieces = [piece for i in range(0, len(text), cut) for piece in cut_up.push(text[i : i + cut])]
    found = joined(whole.push(text) + whole.finish())
    assert joined(pieces + cut_up.finish()) == found


TOKENIZER = Tokenizer.from_dir(ASSETS)


def _detokenizer(data: bytes) -> None:
    """Tokens one by one, or many at once, have the text that decoding them all has."""
    ids = [
        int.from_bytes(data[i : i + 2], "little") % (TOKENIZER.vocab_size + 3) for i in range(0, len(data), 2)
    ]
    one, many = IncrementalDetokenizer(TOKENIZER), IncrementalDetokenizer(TOKENIZER)
    text = "".join(map(one.append, ids)) + one.finish()
    half = len(ids) // 2
    assert many.extend(ids[:half]) + many.extend(ids[half:]) + many.finish() == text == TOKENIZER.decode(ids)


def _json(**values: Any) -> bytes:
    return json.dumps(values).encode()


def _tensors() -> bytes:
    header = _json(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, __metadata__={"format": "pt"})
    return len(header).to_bytes(8, "little") + header + bytes(8)


SMALL_TOKENIZER = _json(
    version="1.0",
    added_tokens=[{"id": 2, "content": "<s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
                   "normalized": False}],
    model={"type": "BPE", "vocab": {"a": 0, "b": 1, "<s>": 2, "ab": 3}, "merges": ["a b"]},
    pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
)  # fmt: skip
REQUEST = EngineRequest("r", [1, 2], SamplingParams(n=2, stop=["x"], logit_bias={3: 1.0}, seed=5))
PARAMS = {"n": 2, "top_p": 0.5, "stop": ["a", "b"], "logit_bias": {"5": 1.5}, "seed": 7, "stream": True}
CHAT = {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", **TOOLS[0]}]}


NAMES = (
    *(
        "config",
        "generation_config",
        "tokenizer_config",
        "tokenizer",
        "index",
        "safetensors",
        "completion_body",
    ),
    *("chat_body", "frame_to_engine", "frame_to_server", "tool_calls", "detokenizer"),
)


def targets(scratch: Path) -> dict[str, Target]:
    """By NAMES. Folders of files are made in `scratch`."""
    config = (ASSETS / "config.json").read_bytes()
    texts = (ASSETS / "tokenizer_config.json").read_bytes()
    forms = _json(prompt="x", structured_outputs={"regex": "[a-z]+"})
    frame = to_frames([to_add(1, REQUEST)], 1 << 20)[0][0]
    output = msgspec.msgpack.encode([["Output", 1, 0, "x", [5], 1, 1, 0], ["Grown", [[1, [5, 6]]]]])
    return {
        "config": of_file(scratch, "config.json", read_model_config, [config]),
        "generation_config": of_file(
            scratch, "generation_config.json", lambda folder: read_generation_defaults(folder, is_applied=True),
            [_json(temperature=0.5, eos_token_id=[1, 2], top_k=4)],
        ),
        "tokenizer_config": of_file(scratch, "tokenizer_config.json", _read_texts, [texts], 16384),
        "tokenizer": of_file(
            scratch, "tokenizer.json", lambda folder: Tokenizer.from_dir(folder).encode("abé"), [SMALL_TOKENIZER]
        ),
        "index": of_file(
            scratch, "model.safetensors.index.json", _read_tensors, [_json(weight_map={"a": "model.safetensors"})]
        ),
        "safetensors": of_file(scratch, "model.safetensors", _read_tensors, [_tensors()]),
        "completion_body": Target(_body(CompletionRequest), [_json(prompt="x", **PARAMS), forms]),
        "chat_body": Target(_body(ChatRequest), [_json(**CHAT, **PARAMS)]),
        "frame_to_engine": Target(_to_engine, [frame]),
        "frame_to_server": Target(_to_server, [output]),
        "tool_calls": Target(_tool_calls, [bytes([i, 3]) + text.encode() for i, text in enumerate(SPELLINGS)]),
        "detokenizer": Target(_detokenizer, [bytes(range(64)) * 2], 512),
    }  # fmt: skip


SPELLINGS = (
    f"<|tool_call|>[{CALL}]",
    f"<think>hm</think>\n<tool_call>\n{CALL}\n</tool_call>",
    f"<|python_tag|>{CALL}; {CALL}",
    f"<TOOLCALL>[{CALL}, {CALL}]</TOOLCALL>",
    "[f(a='x', b=[1, None])]",
    "<tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n</function>\n</tool_call>",
)


def planted(data: bytes) -> None:
    """A reader that trusts a length: four bytes must come together before it breaks."""
    if data[:1] == b"{" and data[1:2] == b'"' and data[2:3] == b"n" and len(data) > data[3]:
        raise IndexError("planted")
