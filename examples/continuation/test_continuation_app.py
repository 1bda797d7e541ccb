"""The application while things go wrong: written with `pie_async.testing`, see docs/testing.md."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from continuation_app import create_app

from pie_async import Engine, SamplingParams
from pie_async.testing import (
    ActorRaises,
    CopyCorrupted,
    CopyFailed,
    CopySlow,
    FaultPlan,
    Faults,
    KernelSlow,
    MailDelayed,
    PinningRefused,
    SlowReader,
    Vanished,
    VanishedClient,
    disturbed,
    expected_tokens,
    simulated_engine,
)

pytestmark = [pytest.mark.asyncio, pytest.mark.virtual_time]

FEW = {"device_blocks": 12, "host_blocks": 60, "streamed_blocks": 6}
"""Memory for about three of the requests below at once."""


class Client:
    """What a user of the application does."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http

    async def health(self) -> tuple[int, dict[str, Any]]:
        async with self._http.get("/health") as reply:
            return reply.status, await reply.json()

    async def continue_text(
        self, body: object, *, faults: Faults | None = None
    ) -> tuple[int, list[dict[str, Any]]]:
        """Status and lines of the reply; a client that vanishes has those up to then."""
        lines: list[dict[str, Any]] = []
        async with self._http.post("/continue", json=body) as reply:
            try:
                async for line in disturbed(reply.content, faults):
                    lines += [json.loads(line)]
            except Vanished:
                reply.close()
            return reply.status, lines


@asynccontextmanager
async def serving(engine: Engine) -> AsyncIterator[Client]:
    """The application on a socket, and a client."""
    runner = web.AppRunner(create_app(engine), handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
            yield Client(http)
    finally:
        await runner.cleanup()


def asked(number: int) -> dict[str, Any]:
    """A request of its own length and seed."""
    return {"text": f"{number}" * (30 + 11 * number), "tokens": 40 + 9 * number, "seed": number}


def expected(engine: Engine, body: dict[str, Any]) -> str:
    """The text that the simulated device makes of a request, whatever happens meanwhile."""
    tokenizer = engine.tokenizer
    params = SamplingParams(max_tokens=body["tokens"], seed=body["seed"])
    tokens = expected_tokens(engine, len(tokenizer.encode(body["text"])), params)
    return tokenizer.decode(tokens)


def text_of(lines: list[dict[str, Any]]) -> str:
    return "".join(line.get("text", "") for line in lines)


async def test_a_text_is_continued_line_by_line(sim_engine: Engine):
    async with serving(sim_engine) as client:
        status, lines = await client.continue_text(asked(1))
        assert (status, lines[-1]) == (200, {"end": "length"})
        assert text_of(lines) == expected(sim_engine, asked(1))
        assert await client.health() == (200, {"is_running": True, "requests": 0})


@pytest.mark.parametrize("body", [None, [], {}, {"text": 1}, {"text": "a", "tokens": 10_000}])
async def test_what_is_no_request_is_refused_and_harms_nobody(sim_engine: Engine, body: object):
    async with serving(sim_engine) as client:
        status, (line,) = await client.continue_text(body)
        assert status == 400
        assert "error" in line
        assert (await client.continue_text(asked(1)))[0] == 200


@pytest.mark.parametrize(
    "fault",
    [
        CopyFailed(probability=0.05, seed=1),
        CopyCorrupted(probability=0.05, seed=2),
        CopySlow(probability=0.1, seconds=0.05),
        KernelSlow(probability=0.1, seconds=0.05),
        MailDelayed(probability=0.1, seconds=0.05),
        PinningRefused(at=(1,), share=0.5),
    ],
    ids=lambda fault: fault.point,
)
async def test_no_text_is_another_one_because_a_part_of_the_engine_fails(fault: Any):
    async with simulated_engine(faults=[fault], check_copies=True, **FEW) as engine:
        async with serving(engine) as client:
            await asyncio.sleep(1.0)  # whatever memory is refused has been by then
            bodies = [asked(number) for number in range(8)]
            answers = await asyncio.gather(*map(client.continue_text, bodies))
            for body, (status, lines) in zip(bodies, answers, strict=True):
                assert (status, lines[-1]) == (200, {"end": "length"})
                assert text_of(lines) == expected(engine, body)
        assert engine.faults is not None
        assert engine.faults.bites[fault.point] > 0


async def test_clients_that_stall_or_vanish_leave_nothing_behind():
    plan = (SlowReader(probability=0.2, seconds=5.0), VanishedClient(probability=0.1, seed=3))
    faults = Faults(FaultPlan(faults=plan))
    async with simulated_engine(**FEW) as engine:
        async with serving(engine) as client:
            bodies = [asked(number % 8) for number in range(24)]
            answers = await asyncio.gather(
                *[client.continue_text(body, faults=faults) for body in bodies]
            )
        for body, (status, lines) in zip(bodies, answers, strict=True):
            assert status == 200
            assert expected(engine, body).startswith(text_of(lines))
        assert faults.bites["vanished_client"] > 0
        # `simulated_engine` checks that every block, lane and stream is back


async def test_when_the_engine_stops_clients_are_told_and_the_next_ones_are_refused():
    plan = [ActorRaises(at=(40,), actors=("scheduler",))]
    async with (
        simulated_engine(faults=plan, may_stop=True, **FEW) as engine,
        serving(engine) as client,
    ):
        answers = await asyncio.gather(*[client.continue_text(asked(n)) for n in range(6)])
        for number, (status, lines) in enumerate(answers):
            assert status == 200
            assert "the scheduler actor failed" in lines[-1]["error"]
            assert expected(engine, asked(number)).startswith(text_of(lines))
        assert (await client.health())[0] == 503
        status, (line,) = await client.continue_text(asked(1))
        assert status == 503
        assert "the scheduler actor failed" in line["error"]


async def test_more_requests_than_are_queued_are_told_to_come_later():
    async with (
        simulated_engine(max_queued_requests=2, **FEW) as engine,
        serving(engine) as client,
    ):
        answers = await asyncio.gather(*[client.continue_text(asked(n)) for n in range(6)])
        assert sorted(status for status, _ in answers) == [200, 200, 429, 429, 429, 429]


@pytest.mark.parametrize("seed", range(5))
async def test_a_bad_day(seed: int):
    """Everything at once, drawn from a seed."""
    dice = random.Random(seed)
    kinds = [CopyFailed, CopyCorrupted]
    plan = [kind(probability=dice.uniform(0.01, 0.1), seed=seed) for kind in kinds]
    plan += [
        kind(probability=dice.uniform(0.01, 0.1), seed=seed, seconds=dice.uniform(0.0, 0.05))
        for kind in (CopySlow, KernelSlow, MailDelayed)
    ]
    leaving = Faults(FaultPlan(faults=(VanishedClient(probability=0.05, seed=seed),)))
    async with (
        simulated_engine(faults=plan, check_copies=True, seed=seed, **FEW) as engine,
        serving(engine) as client,
    ):
        bodies = [asked(number) for number in range(8)]
        answers = await asyncio.gather(
            *[client.continue_text(body, faults=leaving) for body in bodies]
        )
        for body, (status, lines) in zip(bodies, answers, strict=True):
            assert status == 200
            assert expected(engine, body).startswith(text_of(lines))
            if "error" in lines[-1]:
                assert "lost 4 times in copies" in lines[-1]["error"]
