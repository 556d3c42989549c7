"""Chat templates: the same prompts as transformers, nothing gets out of the sandbox, thoughts and tool calls are found again."""

import dataclasses
import json
import types
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgpu import sandbox
from rgpu.errors import TemplateError
from rgpu.gguf.reader import GGUFFile
from rgpu.template import ChatTemplate, ThinkingSplitter, parse_tool_calls, starts_in_thinking

VECTORS = Path(__file__).parent / "vectors" / "templates"
CASES = json.loads((VECTORS / "conversations.json").read_text(encoding="utf-8"))
OURS = sorted(path.stem for path in VECTORS.glob("*.jinja"))
SHARED = ("Qwen3.5-4B", "Qwen-Qwen3-0.6B", "openai-gpt-oss-120b")
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def clock(monkeypatch):
    """The hour at which tests/vectors/make_templates.py rendered."""
    monkeypatch.setattr(sandbox, "datetime", types.SimpleNamespace(now=lambda: datetime(2026, 3, 4, 5, 6, 7)))


def check_all_cases(path: Path) -> None:
    template = ChatTemplate(path.read_text(encoding="utf-8"), bos="<|endoftext|>", eos="<|im_end|>")
    expected = json.loads((VECTORS / f"expected-{path.stem}.json").read_text(encoding="utf-8"))
    assert expected.keys() == CASES.keys()
    for name, case in CASES.items():
        if isinstance(expected[name], dict):
            with pytest.raises(TemplateError) as caught:
                template.render(**case)
            assert expected[name]["error"] in str(caught.value), name
        else:
            assert template.render(**case) == expected[name], name


@pytest.mark.parametrize("name", SHARED)
def test_real_templates_render_as_in_transformers(shared, clock, name):
    check_all_cases(shared / "data" / "templates" / f"{name}.jinja")


@pytest.mark.parametrize("name", OURS)
def test_our_templates_render_as_in_transformers(clock, name):
    check_all_cases(VECTORS / f"{name}.jinja")


def test_rendering_leaves_the_messages_as_they_were():
    messages = [{"role": "user", "content": "Hi", "name": None}, {"role": "assistant", "content": "a", "reasoning": "b"}]
    before = json.dumps(messages)
    ChatTemplate("{{ messages[1].thinking }}{{ messages[0].name is defined }}").render(messages)
    assert json.dumps(messages) == before


def test_a_template_meets_only_plain_values():
    @dataclasses.dataclass
    class Place:
        city: str

    class Loud(str):
        def shout(self):
            raise AssertionError("called by a template")

    values = {"n": np.int64(7), "flag": np.bool_(False), "place": Place("Basel"), "loud": Loud("a"), "file": Path("x")}
    template = ChatTemplate("{{ n + 1 }} {{ flag }} {{ place.city }} {{ loud }} {{ loud.shout is defined }} {{ file }}")
    assert template.render(USER, **values) == "8 False Basel a False <PosixPath>".replace("PosixPath", type(Path("x")).__name__)


