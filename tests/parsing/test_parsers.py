"""Thoughts and calls in a model's text, whole and cut anywhere."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pie_async.parsing.events import (
    ArgumentsParser,
    CallArguments,
    CallBegan,
    Content,
    MakeParser,
    PlainParser,
    Reasoning,
    merged,
)
from pie_async.parsing.reasoning import ReasoningParser
from pie_async.parsing.tool_calls import ArrayParser, HermesParser, Llama3Parser, tool_parser


def llama3() -> Llama3Parser:
    return Llama3Parser({"f", "g"})


def thinking_hermes() -> ReasoningParser:
    return ReasoningParser(HermesParser())


def already_thinking() -> ReasoningParser:
    return ReasoningParser(PlainParser(), is_thinking=True)


def forced() -> ArgumentsParser:
    return ArgumentsParser("f")


def call(name: str, arguments: str) -> list[CallBegan | CallArguments]:
    return [CallBegan(name), CallArguments(arguments)]


NESTED = '{"a": "}\\"</tool_call>", "b": [1, {"c": "{"}], "d": "\\\\"}'

CASES = [
    # a parser, a text, what it says
    (PlainParser, "<think> <tool_call>", [Content("<think> <tool_call>")]),
    (forced, '{"a": 1}', call("f", '{"a": 1}')),
    (HermesParser, "Just text.", [Content("Just text.")]),
    (HermesParser, "a < b <tool_cal l> x \n", [Content("a < b <tool_cal l> x \n")]),
    (HermesParser, "ends in a tag <tool_c", [Content("ends in a tag <tool_c")]),
    (
        HermesParser,
        f'Sure.\n<tool_call>\n{{"name": "f", "arguments": {NESTED}}}\n</tool_call>\n',
        [Content("Sure."), *call("f", NESTED)],
    ),
    (
        HermesParser,
        '<tool_call>{"name":"f","arguments":{}}</tool_call>\n'
        '<tool_call>{"arguments": {"x": 1} , "id": 7, "name": "g"}</tool_call> Done.',
        [*call("f", "{}"), *call("g", '{"x": 1}'), Content("Done.")],
    ),
    (HermesParser, '<tool_call>{"name": "f"}</tool_call>', call("f", "{}")),
    (HermesParser, '<tool_call>{"name": "f", "arguments": "text"}', call("f", '"text"')),
    (HermesParser, '<tool_call>{"name": "f", "arguments": {"a": ', call("f", '{"a": ')),
    (HermesParser, "<tool_call>no</tool_call> z", [Content("<tool_call>no</tool_call> z")]),
    (HermesParser, '<tool_call>{"a": 1} z', [Content('<tool_call>{"a": 1} z')]),
    (HermesParser, '<tool_call>{"na', [Content('<tool_call>{"na')]),
    (llama3, '{"name": "f", "parameters": {"a": 1}}', call("f", '{"a": 1}')),
    (llama3, '<|python_tag|>{"name": "f", "parameters": {}}', call("f", "{}")),
    (
        llama3,
        '{"name": "f", "parameters": {"a": 1}}; {"type": "function", "name": "g"}\n',
        [*call("f", '{"a": 1}'), *call("g", "{}")],
    ),
    (
        llama3,
        '{"name": "other", "parameters": {}}',
        [Content('{"name": "other", "parameters": {}}')],
    ),
    (llama3, ' {"answer": {"name": "f"}} !', [Content(' {"answer": {"name": "f"}} !')]),
    (llama3, 'Well: {"name": "f"}', [Content('Well: {"name": "f"}')]),
    (llama3, "<|pyth", [Content("<|pyth")]),
    (llama3, '{"nam', [Content('{"nam')]),
    (
        ArrayParser,
        '[{"name": "f", "arguments": {"a": [1]}},\n {"name": "g", "arguments": {}}]',
        [*call("f", '{"a": [1]}'), *call("g", "{}")],
    ),
    (ArrayParser, '[ {"name":"f","arguments":{"a"', call("f", '{"a"')),
    (
        thinking_hermes,
        '\n<think>\nhm </thin k \n</think>\n\nYes. <tool_call>{"name":"f"}</tool_call>',
        [Reasoning("hm </thin k"), Content("Yes."), *call("f", "{}")],
    ),
    (thinking_hermes, "<think>\n\n</think>\n\nYes <think>", [Content("Yes <think>")]),
    (thinking_hermes, "No <think> here", [Content("No <think> here")]),
    (thinking_hermes, "<thi", [Content("<thi")]),
    (thinking_hermes, "<think>unfinished </th", [Reasoning("unfinished </th")]),
    (already_thinking, "hm\n</think>\n\nok", [Reasoning("hm"), Content("ok")]),
]
IDS = [f"{number}-{make.__name__}" for number, (make, _, _) in enumerate(CASES)]


def parsed(make: MakeParser, *pieces: str) -> list:
    parser = make()
    events = [event for piece in pieces for event in parser.feed(piece)]
    return merged(events + parser.flush())


@pytest.mark.parametrize(("make", "text", "events"), CASES, ids=IDS)
def test_what_it_says(make: MakeParser, text: str, events: list):
    assert parsed(make, text) == events


@pytest.mark.parametrize(("make", "text", "events"), CASES, ids=IDS)
def test_it_says_the_same_cut_at_any_character(make: MakeParser, text: str, events: list):
    for at in range(len(text) + 1):
        assert parsed(make, text[:at], text[at:]) == events, f"cut at {at}"
    assert parsed(make, *text) == events, "one character at a time"


ALPHABET = [
    "<tool_call>",
    "</tool_call>",
    '{"name": "f"',
    '"arguments": {',
    "}",
    ",",
    " ",
    "x",
    '"',
]
ALPHABET += ["<think>", "</think>", "\\", "[", "]", ";", "<|python_tag|>", "\n", ":"]


@given(
    pieces=st.lists(st.sampled_from(ALPHABET), max_size=12),
    cuts=st.lists(st.integers(0, 120), max_size=4),
    make=st.sampled_from([HermesParser, llama3, ArrayParser, thinking_hermes, already_thinking]),
)
def test_any_text_says_the_same_however_it_is_cut(pieces: list, cuts: list, make: MakeParser):
    text = "".join(pieces)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[first:last] for first, last in itertools.pairwise(bounds)]
    assert parsed(make, *parts) == parsed(make, text)


@given(
    arguments=st.dictionaries(
        st.text(max_size=4), st.text(max_size=6) | st.integers() | st.lists(st.none()), max_size=3
    ),
    ascii_only=st.booleans(),
)
def test_arguments_pass_through_unchanged(arguments: dict, ascii_only: bool):
    spelled = json.dumps(arguments, ensure_ascii=ascii_only)
    text = f'{{"name": "f", "arguments": {spelled}}}'
    tagged = f"<tool_call>\n{text}\n</tool_call>"
    assert parsed(HermesParser, *tagged) == call("f", spelled)
    assert parsed(llama3, *text) == call("f", spelled)


def test_arguments_come_while_they_are_written():
    parser = HermesParser()
    parser.feed('<tool_call>{"name": "f", "arguments": ')
    assert parser.feed('{"a"') == [CallArguments('{"a"')]
    assert parser.feed(": 1}") == [CallArguments(": 1}")]


def test_each_format_has_a_parser():
    assert isinstance(tool_parser("hermes", {"f"}), HermesParser)
    assert isinstance(tool_parser("llama3", {"f"}), Llama3Parser)
