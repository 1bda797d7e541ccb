"""Seeded random loads for the whole engine on the checked simulated device."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

from pie_async.config import KIB
from pie_async.engine import Engine
from pie_async.errors import PieError
from pie_async.metrics import EngineStats
from pie_async.sampling_params import SamplingParams
from pie_async.structured import StructuredOutputs
from pie_async.testing import check_returned, run_in_virtual_time

GUIDE = StructuredOutputs(regex="([a-f][0-9])*")
"""Of some requests, whose every token then waits for a mask."""
BLOCK_TOKENS = 16
BLOCK_BYTES = 32 * KIB
"""Of the simulated model "tiny"."""
SPARE_BLOCKS = 3
PATIENCE_S = 36_000.0


@dataclass(frozen=True)
class Load:
    """One request: when it comes, what it asks for, when its reader has had enough."""

    at_s: float
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int
    cache_salt: str | None
    leave_after: int | None
    """Cancel once this many tokens have come; None reads to the end."""


@dataclass(frozen=True)
class Scenario:
    """Memories, options and requests, all drawn from one seed."""

    seed: int
    device_blocks: int
    host_blocks: int
    options: dict[str, Any]
    loads: tuple[Load, ...]

    @classmethod
    def of(cls, seed: int) -> Scenario:
        dice = random.Random(seed)
        device_blocks = dice.choice([4, 5, 8, 8, 16, 40])
        host_blocks = dice.choice([0, 0, 3, 8, 40, 200])
        options = {
            "max_running_sequences": dice.choice([1, 2, 8, 64]),
            "token_budget": dice.choice([16, 64, 512]),
            "iterations_in_flight": dice.choice([1, 2]),
            "layer_group": dice.choice([1, 3]),
            "ring_depth": dice.choice([2, 3]),
            "prefix_caching": dice.choice([True, True, True, False]),
            "streamed_blocks": dice.choice([None, None, None, 0, 5, 100_000]),
            "sim_link": dice.choice(["pcie5", "nvlink"]),
        }
        if host_blocks == 0:
            options["streamed_blocks"] = None  # without a pool there is nothing to fix
        longest = (device_blocks + host_blocks - SPARE_BLOCKS) * BLOCK_TOKENS
        families = [tuple(dice.randrange(1000) for _ in range(2000)) for _ in range(2)]
        loads = tuple(
            _load(dice, longest, families, number) for number in range(dice.choice([1, 5, 15]))
        )
        return cls(seed, device_blocks, host_blocks, options, loads)


def _load(dice: random.Random, longest: int, families: list[tuple[int, ...]], number: int) -> Load:
    prompt_len = dice.randrange(1, max(2, min(longest - 1, dice.choice([20, 200, 600]))))
    room = longest - prompt_len
    max_tokens = dice.randrange(1, min(room, dice.choice([5, 60, 200])) + 1)
    prompt = dice.choice(families)[:prompt_len]
    if dice.random() < 0.5:  # begins like others, ends differently
        prompt = (
            *prompt[: prompt_len // 2],
            *(dice.randrange(1000) for _ in prompt[prompt_len // 2 :]),
        )
    return Load(
        at_s=dice.random() * dice.choice([0.0, 0.01, 0.1]),
        prompt=prompt,
        params=SamplingParams(
            max_tokens=max_tokens,
            n=dice.choice([1, 1, 1, 2, 4]),
            seed=number,
            structured_outputs=GUIDE if number % 6 == 5 else None,
            output_kind="delta",
        ),
        priority=dice.choice([0, 0, 1]),
        cache_salt=dice.choice([None, None, "a"]),
        leave_after=dice.choice([None] * 4 + [dice.randrange(1, max_tokens + 1)]),
    )


@dataclass
class Outcome:
    """What came of a scenario."""

    tokens: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """By (request, output index)."""
    stats: EngineStats = field(default_factory=EngineStats)
    story: bytes = b""


class SoakFailed(AssertionError):
    """A scenario ended wrongly; names its seed."""


def run(scenario: Scenario, *, everything_fits: bool = False, with_story: bool = False) -> Outcome:
    """Run a scenario on virtual time, and check what must hold at its end.

    Args:
        everything_fits: give the device all the memory that could be wanted, and share nothing.
        with_story: keep the whole story.

    Raises:
        SoakFailed: tokens are missing, blocks leaked, or it did not end.
    """
    try:
        return run_in_virtual_time(_run(scenario, everything_fits, with_story))
    except (AssertionError, PieError, RuntimeError, TimeoutError) as error:
        raise SoakFailed(
            f"seed {scenario.seed}: {type(error).__name__}: {error}\n"
            f"replay it with: python scripts/soak.py --seeds {scenario.seed}:"
            f"{scenario.seed + 1}\n{scenario.device_blocks} device blocks, "
            f"{scenario.host_blocks} host blocks, {scenario.options}"
        ) from error


async def _run(scenario: Scenario, everything_fits: bool, with_story: bool) -> Outcome:
    device_blocks = 20_000 if everything_fits else scenario.device_blocks
    options = scenario.options | ({"prefix_caching": False} if everything_fits else {})
    outcome = Outcome()
    engine = Engine(
        device="sim",
        model="tiny",
        debug=not everything_fits,
        device_kv_bytes=device_blocks * BLOCK_BYTES,
        host_pool_bytes=scenario.host_blocks * BLOCK_BYTES,
        **options,
    )
    async with engine:
        if with_story:
            assert engine.story is not None
            engine.story.keep_all()
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
            for number, load in enumerate(scenario.loads):
                group.create_task(_read(engine, number, load, outcome))
        async with asyncio.timeout(PATIENCE_S):
            await engine.drain()
        outcome.stats = engine.stats()
        check_returned(engine)
        if engine.story is not None:
            outcome.story = engine.story.to_bytes()
    return outcome


async def _read(engine: Engine, number: int, load: Load, outcome: Outcome) -> None:
    await asyncio.sleep(load.at_s)
    got = [outcome.tokens.setdefault((number, index), []) for index in range(load.params.n)]
    stream = await engine.submit(
        load.prompt, load.params, priority=load.priority, cache_salt=load.cache_salt
    )
    reasons = {}
    async for output in stream:
        for out in output.outputs:
            got[out.index].extend(out.token_ids)
            reasons[out.index] = out.finish_reason
        if load.leave_after is not None and len(got[0]) >= load.leave_after:
            stream.cancel()
    for index, tokens in enumerate(got):
        if load.leave_after is None:
            assert len(tokens) == load.params.max_tokens, f"request {number}.{index}: {len(tokens)}"
            assert reasons[index] == "length"
        else:
            assert reasons[index] in ("length", "abort")


def compare(scenario: Scenario) -> Outcome:
    """Run a scenario, and again with everything resident and nothing shared: the tokens must
    be the same.

    Raises:
        SoakFailed: they are not, or either run failed.
    """
    tight, roomy = run(scenario), run(scenario, everything_fits=True)
    for key, tokens in tight.tokens.items():
        length = min(len(tokens), len(roomy.tokens[key]))
        if tokens[:length] != roomy.tokens[key][:length]:
            raise SoakFailed(f"seed {scenario.seed}: request {key} got other tokens")
    return tight
