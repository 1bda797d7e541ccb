"""Unfinished requests: what a new engine is told, and which of them is blamed for a death."""

from __future__ import annotations

import asyncio

import pytest

from pie_async.messages import Advance, SampledToken, SequencesAdvanced, Submit
from pie_async.request_stream import RequestStream
from pie_async.resilience.errors import RequestGivenUp
from pie_async.resilience.journal import Journal
from pie_async.resilience.replay import engine_params
from pie_async.sampling_params import SamplingParams
from tests.support.request_streams import a_stream

PROMPT = (1, 2)
LONGEST = 1000


class Desk:
    """A journal with requests numbered by their first sequence."""

    def __init__(self, most_deaths: int = 3) -> None:
        self.finished: list[RequestStream] = []
        self.journal = Journal(most_deaths=most_deaths, on_finished=self.finished.append)

    def open(self, *sequences: int, **params) -> RequestStream:
        sampling = SamplingParams(n=len(sequences), **params)
        stream = a_stream(*sequences, params=sampling)
        first = Submit(
            request=sequences[0],
            sequences=sequences,
            prompt_tokens=PROMPT,
            sampling=engine_params(sampling),
            seed=100,
            max_tokens=sampling.max_tokens,
        )
        self.journal.open(stream, first)
        return stream

    def tell(self, sequence: int, text: str, **end) -> list[int]:
        stopped = []
        for number, char in enumerate(text):
            is_last = number == len(text) - 1
            token = SampledToken(sequence, ord(char))
            advance = Advance(sequence, token, **(end if is_last else {}))
            stopped += self.journal.take(SequencesAdvanced(iteration=1, advances=(advance,)))
        return stopped

    def restart(self, longest: int = LONGEST) -> list[Submit]:
        self.journal.engine_died()
        return list(self.journal.resume(longest))


@pytest.fixture
def desk() -> Desk:
    return Desk()


async def text_of(stream: RequestStream) -> str:
    async for output in stream:
        last = output
    return last.outputs[0].text


def test_a_sequence_goes_on_after_the_output_that_it_has(desk):
    desk.open(7, max_tokens=10, min_tokens=4, logprobs=2, prompt_logprobs=1, presence_penalty=0.5)
    desk.tell(7, "abc")
    (command,) = desk.restart()
    assert command.prompt_tokens == PROMPT
    assert command.output_tokens == tuple(map(ord, "abc"))
    assert command.max_tokens == 10  # the output that it has counts
    assert command.sampling.min_tokens == 4
    assert command.sampling.logprobs == 2
    assert command.sampling.presence_penalty == 0.5
    assert command.sampling.prompt_logprobs is None  # its reader has them


def test_a_second_restart_gives_the_output_of_both_engines(desk):
    desk.open(7, max_tokens=10)
    for text in ("abc", "de"):
        desk.tell(7, text)
        (command,) = desk.restart()
    assert command.prompt_tokens == PROMPT
    assert command.output_tokens == tuple(map(ord, "abcde"))


def test_each_unfinished_sequence_goes_on_with_the_seed_of_its_index(desk):
    desk.open(3, 4, 5)
    desk.tell(3, "ab")
    desk.tell(4, "x", finish_reason="stop")
    commands = desk.restart()
    assert [command.sequences for command in commands] == [(3,), (5,)]
    assert [command.seed for command in commands] == [100, 102]
    assert [len(command.output_tokens) for command in commands] == [2, 0]


async def test_a_stop_string_is_found_across_the_restart_and_the_engine_told(desk):
    stream = desk.open(7, stop="cd", max_tokens=20)
    assert desk.restart()[0].sampling.stop == ()  # the engine knows no text
    desk.tell(7, "abc")
    desk.restart()
    assert desk.tell(7, "d") == [7]
    assert await text_of(stream) == "ab"
    assert desk.finished == [stream]
    assert desk.restart() == []


async def test_a_sequence_that_no_longer_fits_ends_for_length(desk):
    stream = desk.open(7, max_tokens=100)
    desk.tell(7, "abc")
    assert desk.restart(longest=5) == []
    assert await text_of(stream) == "abc"
    desk.open(8, max_tokens=100)
    assert desk.restart(longest=5)[0].max_tokens == 3
    desk.tell(8, "ab")
    assert desk.restart(longest=5)[0].max_tokens == 3  # one more


