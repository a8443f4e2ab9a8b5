"""Tool calls and reasoning: each format as its models write it, however the text is cut; what is no call stays text."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.text.parsers import (
    Content,
    OutputFormat,
    Piece,
    Reasoning,
    ToolArguments,
    ToolStart,
    detect_format,
    joined,
)
from headway.text.parsers.scanner import cut_at_tag

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
]
CALL = '{"name": "weather", "arguments": {"city": "Köln \\"süd\\"", "days": 3}}'
ARGUMENTS = {"city": 'Köln "süd"', "days": 3}

# Format, output, what it means.
CASES = [
    ("hermes", f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>", "Let me see."),
    ("hermes", f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", ""),
    ("nemotron_json", f"<TOOLCALL>[{CALL}]</TOOLCALL>", ""),
    ("nemotron_json", f"<TOOLCALL>[{CALL}, {CALL}]</TOOLCALL>", ""),
    ("granite", f"<|tool_call|>[{CALL}]", ""),
    ("granite", f"<tool_call>[{CALL}]", ""),
    ("llama3_json", f"<|python_tag|>{CALL.replace('arguments', 'parameters')}", ""),
    ("llama3_json", f"{CALL}; {CALL}", ""),
    ("llama3_json", f'{{"type": "function", {CALL[1:]}', ""),
    ("llama3_json", '{"arguments": {"city": "Köln \\"süd\\"", "days": 3}, "name": "weather"}', ""),
    (
        "qwen3_coder",
        'Hm.\n\n<tool_call>\n<function=weather>\n<parameter=city>\nKöln "süd"\n</parameter>\n'
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        "Hm.",
    ),
    ("pythonic", "[weather(city='Köln \"süd\"', days=3)]", ""),
]
NO_CALLS = [
    ("hermes", "a < b, <tool> and <tool_cal"),
    ("hermes", "<tool_call>not json</tool_call>"),
    ("hermes", 'before \n<tool_call>{"name": 3}</tool_call> after '),
    ("hermes", '<tool_call>{"city": "x"'),
    ("hermes", 'a <tool_call> {"city": 1}</tool_call> b'),
    ("nemotron_json", "[1, 2] <TOOLS>"),
    ("granite", "plain <|tool_call|> oops"),
    ("granite", "plain \n text \n"),
    ("llama3_json", '{"answer": 42}'),
    ("llama3_json", "  spaced\n"),
    ("qwen3_coder", "x <function y> \n"),
    ("qwen3_coder", "<function=never closed"),
    ("qwen3_coder", "write <tool_call> before \n<tool_call>\n\nx</tool_call> y"),
    ("qwen3_coder", "a\n<tool_call>\n<function=cut"),
    ("qwen3_coder", "a <tool_call> \n<func"),
    ("pythonic", "[weather(days=1e999)]"),
    ("pythonic", "[1, 2, 3]"),
    ("pythonic", "[weather(city)]"),
    ("pythonic", "[__import__('os').system('x')]"),
    ("pythonic", "words"),
]


def parse(form: OutputFormat, pieces: list[str], *, prompt: str = "", has_tools: bool = True) -> list[Piece]:
    parser = form.parser(prompt, TOOLS if has_tools else None)
    found: list[Piece] = []
    for piece in pieces:
        found += parser.push(piece)
    return joined(found + parser.finish())


def calls_of(pieces: list[Piece]) -> list[tuple[str, Any]]:
    names = {piece.index: piece.name for piece in pieces if isinstance(piece, ToolStart)}
    texts = dict.fromkeys(names, "")
    for piece in pieces:
        if isinstance(piece, ToolArguments):
            texts[piece.index] += piece.text
    assert sorted(names) == list(range(len(names)))
    return [(names[index], json.loads(texts[index])) for index in sorted(names)]


def content_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, Content))


@pytest.mark.parametrize(("tools", "text", "content"), CASES)
def test_a_call_is_found(tools: str, text: str, content: str) -> None:
    pieces = parse(OutputFormat(tools, None), [text])
    calls = calls_of(pieces)
    assert calls
    assert all(call == ("weather", ARGUMENTS) for call in calls)
    assert len(calls) == max(1, text.count("weather"))
    assert content_of(pieces) == content


@pytest.mark.parametrize(("tools", "text"), NO_CALLS)
def test_what_is_no_call_is_content(tools: str, text: str) -> None:
    pieces = parse(OutputFormat(tools, None), [text])
    assert not calls_of(pieces)
    assert content_of(pieces) == text


@pytest.mark.parametrize(("tools", "text"), [case[:2] for case in CASES] + NO_CALLS)
def test_how_the_text_is_cut_changes_nothing(tools: str, text: str) -> None:
    whole = parse(OutputFormat(tools, "think"), [text])
    assert parse(OutputFormat(tools, "think"), list(text)) == whole
    for at in range(len(text)):
        assert parse(OutputFormat(tools, "think"), [text[:at], text[at:]]) == whole


WORDS = (
    "<think> </think> <tool_call> </tool_call> <TOOLCALL> </TOOLCALL> <|tool_call|> <|python_tag|> <response>"
)
XML = "<function= weather > <parameter= </parameter> </function>"
JSON = '{ } [ ] , : " \\ "name":"f" "arguments":'
SPACED = [" ", "\n", "x", "<", "</", "Here is my response:", "Here is my thought process:", CALL]
FRAGMENTS = st.sampled_from([*WORDS.split(), *XML.split(), *JSON.split(), *SPACED])


@given(
    tools=st.sampled_from(["hermes", "nemotron_json", "granite", "llama3_json", "qwen3_coder", "pythonic"]),
    reasoning=st.sampled_from([None, "think", "granite"]),
    parts=st.lists(FRAGMENTS, max_size=14),
    cuts=st.lists(st.integers(0, 200), max_size=6),
    is_open=st.booleans(),
)
def test_any_text_cut_anywhere_means_the_same(
    tools: str, reasoning: str | None, parts: list[str], cuts: list[int], is_open: bool
) -> None:
    text = "".join(parts)
    form = OutputFormat(tools, reasoning)
    prompt = "<think>\n" if is_open else ""
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert parse(form, pieces, prompt=prompt) == parse(form, [text], prompt=prompt)


@given(st.text(alphabet="ab<>/ \n{}", max_size=40))
def test_without_parsers_all_is_content(text: str) -> None:
    assert content_of(parse(OutputFormat(None, None), list(text))) == text


def test_arguments_are_streamed_as_they_are_written() -> None:
    parser = OutputFormat("hermes", None).parser("", TOOLS)
    sizes = []
    for char in f"<tool_call>{CALL}</tool_call>":
        sizes += [len(piece.text) for piece in parser.push(char) if isinstance(piece, ToolArguments)]
    assert len(sizes) > 10
    assert max(sizes) == 1


def test_a_closing_tag_in_a_string_is_text() -> None:
    text = '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>"}}</tool_call>'
    assert calls_of(parse(OutputFormat("hermes", None), [text])) == [("weather", {"city": "</tool_call>"})]


def test_an_empty_list_of_calls_parts_words() -> None:
    assert content_of(parse(OutputFormat("nemotron_json", None), ["x <TOOLCALL>[]</TOOLCALL> y"])) == "x  y"


def test_xml_calls_whose_end_is_missing() -> None:
    form = OutputFormat("qwen3_coder", None)
    open_call = "<tool_call><function=weather><parameter=city>Rome"
    unclosed = parse(form, [f"{open_call}</parameter></tool_call>\n<tool_call><function=now></function>"])
    assert calls_of(unclosed) == [("weather", {"city": "Rome"}), ("now", {})]
    cut = parse(form, list(open_call))
    assert [piece.text for piece in cut if isinstance(piece, ToolArguments)] == ['{"city": "Rome']


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_number_that_json_does_not_have_is_text(number: str) -> None:
    text = f"<function=weather><parameter=days>{number}</parameter></function>"
    assert calls_of(parse(OutputFormat("qwen3_coder", None), [text])) == [("weather", {"days": number})]


def test_a_call_without_arguments_has_an_empty_object() -> None:
    assert calls_of(parse(OutputFormat("hermes", None), ['<tool_call>{"name": "now"}</tool_call>'])) == [
        ("now", {})
    ]
    xml = "<function=now>\n</function>"
    assert calls_of(parse(OutputFormat("qwen3_coder", None), [xml])) == [("now", {})]


@pytest.mark.parametrize(
    ("reasoning", "prompt", "text", "thought", "content"),
    [
        ("think", "", "<think>\nhm\n\n</think>\n\nyes\n", "hm", "yes\n"),
        ("think", "<|im_start|>assistant\n<think>\n", "hm\n</think>\n\nyes", "hm", "yes"),
        ("think", "<think>\n\n</think>\n\n", "yes", "", "yes"),
        ("think", "", "no <think> here", "", "no <think> here"),
        ("think", "<think>", "cut sho", "cut sho", ""),
        ("granite", "", "Here is my thought process: a\n\nHere is my response:\nb", "a", "b"),
        ("granite", "", "<think>a</think><response>b</response>", "a", "b"),
        ("granite", "", "<think>a</think> <response> x </response> y </response>\n", "a", "x </response> y"),
        ("granite", "", "In XML: <response> x </response> ", "", "In XML: <response> x </response> "),
        (None, "", "<think>a</think>b", "", "<think>a</think>b"),
    ],
)
def test_reasoning_is_told_from_the_answer(
    reasoning: str | None, prompt: str, text: str, thought: str, content: str
) -> None:
    for pieces in ([text], list(text)):
        found = parse(OutputFormat(None, reasoning), pieces, prompt=prompt)
        assert "".join(piece.text for piece in found if isinstance(piece, Reasoning)) == thought
        assert content_of(found) == content


def test_tags_count_only_where_tools_are_offered() -> None:
    text = f"<tool_call>{CALL}</tool_call>"
    assert content_of(parse(OutputFormat("hermes", None), [text], has_tools=False)) == text


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ '<TOOLCALL>' }} </think>", OutputFormat("nemotron_json", "think")),
        ("<tool_call>\n<function=example", OutputFormat("qwen3_coder", None)),
        ("<tool_call>{{ tool_call }}", OutputFormat("hermes", None)),
        ("<|tool_call|> Here is my thought process:", OutputFormat("granite", "granite")),
        ("{{ '<|python_tag|>' }}", OutputFormat("llama3_json", None)),
        ("{{ messages }}", OutputFormat(None, None)),
    ],
)
def test_a_template_tells_the_format(template: str, expected: OutputFormat) -> None:
    assert detect_format(template) == expected
    assert detect_format(template, tools="none", reasoning="none") == OutputFormat(None, None)
    assert detect_format(template, tools="hermes").tools == "hermes"


def test_a_tag_that_has_begun_is_held() -> None:
    cut = cut_at_tag("text <tool", ("<tool_call>",), is_last=False)
    assert (cut.before, cut.rest) == ("text ", "<tool")
    assert cut_at_tag("text <tool", ("<tool_call>",), is_last=True).before == "text <tool"
