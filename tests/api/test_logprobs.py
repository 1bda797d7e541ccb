"""The two spellings of log-probabilities."""

from __future__ import annotations

import math

from pie_async.openai.logprobs import LEAST_LOGPROB, CompletionLogprobsWriter, chat_logprobs
from pie_async.outputs import Logprob


def spell(token: int) -> str:
    return {0: "<|begin|>"}.get(token, chr(token))


def test_hidden_begin_token_does_not_move_text_offsets() -> None:
    writer = CompletionLogprobsWriter(0, spell)
    first = writer.write([0, 97, 98], [None, *known(97, 98)], "ab")
    second = writer.write([99], known(99), "c")
    assert first.tokens == ["<|begin|>", "a", "b"]
    assert first.text_offset + second.text_offset == [0, 0, 1, 2]


def test_likelier_of_two_tokens_with_the_same_text_is_kept() -> None:
    entry = {1: Logprob(-0.1, 1, "�"), 2: Logprob(-2.0, 2, "�"), 97: Logprob(-3.0, 3, "a")}
    written = CompletionLogprobsWriter(2, spell).write([97], [entry], "a")
    assert written.top_logprobs == [{"�": -0.1, "a": -3.0}]


def test_impossible_tokens_have_a_finite_logprob() -> None:
    entry = {97: Logprob(-math.inf, 9, "a")}
    assert chat_logprobs([97], [entry], 0).content[0].logprob == LEAST_LOGPROB


def test_bytes_of_a_token_inside_a_character_are_unknown() -> None:
    entry = {300: Logprob(-1.0, 1, "�")}
    assert chat_logprobs([300], [entry], 1).content[0].bytes is None


def known(*tokens: int) -> list[dict[int, Logprob]]:
    return [{token: Logprob(-1.0, 1, spell(token))} for token in tokens]
