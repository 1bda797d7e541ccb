"""What a reader of a request gets, however fast or slow it reads."""

from __future__ import annotations

import asyncio

import pytest

from pie_async.errors import EngineStopped
from pie_async.messages import Advance, FirstToken, PromptLogprobs, SampledToken
from pie_async.outputs import RequestOutput
from pie_async.request_stream import RequestStream
from pie_async.sampling_params import SamplingParams
from tests.support.request_streams import a_stream


def stream_of(*, n: int = 1, cancel=lambda stream: None, **params) -> RequestStream:
    return a_stream(*range(1, n + 1), params=SamplingParams(n=n, **params), cancel=cancel)


def push(stream: RequestStream, text: str, *, sequence: int = 1, reason=None, stop=None) -> bool:
    """Push a token per character; the last one ends the sequence if a reason is given."""
    stopped = False
    for index, char in enumerate(text, start=1):
        last = index == len(text)
        token = SampledToken(sequence, ord(char))
        stopped = stream.push(
            Advance(sequence, token, reason if last else None, stop if last else None)
        )
    stream.tell()
    return stopped


async def read_all(stream: RequestStream) -> list:
    return [output async for output in stream]


# --- kinds of output --------------------------------------------------------------------------


async def test_cumulative_outputs_hold_everything_so_far():
    stream = stream_of()
    push(stream, "ab")
    assert (await anext(stream)).outputs[0].text == "ab"
    push(stream, "c", reason="length")
    output = await anext(stream)
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("abc", (97, 98, 99))
    assert (output.finished, output.outputs[0].finish_reason) == (True, "length")
    assert await read_all(stream) == []


async def test_deltas_add_up_to_the_whole():
    stream = stream_of(output_kind="delta")
    texts, tokens = [], []
    for text, reason in (("ab", None), ("c", None), ("de", "length")):
        push(stream, text, reason=reason)
        output = await anext(stream)
        texts.append(output.outputs[0].text)
        tokens += output.outputs[0].token_ids
    assert texts == ["ab", "c", "de"]
    assert tokens == [ord(c) for c in "abcde"]


async def test_what_later_sequences_find_is_the_first_ones_and_not_saved():
    stream = stream_of(n=2)
    stream.push(Advance(2, SampledToken(2, 97), None, None, FirstToken(64)))
    assert (await anext(stream)).num_cached_tokens == 0
    stream.push(Advance(1, SampledToken(1, 97), None, None, FirstToken(32)))
    assert (await anext(stream)).num_cached_tokens == 32


async def test_an_output_that_has_ended_says_where_its_time_went():
    stream = stream_of(stop=("!",))
    stream.push(Advance(1, SampledToken(1, 97), first=FirstToken(0, 0.5, 0.25)))
    assert (await anext(stream)).outputs[0].times is None
    await asyncio.sleep(2)  # of virtual time
    push(stream, "b!")
    times = (await anext(stream)).outputs[0].times
    assert (times.queued_s, times.prefill_s, times.decode_s) == (0.5, 0.25, 2.0)
    assert times.inference_s == 2.25


async def test_an_output_without_a_token_has_no_times():
    stream = stream_of()
    stream.push(Advance(1, None, "abort"))
    assert (await anext(stream)).outputs[0].times is None


async def test_a_delta_names_only_sequences_with_news():
    stream = stream_of(n=2, output_kind="delta")
    push(stream, "a", sequence=2)
    assert [out.index for out in (await anext(stream)).outputs] == [1]


async def test_a_delta_tells_the_end_of_a_sequence_once():
    stream = stream_of(n=2, output_kind="delta")
    push(stream, "a", sequence=1, reason="length")
    first = await anext(stream)
    assert [(out.index, out.finish_reason) for out in first.outputs] == [(0, "length")]
    push(stream, "b", sequence=2)
    second = await anext(stream)
    assert [(out.index, out.finish_reason) for out in second.outputs] == [(1, None)]
    push(stream, "c", sequence=2, reason="stop")
    third = await anext(stream)
    assert [(out.index, out.finish_reason) for out in third.outputs] == [(1, "stop")]
    assert third.finished


async def test_a_delta_tells_an_end_that_brings_no_text():
    stream = stream_of(output_kind="delta")
    push(stream, "a")
    await anext(stream)
    stream.push(Advance(1, None, "abort"))
    (out,) = (await anext(stream)).outputs
    assert (out.text, out.token_ids, out.finish_reason) == ("", (), "abort")