async def test_a_cancelled_request_is_not_resumed(desk):
    stream = desk.open(7)
    desk.tell(7, "ab")
    desk.journal.engine_died()
    resumed = desk.journal.resume(LONGEST)
    assert desk.journal.close(stream)
    assert list(resumed) == []
    assert await text_of(stream) == "ab"
    assert not desk.journal.close(stream)


def test_a_request_that_came_while_others_are_resumed_is_not_sent_twice(desk):
    desk.open(1)
    desk.journal.engine_died()
    resumed = desk.journal.resume(LONGEST)
    desk.open(2)  # sent by whoever opened it
    assert [command.request for command in resumed] == [1]


async def test_the_request_that_kills_is_found_and_the_others_go_on(desk):
    innocent, killer, other = desk.open(1), desk.open(2), desk.open(3)
    desk.restart()  # nobody gets a token: it could be any of them
    commands = desk.restart()
    tried = []
    while commands:
        (command,) = commands
        assert list(desk.journal.try_next_suspect(LONGEST)) == []  # one at a time
        tried.append(command.request)
        if command.request == 2:
            commands = desk.restart()
        else:
            desk.tell(command.request, "a", finish_reason="length")
            commands = list(desk.journal.try_next_suspect(LONGEST))
    assert tried == [1, 2, 3]
    assert len(desk.journal) == 0
    assert [await text_of(innocent), await text_of(other)] == ["a", "a"]
    with pytest.raises(RequestGivenUp, match="3 times"):
        await text_of(killer)


def test_a_suspect_is_told_of_first_so_that_others_do_not_take_its_life(desk):
    for number in (1, 2, 3):
        desk.open(number, max_tokens=50)
    for _ in range(2):  # lives too short for the last one's turn
        desk.tell(1, "aaa")
        desk.tell(2, "aaa")
        commands = desk.restart()
    assert [command.request for command in commands] == [3, 1, 2]
    for number in (1, 2, 3):
        desk.tell(number, "a")
    assert [command.request for command in desk.restart()] == [1, 2, 3]


def test_of_suspects_the_most_blamed_is_tried_first():
    desk = Desk(most_deaths=6)
    desk.open(1, max_tokens=50)
    desk.open(2, max_tokens=50)
    desk.restart()
    assert [command.request for command in desk.restart()] == [1]
    desk.tell(1, "a")
    assert [command.request for command in desk.journal.try_next_suspect(LONGEST)] == [2]
    assert [command.request for command in desk.restart()] == [2, 1]
    assert [command.request for command in desk.restart()] == [2]  # 1 is one too, by now


def test_a_request_that_gets_on_is_not_blamed(desk):
    stream = desk.open(1, max_tokens=50)
    for _ in range(10):
        desk.tell(1, "a")
        assert len(desk.restart()) == 1
    assert stream not in desk.finished


async def test_news_with_more_behind_them_are_told_together(desk):
    one, other = desk.open(1, output_kind="delta"), desk.open(2, output_kind="delta")
    readers = [asyncio.create_task(anext(stream)) for stream in (one, other)]
    await asyncio.sleep(0)

    def news(*sequences: int) -> SequencesAdvanced:
        advances = [Advance(sequence, SampledToken(sequence, 97)) for sequence in sequences]
        return SequencesAdvanced(iteration=1, advances=tuple(advances))

    desk.journal.take(news(1, 2), has_next=True)
    await asyncio.sleep(0)
    assert not any(reader.done() for reader in readers)
    desk.journal.take(news(1))
    assert [out.text for out in (await readers[0]).outputs] == ["aa"]
    assert not readers[1].done(), "what came last says nothing of it"
    desk.journal.tell()
    assert [out.text for out in (await readers[1]).outputs] == ["a"]


async def test_a_death_withholds_no_news(desk):
    stream = desk.open(1, output_kind="delta")
    reader = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    fact = SequencesAdvanced(iteration=1, advances=(Advance(1, SampledToken(1, 97)),))
    desk.journal.take(fact, has_next=True)
    desk.journal.engine_died()
    assert [out.text for out in (await reader).outputs] == ["a"]
