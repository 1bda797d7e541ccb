#!/usr/bin/env python3
"""Kill the engine's process at random moments under live streams; no stream may be lost or wrong.

Every request is first answered undisturbed. Then as many streams as asked for are kept alive,
each asking its request again and again, while the engine's process is killed (SIGKILL) after
random lives. Every answer must equal the undisturbed one, token by token and in its text. Exits
with 1 if one does not, or if a stream ends with an error.

    python scripts/chaos_kill.py --kills 100 --streams 32
    python scripts/chaos_kill.py --kills 20 --set 'device="cuda"' --set 'dtype="float32"'

Other batches round otherwise: in bfloat16 answers may differ without any death.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from pie_async import EngineConfig, RequestOutput, SamplingParams
from pie_async.errors import EngineStopped, PieError
from pie_async.resilience.engine import ResilientEngine
from pie_async.resilience.policy import RestartPolicy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.paper.options import setting

POLL_S = 0.002
LONGEST_LIFE_S = 2.0
"""Lives of engines are drawn evenly between none and this."""

KINDS: tuple[dict[str, object], ...] = (
    {"temperature": 0.0, "ignore_eos": True},
    {"temperature": 0.9, "ignore_eos": True, "n": 2},
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2},
    {"temperature": 1.0, "stop": ("the king", "\n\n")},
    {"temperature": 0.0, "min_tokens": 60, "stop_token_ids": (30, 40, 50)},
    {"temperature": 0.7, "ignore_eos": True, "logprobs": 1, "top_k": 50},
    {"temperature": 0.9, "ignore_eos": True, "presence_penalty": 0.5, "max_tokens": 60},
)


@dataclass
class Tally:
    """What happened."""

    answers: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    ready_s: list[float] = field(default_factory=list)
    """From a kill until requests are accepted again."""
    silent_s: list[float] = field(default_factory=list)
    """From a kill until the next output of any stream."""
    last_output_s: float = 0.0


def request(number: int, tokens: int) -> tuple[list[int], SamplingParams]:
    """One of the requests: the same for the same number."""
    dice = random.Random(number)
    prompt = [dice.randrange(10, 4000) for _ in range(dice.randrange(8, 200))]
    kind = {"max_tokens": tokens, "seed": number, **KINDS[number % len(KINDS)]}
    return prompt, SamplingParams(**kind)  # type: ignore[arg-type]


def shown(output: RequestOutput) -> list[object]:
    """What must not depend on deaths."""
    choices = output.outputs
    return [(c.index, c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in choices]


async def answer(engine: ResilientEngine, number: int, tokens: int, tally: Tally) -> list[object]:
    prompt, params = request(number, tokens)
    last = None
    async for output in engine.generate(prompt, params):
        tally.last_output_s = time.monotonic()
        last = output
    assert last is not None
    tally.tokens += sum(len(choice.token_ids) for choice in last.outputs)
    return shown(last)


async def keep_asking(
    engine: ResilientEngine, number: int, tokens: int, expected: list[object], tally: Tally
) -> None:
    while True:
        while not engine.is_accepting:  # noqa: ASYNC110 - as a client that tries again
            await asyncio.sleep(POLL_S)
        try:
            got = await answer(engine, number, tokens, tally)
        except EngineStopped as error:
            if "restarting" not in str(error):  # refused, not lost
                tally.lost.append(f"stream {number}: {error}")
                return
            continue
        except PieError as error:
            tally.lost.append(f"stream {number}: {type(error).__name__}: {error}")
            continue
        tally.answers += 1
        if got != expected:
            tally.wrong.append(f"stream {number}: {got} is not {expected}")


async def kill_again_and_again(
    engine: ResilientEngine, kills: int, dice: random.Random, tally: Tally
) -> None:
    for _ in range(kills):
        await asyncio.sleep(dice.uniform(0.0, LONGEST_LIFE_S))
        pid = engine.engine_pid
        assert pid is not None, "it was given up"
        os.kill(pid, signal.SIGKILL)
        killed_s = time.monotonic()
        while engine.is_accepting:  # noqa: ASYNC110 - its death is noticed
            await asyncio.sleep(POLL_S)
        noticed_s = time.monotonic()
        while not engine.is_accepting:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
        tally.ready_s.append(time.monotonic() - killed_s)
        while tally.last_output_s < noticed_s:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
        tally.silent_s.append(tally.last_output_s - killed_s)


async def run(arguments: argparse.Namespace) -> int:
    fields = {"cpu_threads": 1} | dict(map(setting, arguments.set))
    config = EngineConfig(**fields)
    policy = RestartPolicy(most_restarts=arguments.kills, first_pause_s=0.01, longest_pause_s=0.05)
    tally = Tally()
    numbers = range(arguments.streams)
    async with ResilientEngine(config, policy=policy) as engine:
        expected = await asyncio.gather(
            *[answer(engine, number, arguments.tokens, tally) for number in numbers]
        )
        tally.tokens = 0
        asking = [
            asyncio.create_task(
                keep_asking(engine, number, arguments.tokens, expected[number], tally)
            )
            for number in numbers
        ]
        dice = random.Random(arguments.seed)
        await kill_again_and_again(engine, arguments.kills, dice, tally)
        while tally.answers < arguments.streams:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
    return report(arguments, tally)


def report(arguments: argparse.Namespace, tally: Tally) -> int:
    for mistake in (*tally.wrong[:5], *tally.lost[:20]):
        print(mistake)
    print(
        f"{arguments.kills} kills under {arguments.streams} streams, seed {arguments.seed}: "
        f"{tally.answers} answers of {tally.tokens} tokens, {len(tally.wrong)} wrong, "
        f"{len(tally.lost)} streams lost"
    )
    for what, times in (("ready again", tally.ready_s), ("next output", tally.silent_s)):
        print(
            f"{what} after a kill: median {statistics.median(times):.2f} s, "
            f"longest {max(times):.2f} s"
        )
    return 1 if tally.wrong or tally.lost else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200, help="output tokens of a request")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=JSON", help="any engine option"
    )
    return uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