async def test_a_final_output_comes_once_and_complete():
    stream = stream_of(n=2, output_kind="final")
    reading = asyncio.create_task(read_all(stream))
    push(stream, "ab", sequence=1, reason="length")
    await asyncio.sleep(1)
    assert not reading.done()
    push(stream, "cd", sequence=2, reason="length")
    (output,) = await reading
    assert [out.text for out in output.outputs] == ["ab", "cd"]
    assert output.finished


async def test_a_slow_reader_gets_what_it_missed_in_one_piece():
    stream = stream_of(output_kind="delta")
    push(stream, "hello ")
    push(stream, "world", reason="length")
    (output,) = await read_all(stream)
    assert output.outputs[0].text == "hello world"


async def test_a_reader_waits_without_spinning_until_there_is_news():
    stream = stream_of()
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(3600)
    assert not reading.done()
    push(stream, "a")
    assert (await reading).outputs[0].text == "a"


class Taken:
    """A shortcut that remembers texts and ends."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.seen: list[tuple[str, str | None]] = []
        self._is_open = is_open

    def is_open(self) -> bool:
        return self._is_open

    def send(self, output: RequestOutput) -> None:
        self.seen += [(out.text, out.finish_reason) for out in output.outputs]


async def test_a_shortcut_takes_what_a_reader_waits_for_and_ends_are_left_to_the_reader():
    stream = stream_of(output_kind="delta")
    stream.shortcut = shortcut = Taken()
    push(stream, "a")
    assert shortcut.seen == [], "nobody waits yet"
    assert (await anext(stream)).outputs[0].text == "a"
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(1)
    push(stream, "bc")
    push(stream, "d")
    assert shortcut.seen == [("bc", None), ("d", None)]
    assert not stream.has_waiting_output
    push(stream, "e", reason="length")
    assert shortcut.seen[2:] == []
    output = await reading
    assert (output.outputs[0].text, output.finished) == ("e", True)
    assert await read_all(stream) == []


@pytest.mark.parametrize("params", [{"output_kind": "final"}, {"output_kind": "delta"}])
async def test_a_shortcut_takes_nothing_that_the_reader_would_not_get(params):
    stream = stream_of(n=2, **params)
    stream.shortcut = shortcut = Taken(is_open=params["output_kind"] == "final")
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(1)
    push(stream, "a", sequence=1, reason="length")
    push(stream, "b", sequence=2, reason="length")
    assert [out.text for out in (await reading).outputs] == ["a", "b"]
    assert shortcut.seen == []


# --- ends ----------------------------------------------------------------------------------------


async def test_a_stop_string_is_cut_off_and_named():
    stream = stream_of(stop=("END",))
    assert push(stream, "so EN") is False
    assert push(stream, "D") is True
    (output,) = await read_all(stream)
    out = output.outputs[0]
    assert (out.text, out.finish_reason, out.stop_reason) == ("so ", "stop", "END")
    assert len(out.token_ids) == 6


async def test_text_that_may_begin_a_stop_string_is_held_back():
    stream = stream_of(stop=("END",), output_kind="delta")
    push(stream, "so EN")
    assert (await anext(stream)).outputs[0].text == "so "
    push(stream, "x", reason="length")
    assert (await anext(stream)).outputs[0].text == "ENx"


async def test_text_held_back_is_shown_when_the_output_ends_otherwise():
    stream = stream_of(stop=("END",))
    push(stream, "so EN", reason="length")
    assert (await anext(stream)).outputs[0].text == "so EN"


async def test_a_stop_string_can_be_included():
    stream = stream_of(stop=("END",), include_stop_str_in_output=True)
    push(stream, "so END")
    assert (await anext(stream)).outputs[0].text == "so END"


async def test_the_end_token_is_no_text_but_is_among_the_tokens():
    stream = stream_of()
    push(stream, "ab$", reason="stop")
    out = (await anext(stream)).outputs[0]
    assert (out.text, out.token_ids, out.stop_reason) == ("ab", (97, 98, 36), None)


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "ab$")])
async def test_a_stop_tokens_text_is_shown_only_if_asked_for(include: bool, text: str):
    stream = stream_of(stop_token_ids=(36,), include_stop_str_in_output=include)
    push(stream, "ab$", reason="stop", stop=36)
    out = (await anext(stream)).outputs[0]
    assert (out.text, out.stop_reason) == (text, 36)


async def test_an_incomplete_character_is_shown_as_such_at_the_end():
    stream = stream_of()
    push(stream, "a\0")
    assert (await anext(stream)).outputs[0].text == "a"
    stream.push(Advance(1, None, "length"))
    assert (await anext(stream)).outputs[0].text == "a\N{REPLACEMENT CHARACTER}"


# --- logprobs -----------------------------------------------------------------------------------


def test_without_logprobs_there_are_none():
    stream = stream_of()
    push(stream, "a")
    assert stream._output().outputs[0].logprobs is None


async def test_logprobs_put_the_chosen_token_first_and_keep_its_own_rank():
    stream = stream_of(logprobs=2)
    chosen = SampledToken(1, ord("z"), -3.0, 9, ((ord("a"), -0.1), (ord("b"), -0.2)))
    stream.push(Advance(1, chosen))
    (entry,) = (await anext(stream)).outputs[0].logprobs
    assert [(t, p.rank, p.decoded_token) for t, p in entry.items()] == [
        (ord("z"), 9, "z"),
        (ord("a"), 1, "a"),
        (ord("b"), 2, "b"),
    ]


async def test_a_chosen_token_among_the_likeliest_is_listed_once():
    stream = stream_of(logprobs=2)
    chosen = SampledToken(1, ord("b"), -0.2, 2, ((ord("a"), -0.1), (ord("b"), -0.2)))
    stream.push(Advance(1, chosen))
    (entry,) = (await anext(stream)).outputs[0].logprobs
    assert [(t, p.rank) for t, p in entry.items()] == [(ord("b"), 2), (ord("a"), 1)]


async def test_delta_logprobs_go_with_their_tokens():
    stream = stream_of(logprobs=0, output_kind="delta")
    for text in ("ab", "c"):
        push(stream, text)
        out = (await anext(stream)).outputs[0]
        assert [next(iter(entry)) for entry in out.logprobs] == list(out.token_ids)


async def test_prompt_logprobs_begin_with_none_and_arrive_in_chunks():
    stream = stream_of(prompt_logprobs=0)
    for first, letters in ((1, "bc"), (3, "d"), (3, "x")):
        tokens = tuple(SampledToken(1, ord(c), -1.0, 1) for c in letters)
        stream.push_prompt(PromptLogprobs(1, first, tokens))
    push(stream, "a")
    found = (await anext(stream)).prompt_logprobs
    assert found[0] is None
    assert [next(iter(entry)) for entry in found[1:]] == [ord(c) for c in "bcd"]


# --- cancelling and failing -----------------------------------------------------------------------


async def test_cancelling_asks_once_and_the_stream_ends_with_the_answer():
    asked = []
    stream = stream_of(cancel=asked.append)
    push(stream, "a")
    for _ in range(3):
        stream.cancel()
    assert asked == [stream]
    assert stream.unfinished == (1,)
    stream.push(Advance(1, None, "abort"))
    (output,) = await read_all(stream)
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("a", "abort")


async def test_closing_cancels_and_gives_nothing_more():
    asked = []
    stream = stream_of(cancel=asked.append)
    push(stream, "a")
    await stream.aclose()
    await stream.aclose()
    assert asked == [stream]
    assert await read_all(stream) == []


async def test_what_is_finished_cannot_be_cancelled():
    asked = []
    stream = stream_of(cancel=asked.append)
    push(stream, "a", reason="length")
    stream.cancel()
    await stream.aclose()
    assert asked == []


async def test_only_unfinished_sequences_are_cancelled():
    stream = stream_of(n=3)
    push(stream, "a", sequence=2, reason="length")
    assert stream.unfinished == (1, 3)


async def test_a_failed_stream_raises_once_and_is_over():
    stream = stream_of()
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(1)
    stream.fail(EngineStopped("the engine stopped"))
    with pytest.raises(EngineStopped):
        await reading
    assert await read_all(stream) == []


async def test_a_failure_does_not_take_back_a_complete_output():
    stream = stream_of()
    push(stream, "ab", reason="length")
    stream.fail(EngineStopped("the engine stopped"))
    (output,) = await read_all(stream)
    assert output.outputs[0].text == "ab"


async def test_a_cancelled_wait_loses_nothing():
    stream = stream_of(output_kind="delta")
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(1)
    reading.cancel()
    await asyncio.wait([reading])
    push(stream, "ab")
    assert (await anext(stream)).outputs[0].text == "ab"


async def test_outputs_say_which_request_they_belong_to_and_what_was_found():
    stream = a_stream(1, prompt="hi")
    stream.push(Advance(1, SampledToken(1, 97), None, None, FirstToken(32)))
    output = await anext(stream)
    assert (output.request_id, output.prompt) == ("request", "hi")
    assert (output.prompt_token_ids, output.num_cached_tokens) == ((1, 2), 32)