@pytest.mark.parametrize("source", ["{% for x in y %}", "{{ a b }}", "{% nonsense %}", "a\n{% if %}"])
def test_a_syntax_error_is_reported_with_its_line(source):
    with pytest.raises(TemplateError, match=f"chat template, line {source.count(chr(10)) + 1}: "):
        ChatTemplate(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("\n\n{{ nothing.at.all }}", "line 3: 'nothing' is undefined"),
        ("{% macro f() %}\n{{ messages[0].x.y }}{% endmacro %}\n{{ f() }}", "line 2: 'dict object' has no attribute 'x'"),
        ("\n{{ 'a' + 1 }}", "line 2: TypeError: "),
        ("{{ 1 // 0 }}", "line 1: ZeroDivisionError"),
        ("{% include 'other' %}", "line 1: "),
        ("{{ raise_exception('no ' ~ messages[0].role) }}", "refuses this conversation: no user"),
    ],
)
def test_failing_in_a_template_names_the_line(source, message):
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source).render(USER)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ ('' | attr)('__class__') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ namespace.__init__ }}",
        "{{ dict.__class__ }}",
        "{{ self.__init__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ '{x.__class__}'.format_map({'x': ''}) }}",
        "{{ [''] | map(attribute='__class__') | list }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages.clear() }}",
        "{% macro f() %}{% endmacro %}{{ f.__call__.__globals__ }}",
        "{{ range.__self__ }}{{ (range(3)).__reduce__() }}",
        "{{ lipsum() }}",
        "{{ loop }}{{ context.parent }}",
        "{{ environment.filters }}",
        "{% import 'os' as os %}",
    ],
)
def test_the_sandbox_holds(source):
    messages = [dict(USER[0])]
    with pytest.raises(TemplateError):
        ChatTemplate(source).render(messages)
    assert messages == USER


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{% for a in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
        "{% for a in range(999) recursive %}{% if loop.depth < 9 %}{{ loop(range(999)) }}{% endif %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{% set x = f(n-1) ~ f(n-1) %}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 'a' * 10**10 }}",
        "{{ [0] * 10**10 }}",
        "{{ 10**10 * 'a' }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{% set ns = namespace(a='aaaaaaaa') %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
        "{% set ns = namespace(a='aaaaaaaa') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ 'a' | center(10**10) }}",
        "{{ '\n' | indent(10**10, first=true) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ '{:>9999999999}'.format('a') }}",
        "{{ '{:>{}}'.format('a', 9999999999) }}",
        "{{ strftime_now('%9999999999d') }}",
        "{{ [1] | batch(10**10, 0) | list }}",
        "{{ [1] | slice(10**10) | list }}",
        "{{ messages | tojson(indent=10**10) }}",
        "{% set a = 'a' * 2**20 %}{{ a.replace('a', a) }}",
        "{% set a = 'a' * 2**20 %}{{ a | replace('a', a) }}",
        "{% set a = 'a' * 2**20 %}{{ a.join(range(99999)) }}",
        "{% set a = 'a' * 2**20 %}{% for i in range(99999) %}{{ a }}{% endfor %}",
    ],
)
def test_what_does_not_end_is_ended(monkeypatch, source):
    monkeypatch.setattr(sandbox, "MAX_STEPS", 100_000)  # a tenth of the real ones: the same, sooner
    with pytest.raises(TemplateError):
        ChatTemplate(source).render(USER)


def test_ordinary_text_is_not_taken_for_an_attack():
    text = "x" * 100_000 + " %s {} : {x} 1234567 *bold* {:>9}"
    source = "{{ messages[0].content.replace('x', 'yy') ~ messages[0].content + messages[0].content | trim }}"
    source += "{{ 'Name: {}, {:>3}'.format(1, 2) }}{{ '%s: %d%%' % ('a', 7) }}{{ 1000000 * 1000 }}"
    source += "{{ '- ' * 20 }}{{ messages | tojson(indent=4) }}"
    prompt = ChatTemplate(source).render([{"role": "user", "content": text}])
    assert prompt.startswith("yy") and "Name: 1,   2a: 7%1000000000- - " in prompt
    many = [{"role": "user", "content": "Hi"}] * 3000
    assert ChatTemplate("{% for a in messages %}{% for b in messages[:99] %}{% endfor %}{% endfor %}ok").render(many) == "ok"


def test_messages_must_be_dictionaries():
    with pytest.raises(TemplateError, match="message 1 is a str"):
        ChatTemplate("").render([USER[0], "Hi"])


def test_template_of_a_file(shared):
    with GGUFFile(shared / "data" / "tiny" / "models" / "tiny-F32.gguf") as file:
        prompt = ChatTemplate.from_gguf(file).render(USER)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_file_without_a_template_is_told_apart():
    for metadata in ({}, {"tokenizer.chat_template": " "}, {"tokenizer.chat_template": 3}):
        with pytest.raises(TemplateError, match="some.gguf: no chat template .* base model"):
            ChatTemplate.from_gguf(types.SimpleNamespace(path="some.gguf", metadata=metadata))


