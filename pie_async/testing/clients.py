"""Clients that read as planned: slowly, or not to the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TypeVar

from pie_async.engine import Engine
from pie_async.errors import PieError
from pie_async.intake import Prompt
from pie_async.outputs import FinishReason
from pie_async.resilience.engine import ResilientEngine
from pie_async.runtime.faults import Faults, SlowReader, VanishedClient
from pie_async.sampling_params import SamplingParams

T = TypeVar("T")


class Vanished(Exception):
    """The client went away without a word, as planned."""


@dataclass
class Answer:
    """What a client got of one output."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    error: PieError | Vanished | None = None
    """What ended it instead."""


async def disturbed(source: AsyncIterator[T], faults: Faults | None) -> AsyncIterator[T]:
    """The same items, for a client to whom faults happen after some of them.

    Raises:
        Vanished: it is to go away; whoever reads has to leave as such a client would.
    """
    async for item in source:
        yield item
        if faults is None:
            continue
        if (slow := faults.at(SlowReader)) is not None:
            await asyncio.sleep(slow.seconds)
        if faults.at(VanishedClient):
            raise Vanished("the client went away (by a plan of faults)")


async def ask(
    engine: Engine | ResilientEngine,
    prompt: Prompt,
    params: SamplingParams | None = None,
    *,
    faults: Faults | None = None,
) -> list[Answer]:
    """Send a request and read its answer; errors are part of it.

    Args:
        faults: of the client (`SlowReader`, `VanishedClient`).

    Returns: an answer for each of the request's `n` outputs.
    """
    params = params or SamplingParams()
    answers = [Answer() for _ in range(params.n)]
    outputs = engine.generate(prompt, params)
    try:
        async for output in disturbed(outputs, faults):
            for out in output.outputs:
                _take(answers[out.index], out.token_ids, out.text, params)
                answers[out.index].finish_reason = out.finish_reason
    except (PieError, Vanished) as error:
        for answer in answers:
            if answer.finish_reason is None:
                answer.error = error
    finally:
        await outputs.aclose()
    return answers


def _take(answer: Answer, tokens: tuple[int, ...], text: str, params: SamplingParams) -> None:
    if params.output_kind == "delta":
        answer.tokens += tokens
        answer.text += text
    else:
        answer.tokens = list(tokens)
        answer.text = text
