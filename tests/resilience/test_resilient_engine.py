"""The engine's process killed, frozen and refused, with the built-in model: streams go on."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time

import pytest

from pie_async import Engine, EngineConfig, SamplingParams
from pie_async.errors import ConfigError, EngineStopped, InvalidRequest, ModelError
from pie_async.resilience.engine import ResilientEngine
from pie_async.resilience.errors import RequestGivenUp
from pie_async.resilience.policy import RestartPolicy

pytestmark = pytest.mark.realtime

CONFIG = EngineConfig(cpu_threads=1, device_kv_bytes=40 * 2**20, host_pool_bytes=0)
POLICY = RestartPolicy(most_restarts=50, first_pause_s=0.01, most_deaths_of_request=3)
LONG = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True, output_kind="delta")


def prompt(number: int) -> list[int]:
    return [10 + (number * 131 + i * 17) % 4000 for i in range(20 + 7 * number)]


MIX = [
    SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True),
    SamplingParams(temperature=0.9, max_tokens=100, ignore_eos=True, n=3, seed=5),
    SamplingParams(temperature=0.8, top_p=0.9, max_tokens=110, ignore_eos=True),
    SamplingParams(temperature=0.7, max_tokens=120, seed=9, repetition_penalty=1.3),
    SamplingParams(temperature=0.0, max_tokens=90, min_tokens=80, stop_token_ids=(30, 40, 50)),
    SamplingParams(temperature=1.0, max_tokens=120, seed=3, stop=("the ", "ing")),
    SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, logprobs=2, prompt_logprobs=1),
    SamplingParams(
        temperature=1.0, max_tokens=80, ignore_eos=True, logit_bias={100: 2.0}, top_k=40
    ),
]


class Reader:
    """Reads a stream and counts its outputs."""

    def __init__(self) -> None:
        self.num_outputs = 0
        self.grew = asyncio.Event()

    async def read(self, engine, number: int, params: SamplingParams):
        last = None
        async for output in engine.generate(prompt(number), params):
            self.num_outputs += 1
            self.grew.set()
            last = output
        return last

    async def wait_for(self, num_outputs: int) -> None:
        while self.num_outputs < num_outputs:
            self.grew.clear()
            await self.grew.wait()


def kill(engine: ResilientEngine) -> None:
    assert engine.engine_pid is not None
    os.kill(engine.engine_pid, signal.SIGKILL)


async def until(condition, *, within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - a process has no event
            await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
async def engine():
    async with ResilientEngine(CONFIG, policy=POLICY) as running:
        yield running


def shown(output):
    """What must not depend on deaths; logprobs are compared apart."""
    return [(o.index, o.token_ids, o.text, o.finish_reason, o.stop_reason) for o in output.outputs]


async def test_killed_again_and_again_under_eight_streams_no_token_is_wrong(engine):
    async with Engine(CONFIG) as calm:
        expected = await asyncio.gather(
            *[Reader().read(calm, number, params) for number, params in enumerate(MIX)]
        )
    readers = [Reader() for _ in MIX]
    reading = asyncio.gather(
        *[reader.read(engine, number, MIX[number]) for number, reader in enumerate(readers)]
    )
    dice = random.Random(1)
    for _ in range(3):
        await readers[0].wait_for(readers[0].num_outputs + dice.randint(3, 25))
        await asyncio.sleep(dice.uniform(0.0, 0.02))
        kill(engine)
        await until(lambda: not engine.is_accepting)
        await until(lambda: engine.is_accepting)
    outputs = await reading
    assert [shown(output) for output in outputs] == [shown(output) for output in expected]
    assert engine.restarts == 3
    with_logprobs, undisturbed = outputs[6], expected[6]
    assert len(with_logprobs.prompt_logprobs) == len(prompt(6))
    for got, wanted in zip(
        with_logprobs.outputs[0].logprobs, undisturbed.outputs[0].logprobs, strict=True
    ):
        assert list(got) == list(wanted)
        for token, logprob in wanted.items():
            assert got[token].logprob == pytest.approx(logprob.logprob, abs=1e-4)


async def test_penalties_count_the_same_tokens_after_a_restart(engine):
    params = SamplingParams(
        temperature=0.9, seed=4, max_tokens=60, ignore_eos=True, frequency_penalty=0.8,
        presence_penalty=0.6,
    )  # fmt: skip
    expected = await Reader().read(engine, 1, params)
    reader = Reader()
    reading = asyncio.create_task(reader.read(engine, 1, params))
    await reader.wait_for(20)
    kill(engine)
    assert shown(await reading) == shown(expected)
    assert engine.restarts == 1


async def test_while_it_restarts_new_requests_are_refused_and_cancels_end_at_once(engine):
    stream = await engine.submit(prompt(1), LONG)
    await anext(stream)
    kill(engine)
    await until(lambda: not engine.is_accepting)
    assert engine.is_running
    assert engine.stats().waiting == 1
    with pytest.raises(EngineStopped, match="restarting"):
        await engine.submit(prompt(2))
    stream.cancel()
    assert [output.finished async for output in stream][-1] is True
    await until(lambda: engine.is_accepting)
    assert (await Reader().read(engine, 3, LONG)).finished


async def test_a_request_with_which_the_engine_dies_again_and_again_ends_and_others_do_not(engine):
    huge = [10 + i % 4000 for i in range(engine.model.max_model_len - 50)]
    stream = await engine.submit(huge, SamplingParams(max_tokens=2))
    for _ in range(POLICY.most_deaths_of_request):
        await until(lambda: engine.is_accepting)
        kill(engine)
        await until(lambda: not engine.is_accepting)
    with pytest.raises(RequestGivenUp, match="died 3 times"):
        await anext(stream)
    await until(lambda: engine.is_accepting)
    assert (await Reader().read(engine, 3, LONG)).finished


async def test_a_frozen_engine_is_killed_and_replaced():
    policy = RestartPolicy(silence_s=2.0, first_pause_s=0.01)
    async with ResilientEngine(CONFIG, policy=policy) as engine:
        expected = await Reader().read(engine, 2, MIX[0])
        reader = Reader()
        reading = asyncio.create_task(reader.read(engine, 2, MIX[0]))
        await reader.wait_for(5)
        frozen = engine.engine_pid
        os.kill(frozen, signal.SIGSTOP)
        assert shown(await reading) == shown(expected)
        assert engine.restarts == 1
        assert not is_alive(frozen)


async def test_an_engine_that_dies_too_often_is_given_up_and_every_stream_told():
    policy = RestartPolicy(most_restarts=1, first_pause_s=0.01)
    async with ResilientEngine(CONFIG, policy=policy) as engine:
        stream = await engine.submit(prompt(1), LONG)
        for _ in range(2):
            await until(lambda: engine.is_accepting)
            kill(engine)
            await until(lambda: not engine.is_accepting)
        with pytest.raises(EngineStopped, match="died 2 times"):
            async for _ in stream:
                pass
        assert engine.failure is await engine.failed()
        assert not engine.is_running
        with pytest.raises(EngineStopped, match="died 2 times"):
            await engine.submit(prompt(1))
        with pytest.raises(EngineStopped, match="died 2 times"):
            await engine.drain()


async def test_refusals_at_start_arrive_as_they_were_raised(tmp_path):
    with pytest.raises(ConfigError) as refused:
        await ResilientEngine(CONFIG, device_kv_bytes=1).start()
    with pytest.raises(ConfigError) as expected:
        await Engine(CONFIG, device_kv_bytes=1).start()
    assert (str(refused.value), refused.value.option) == (
        str(expected.value), expected.value.option,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"config\.json"):
        await ResilientEngine(CONFIG, model=str(tmp_path)).start()


async def test_bad_requests_are_refused_before_the_engine_sees_them(engine):
    for bad, params in (
        ([10**6], None),
        ([], None),
        ([1], SamplingParams(logit_bias={10**6: 1.0})),
    ):
        with pytest.raises(InvalidRequest):
            await engine.submit(bad, params)
    stream = await engine.submit(prompt(1), LONG, request_id="same")
    with pytest.raises(InvalidRequest, match="in use"):
        await engine.submit(prompt(1), LONG, request_id="same")
    assert await engine.cancel("same")
    assert not await engine.cancel("same")
    await stream.aclose()


async def test_draining_finishes_what_was_accepted_and_closing_leaves_no_process():
    engine = ResilientEngine(CONFIG, policy=POLICY)
    await engine.start()
    stream = await engine.submit(prompt(1), LONG)
    draining = asyncio.create_task(engine.drain())
    await asyncio.sleep(0)
    with pytest.raises(EngineStopped, match="draining"):
        await engine.submit(prompt(2))
    outputs = [output async for output in stream]
    assert outputs[-1].outputs[0].finish_reason == "length"
    await draining
    pid = engine.engine_pid
    await engine.aclose()
    await engine.aclose()
    assert not is_alive(pid)


async def test_closing_cancels_what_runs_and_a_restart_under_way():
    engine = ResilientEngine(CONFIG, policy=POLICY)
    await engine.start()
    stream = await engine.submit(prompt(1), LONG)
    kill(engine)
    await until(lambda: engine.restarts == 1)
    started_s = time.monotonic()
    await engine.aclose()
    assert time.monotonic() - started_s < 3.0
    outputs = [output async for output in stream]
    assert outputs[-1].outputs[0].finish_reason == "abort"


@pytest.mark.parametrize("after_turns", [0, 1, 2, 3, 5, 8])
async def test_closing_leaves_no_process_that_was_just_being_started(monkeypatch, after_turns: int):
    """A process that is not waited for stays behind, and so does its transport."""
    born: list[asyncio.subprocess.Process] = []
    create = asyncio.create_subprocess_exec

    async def note(*args, **options) -> asyncio.subprocess.Process:
        born.append(await create(*args, **options))
        return born[-1]

    engine = ResilientEngine(CONFIG, policy=POLICY)
    monkeypatch.setattr(asyncio, "create_subprocess_exec", note)
    starting = asyncio.create_task(engine.start())
    for _ in range(after_turns + 1):
        await asyncio.sleep(0)
    starting.cancel()
    await asyncio.wait([starting])
    await engine.aclose()
    assert len(born) == 1
    assert born[0].returncode is not None
    assert not is_alive(born[0].pid)


async def test_the_engines_process_ends_with_the_front():
    code = (
        "import asyncio, os, signal\n"
        "from pie_async.resilience.engine import ResilientEngine\n"
        "async def main():\n"
        "    engine = ResilientEngine(cpu_threads=1)\n"
        "    await engine.start()\n"
        "    print(engine.engine_pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    import sys

    front = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
    )
    pid = int(await front.stdout.readline())
    assert is_alive(pid)
    front.kill()
    await front.wait()
    await until(lambda: not is_alive(pid), within_s=15.0)