def test_bos_and_eos_come_from_the_file_where_the_template_writes_them():
    metadata = {
        "tokenizer.chat_template": "{{ bos_token }}|{{ eos_token }}",
        "tokenizer.ggml.tokens": ["a", "<s>", "</s>"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    file = types.SimpleNamespace(path="some.gguf", metadata=metadata)
    assert ChatTemplate.from_gguf(file).render(USER) == "<s>|</s>"


# Thoughts.


def divided(pieces):
    """Neighbouring pieces of a kind as one."""
    joined = []
    for kind, text in pieces:
        if joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + text)
        else:
            joined.append((kind, text))
    return joined


@pytest.mark.parametrize(
    ("inside", "answer", "expected"),
    [
        (True, "Let me see.\n</think>\n\nParis.", [("think", "Let me see.\n"), ("text", "\n\nParis.")]),
        (False, "<think>\nHm\n</think>\n\nParis.", [("think", "\nHm\n"), ("text", "\n\nParis.")]),
        (False, "Paris < Rome, </b> <thin", [("text", "Paris < Rome, </b> <thin")]),
        (True, "cut off</thi", [("think", "cut off</thi")]),
        (True, "a <think> b</think>c<think>d", [("think", "a <think> b"), ("text", "c"), ("think", "d")]),
        (False, "<<think>a<</think>b", [("text", "<"), ("think", "a<"), ("text", "b")]),
        (True, "</think>", []),
    ],
)
@given(data=st.data())
def test_thoughts_are_split_off_wherever_the_stream_is_cut(inside, answer, expected, data):
    splitter, pieces, position = ThinkingSplitter(inside), [], 0
    while position < len(answer):
        step = data.draw(st.integers(1, len(answer) - position))
        pieces += splitter.push(answer[position : position + step])
        position += step
    assert divided(pieces + splitter.flush()) == expected


def test_text_that_is_certain_is_not_held_back():
    splitter = ThinkingSplitter(False)
    assert splitter.push("Hello <b>") == [("text", "Hello <b>")]
    assert splitter.push(" <thi") == [("text", " ")]
    assert splitter.push("s") == [("text", "<this")]


def test_a_prompt_that_opens_a_thought_is_recognised(shared):
    template = ChatTemplate((shared / "data" / "templates" / "Qwen3.5-4B.jinja").read_text())
    asks_about_tags = [{"role": "user", "content": "What does <think> mean?"}]
    assert starts_in_thinking(template.render(asks_about_tags))
    assert not starts_in_thinking(template.render(asks_about_tags, enable_thinking=False))
    assert not starts_in_thinking("<|im_start|>user\nWhat does <think> mean?<|im_end|>\n<|im_start|>assistant\n")


# Tool calls.

WEATHER = {
    "name": "weather",
    "parameters": {
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": ["boolean", "null"]},
            "where": {"type": "object"},
        }
    },
}


def test_calls_in_json_form():
    text = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "</tool_call>", "days": 2}}\n</tool_call>\n'
    text += '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>'
    assert parse_tool_calls(text) == (
        "I look.",
        [{"name": "weather", "arguments": {"city": "</tool_call>", "days": 2}}, {"name": "now", "arguments": {}}],
    )


TAGGED = """Looking.

<tool_call>
<function=weather>
<parameter=city>
12
  of </parameter> them
</parameter>
<parameter=days>
2
</parameter>
<parameter=exact>
True
</parameter>
<parameter=where>
{"lat": [1, 2]}
</parameter>
</function>
</tool_call>"""


def test_calls_in_tagged_form_take_their_types_from_the_schema():
    city, where = "12\n  of </parameter> them", {"lat": [1, 2]}
    content, calls = parse_tool_calls(TAGGED, [{"type": "function", "function": WEATHER}])
    assert content == "Looking."
    assert calls == [{"name": "weather", "arguments": {"city": city, "days": 2, "exact": True, "where": where}}]
    assert parse_tool_calls(TAGGED, [WEATHER])[1] == calls
    assert parse_tool_calls(TAGGED)[1][0]["arguments"] == {"city": city, "days": "2", "exact": "True", "where": where}


def test_a_call_without_arguments_and_without_its_end():
    assert parse_tool_calls("<tool_call>\n<function=now>\n</function>\n")[1] == [{"name": "now", "arguments": {}}]


@pytest.mark.parametrize(
    "text",
    [
        "no call at all",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Bas',
        '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "a", "arguments": [1]}</tool_call>',
        "<tool_call>\n<function=a>\n<parameter=b>\nc\n</function>\n</tool_call>",
        "<tool_call>" + '{"a":' * 50_000,
        "What is <tool_call>?",
    ],
)
def test_what_is_no_call_stays_in_the_answer(text):
    assert parse_tool_calls(text) == (text, [])


@pytest.mark.parametrize("name", ["Qwen3.5-4B", "Qwen-Qwen3-0.6B"])
def test_calls_that_a_template_writes_are_read_back(shared, name):
    template = ChatTemplate((shared / "data" / "templates" / f"{name}.jinja").read_text(encoding="utf-8"))
    calls = [
        {"name": "weather", "arguments": {"city": 'Zürich "HB"\n', "days": 2, "exact": True, "where": {"a": [None]}}},
        {"name": "now", "arguments": {}},
    ]
    message = {"role": "assistant", "content": "Look:", "tool_calls": [{"function": call} for call in calls]}
    prompt = template.render([*USER, message], add_generation_prompt=False)
    answer = prompt.rpartition("</think>")[2].removesuffix("<|im_end|>\n")
    assert parse_tool_calls(answer, [WEATHER]) == ("Look:", calls)
