"""The CPU device and the built-in model while copies go wrong: no token is another one."""

from __future__ import annotations

import pytest

from pie_async import LLM, Engine, SamplingParams
from pie_async.errors import EngineStopped
from pie_async.metrics import EngineStats
from pie_async.runtime.faults import (
    CopyCorrupted,
    CopyFailed,
    CopySlow,
    CopyStuck,
    Fault,
    FaultPlan,
    KernelSlow,
    LostContext,
)

pytestmark = pytest.mark.realtime

BLOCK_BYTES = 96 * 1024
"""Of the built-in model in float32: 16 tokens, 6 layers."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
PROMPTS = [
    [10 + (number * 131 + i * 17) % 4000 for i in range(24 + 9 * number)] for number in range(6)
]
TIGHT = {
    "device_kv_bytes": 12 * BLOCK_BYTES,
    "host_pool_bytes": 60 * BLOCK_BYTES,
    "streamed_blocks": 8,
    "cpu_threads": 1,
}

Tokens = list[tuple[int, ...]]


async def outputs(*faults: Fault, **options) -> tuple[Tokens, EngineStats]:
    plan = FaultPlan(faults=faults) if faults else None
    async with Engine(faults=plan, **{**TIGHT, **options}) as engine:
        streams = [await engine.submit(prompt, GREEDY) for prompt in PROMPTS]
        found = []
        for stream in streams:
            async for output in stream:
                last = output
            found.append(last.outputs[0].token_ids)
        await engine.drain()
        stats = engine.stats()
        assert stats.resident_blocks == stats.streamed_blocks == stats.pooled_blocks == 0
        return found, stats


@pytest.fixture(scope="module")
def right() -> Tokens:
    with LLM(device_kv_bytes=400 * BLOCK_BYTES, host_pool_bytes=0, cpu_threads=1) as llm:
        return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY, progress=False)]


@pytest.mark.parametrize("copy", ["stage", "promote", "demote"])
@pytest.mark.parametrize("kind", [CopyFailed, CopyCorrupted])
async def test_a_copy_that_goes_wrong_is_made_again(kind: type[Fault], copy: str, right: Tokens):
    found, stats = await outputs(kind(at=(1,), copies=(copy,)), check_copies=True)
    assert found == right
    assert stats.copy_attempts_failed == 1
    assert stats.copies_lost == stats.sequences_begun_anew == 0


@pytest.mark.parametrize("kind", [CopyFailed, CopyCorrupted])
async def test_readers_of_what_could_not_be_staged_are_computed_again(
    kind: type[Fault], right: Tokens
):
    three_iterations = tuple(range(40, 40 + 3 * 6 * 3))
    found, stats = await outputs(kind(at=three_iterations, copies=("stage",)), check_copies=True)
    assert found == right
    assert stats.sequences_begun_anew >= 1
    assert stats.sequences_lost == 0


async def test_corruption_without_checksums_is_computed_with():
    """Otherwise the tests above would prove little."""

    async def logprobs(*faults: Fault) -> list[float]:
        plan = FaultPlan(faults=faults) if faults else None
        async with Engine(faults=plan, **TIGHT) as engine:
            params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, logprobs=0)
            async for output in engine.generate([40 + i for i in range(200)], params):
                last = output.outputs[0]
            assert engine.stats().copy_attempts_failed == 0
            return [
                entry[token].logprob
                for token, entry in zip(last.token_ids, last.logprobs, strict=True)
            ]

    calm, again = await logprobs(), await logprobs()
    corrupted = await logprobs(CopyCorrupted(at=tuple(range(1, 200)), copies=("demote",)))
    assert again == pytest.approx(calm, abs=1e-4)
    assert corrupted != pytest.approx(calm, abs=1e-4)


async def test_checksums_find_nothing_wrong_where_nothing_is(right: Tokens):
    found, stats = await outputs(check_copies=True, debug=True)
    assert found == right
    assert stats.demotions > 0 < stats.h2d_bytes
    assert stats.copy_attempts_failed == 0


async def test_slow_copies_and_kernels_change_no_token(right: Tokens):
    slow = (CopySlow(probability=0.02, seconds=0.01), KernelSlow(probability=0.02, seconds=0.01))
    found, _ = await outputs(*slow)
    assert found == right


async def test_a_lost_device_ends_every_stream_and_the_engine_closes():
    async with Engine(faults=FaultPlan(faults=(LostContext(at=(4,)),)), **TIGHT) as engine:
        streams = [await engine.submit(prompt, GREEDY) for prompt in PROMPTS]
        for stream in streams:
            with pytest.raises(EngineStopped, match="DeviceFault: the device was lost"):
                async for _ in stream:
                    pass


async def test_an_engine_with_a_stuck_copy_can_be_closed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pie_async.engine.CLOSE_S", 0.2)
    plan = FaultPlan(faults=(CopyStuck(at=(3,), copies=("stage",)),))
    async with Engine(faults=plan, **TIGHT) as engine:
        streams = [await engine.submit(prompt, GREEDY) for prompt in PROMPTS]
        await anext(streams[0])
    assert not engine.is_running
