from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headway.errors import ModelLoadError, RequestError
from headway.text import ChatTemplate

CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message['content'] + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


def test_a_conversation_becomes_the_prompt_it_was_trained_on() -> None:
    prompt = ChatTemplate(CHATML).render([{"role": "system", "content": "Be brief."}, *HELLO])
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ChatTemplate(CHATML).render(HELLO, add_generation_prompt=False).endswith("Hello<|im_end|>\n")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ tools | tojson }}", '[{"name": "é<b>"}]'),
        ("{{ tools | tojson(indent=2) }}", '[\n  {\n    "name": "é<b>"\n  }\n]'),
        (
            "{{ bos_token }}{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}",
            "<s>",
        ),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hello"),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "1",
        ),
        ("{{ documents[0].text }}", "a page"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        (
            "{{ '%02d' | format(7) }}{{ '{:>4}'.format('x') }}{{ '-' * 3 }}{{ 'a\nb' | indent(1) }}",
            "07   x---a\n b",
        ),
        ("{{ 'yes' if enable_thinking is defined and not enable_thinking }}", "yes"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
    ],
)
def test_templates_have_the_names_they_expect(source: str, expected: str) -> None:
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert (
        template.render(
            HELLO, tools=[{"name": "é<b>"}], documents=[{"text": "a page"}], enable_thinking=False
        )
        == expected
    )


@pytest.mark.parametrize(
    "source", [CHATML, CHATML.replace("message['content']", "message['content'] | trim")]
)
def test_the_last_message_can_stay_open(source: str) -> None:
    messages = [*HELLO, {"role": "assistant", "content": " The line "}]
    prompt = ChatTemplate(source).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert prompt.rstrip().endswith("The line")
    with pytest.raises(RequestError, match="add_generation_prompt"):
        ChatTemplate(source).render(messages, continue_final_message=True)


def test_transformers_renders_the_same(tmp_path: Path, tokenizer_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tokenizer_dir / "chat_template.jinja").write_text(CHATML)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_dir / "tokenizer.json"))
    theirs.chat_template = CHATML
    messages = [{"role": "system", "content": "  Be brief.\n"}, *HELLO]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate.from_dir(tokenizer_dir).render(messages) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "from file"),
        ("chat_template.json", json.dumps({"chat_template": "from file"})),
        ("tokenizer_config.json", json.dumps({"chat_template": "from file"})),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": [{"name": "default", "template": "from file"}]}),
        ),
    ],
)
def test_templates_are_found_where_checkpoints_keep_them(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert ChatTemplate.from_dir(tmp_path).render(HELLO) == "from file"


def test_special_tokens_reach_the_template(tmp_path: Path) -> None:
    config = {
        "chat_template": "{{ bos_token }}{{ eos_token }}",
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.from_dir(tmp_path).render(HELLO) == "<s></s>"


def test_a_checkpoint_without_a_template_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no chat template .*generate\(\)"):
        ChatTemplate.from_dir(tmp_path)
    with pytest.raises(ModelLoadError, match="not valid Jinja"):
        ChatTemplate("{% if %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_is_one_typed_error(source: str) -> None:
    with pytest.raises(RequestError, match="chat template accepts"):
        ChatTemplate(source).render(HELLO)


@pytest.mark.parametrize(
    "messages", [[], "Hello", [{"content": "no role"}], ["Hello"], [{"role": 1, "content": ""}]]
)
def test_bad_messages_are_refused(messages: Any) -> None:
    with pytest.raises(RequestError, match="messages must be"):
        ChatTemplate(CHATML).render(messages)


@pytest.mark.parametrize("name", ["bos_token", "pad_token"])
def test_the_renderers_own_names_cannot_be_replaced(name: str) -> None:
    with pytest.raises(RequestError, match="template_kwargs"):
        ChatTemplate(CHATML).render(HELLO, **{name: "x"})


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ ''['__class__'] }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ lipsum.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ dict.__init__.__globals__ }}",
    "{{ dict.mro() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ self.__init__.__globals__ }}",
    "{{ range.__self__ }}",
    "{{ range.__func__.__globals__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{% set ns = namespace(a=1) %}{% set ns._private = 1 %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ (messages|list).__reduce__() }}",
    "{% include 'x' %}",
    "{% import 'os' as os %}",
    "{{ open('/etc/passwd').read() }}",
    "{{ caller.__globals__ }}",
    "{{ ''|attr('__cla' ~ 'ss__') }}",
    "{{ ''['__cla' + 'ss__'] }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ [''] | map('attr', '__class__') | list }}",
    "{{ messages | selectattr('__class__') | list }}",
    "{{ messages | groupby('__class__') | map(attribute=0) | list }}",
    "{{ messages | sort(attribute='__class__') | map(attribute='__class__') | list }}",
    "{{ messages | join(attribute='__class__') }}",
    "{{ messages | sum(attribute='__class__') }}",
    "{{ messages | map('__class__') | list }}",
    "{{ [dict] | map(attribute='__init__') | list }}",
    "{{ '%(x)s'.__mod__.__self__.__class__ }}",
    "{{ '{0[__class__]}'.format('') }}",
    "{{ '{0.format.__self__.__class__}'.format('') }}",
    "{{ ''.format.__func__ }}",
    "{{ ''.format.__wrapped__.__self__.__class__ }}",
    "{{ ''.join.__self__.__class__ }}",
    "{{ dict.fromkeys.__self__ }}",
    "{{ namespace.__mro__ }}",
    "{{ namespace()._Namespace__attrs }}",
    "{{ range.__globals__ }}",
    "{{ range(3).__class__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ context.environment }}",
    "{{ environment.counted_items.__globals__ }}",
    "{{ counted_items }}{{ resolve }}{{ get_all }}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._environment }}",
    "{% for x in [1] %}{{ loop._iterator.__class__ }}{% endfor %}",
    "{% for x in [1] %}{{ loop._recurse.__globals__ }}{% endfor %}",
    "{% set ns = namespace() %}{% set ns['__class__'] = 1 %}",
    "{{ messages.clear() }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages[0].setdefault('x', 1) }}",
    "{% extends 'x' %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_reach_the_interpreter(source: str) -> None:
    messages = [dict(message) for message in HELLO]
    try:
        text = ChatTemplate(source).render(messages)
    except (RequestError, ModelLoadError):
        text = ""
    assert text in ("", "[]", "[Undefined]", "[Undefined, ]"), text
    assert messages == HELLO


BOMBS = [
    "{% for i in range(100000) %}x{% endfor %}",
    "{% for i in range(10000) %}{% for j in range(10000) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 1000000000 }}",
    "{{ 1000000000 * [0] }}",
    "{{ 10 ** 100000000 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a\na' | indent(1000000000) }}",
    "{{ messages | tojson(indent=1000000000) }}",
    "{% for i in range(9999) %}{{ 'a' * 60000 }}{% endfor %}",
    "{% for a in 'x' * 60000 %}{% for b in 'x' * 60000 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 40 }}{% endfor %}",
    "{% set ns = namespace(s='x' * 60000) %}{% for i in range(30) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='x' * 60000) %}{% for i in range(30) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[0]) %}{% for i in range(40) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}",
    "{% set ns = namespace(s=[0]) %}{% for i in range(40) %}{% set ns.s = (ns.s, ns.s) %}{% endfor %}",
    "{% set ns = namespace(s=[0]) %}{% for i in range(40) %}{% set ns.s = {1: ns.s, 2: ns.s} %}{% endfor %}",
    "{% set ns = namespace(s=[0]) %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[0]) %}{% for i in range(9) %}{% set ns.s = [ns.s] * 1000 %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=[0]) %}{% macro f() %}{% set ns.s = varargs %}{% endmacro %}"
    "{% for i in range(40) %}{{ f(ns.s, ns.s) }}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(n=2) %}{% for i in range(64) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{% macro f() %}{% for i in range(9999) %}{{ messages[0].content * 9000 }}{% endfor %}{% endmacro %}{{ f()[0] }}",
    "{% set s = 'x' * 60000 %}{{ s | replace('x', s) }}",
    "{% set s = 'x' * 60000 %}{{ s.replace('x', s) }}",
    "{% set s = 'x' * 60000 %}{{ s | list | join(s) }}",
    "{% set s = 'x' * 60000 %}{{ s.join(s) }}",
    "{% set s = 'x' * 60000 %}{{ ('%s' * 9000) % ((s,) * 9000) }}",
    "{% set s = 'x' * 60000 %}{{ ('{0}' * 9000).format(s) }}",
    "{% set s = 'x' * 60000 %}{{ ([s] * 60000) | tojson }}",
    "{% set s = 'x' * 60000 %}{{ ([s] * 60000) | string }}",
    "{% set s = 'x' * 60000 %}{{ [s] * 60000 }}",
    "{{ [1] | batch(1000000000, 0) | list }}",
    "{{ [1] | slice(1000000000) | list }}",
    "{{ 1.5 | round(1000000000, 'floor') }}",
    "{{ ([[1]] * 60000) | sum(start=[]) }}",
    "{{ 'x'.encode().zfill(1000000000) }}",
    "{{ (1).to_bytes(1000000000, 'big') }}",
    "{{ 'x' | replace('x', 'xxxxxxxxxxxxxxxx')" + " | replace('x', 'xxxxxxxxxxxxxxxx')" * 9 + " }}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_a_template_cannot_work_without_end(source: str) -> None:
    with pytest.raises(RequestError, match=r"RenderLimitError|SecurityError"):
        ChatTemplate(source).render(HELLO)
