"""The whole engine on the CUDA device: the tokens are those of the CPU, pooled or not.

Once on a GPU, and once on a driver that stands in for it, so that everything but the driver is
tested everywhere.
"""

from __future__ import annotations

import asyncio
import math
import sys
import types

import pytest
import torch
from support.fake_cuda_driver import FakeDriver

from pie_async import LLM, Engine, SamplingParams
from pie_async.cuda import errors
from pie_async.errors import ConfigError
from pie_async.runtime.faults import CopyCorrupted, FaultPlan
from pie_async.structured import StructuredOutputs

MORE: dict[str, str] = {}
"""What the driver of a test asks for."""
BLOCK_BYTES = 96 * 1024
"""Of the built-in model in float32: 16 tokens, 6 layers."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
DRAWN = SamplingParams(
    temperature=0.9, top_p=0.9, top_k=50, seed=3, max_tokens=30, repetition_penalty=1.1,
    ignore_eos=True, logprobs=2, prompt_logprobs=1,
)  # fmt: skip


def prompt(number: int, length: int) -> list[int]:
    return [10 + (number * 131 + i * 17) % 4000 for i in range(length)]


PROMPTS = [prompt(number, 24 + 9 * number) for number in range(6)]
NEED = sum(math.ceil((len(p) + GREEDY.max_tokens) / 16) for p in PROMPTS)


def options(device_blocks: int = 400, host_blocks: int = 400, **more) -> dict:
    return {
        "device_kv_bytes": device_blocks * BLOCK_BYTES,
        "host_pool_bytes": host_blocks * BLOCK_BYTES,
        "dtype": "float32",
        **MORE,
        **more,
    }


def generate(
    device: str,
    params: SamplingParams | list[SamplingParams] = GREEDY,
    prompts: list[list[int]] = PROMPTS,
    **how,
):
    """Each prompt's output, and the engine's stats."""
    with LLM(device=device, **options(**how)) as llm:
        outputs = llm.generate(prompts, params, progress=False)
        return outputs, llm.stats()


def tokens(outputs) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in outputs]


def same_logprobs(mine, theirs) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert {token: of.rank for token, of in a.items()} == {
            token: of.rank for token, of in b.items()
        }
        for token, of in a.items():
            assert of.logprob == pytest.approx(b[token].logprob, abs=1e-3)


@pytest.fixture(
    params=[
        pytest.param("stand-in", marks=pytest.mark.realtime),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the engines of a test run on."""
    if request.param == "stand-in":
        module = types.ModuleType("pie_async.cuda.driver")
        module.Driver = lambda device: FakeDriver(link_bytes_per_s=2e9, links={1: "nvlink"})
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(errors, "require_cuda", lambda quantization=None: None)
        monkeypatch.setitem(MORE, "kernels", "torch")
        monkeypatch.setitem(MORE, "token_budget", 512)  # which is profiled, here on the CPU
    return request.param


@pytest.fixture(scope="module")
def on_the_cpu() -> list[tuple[int, ...]]:
    outputs, _ = generate("cpu", host_blocks=0, cpu_threads=1)
    return tokens(outputs)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"device_blocks": NEED // 4, "streamed_blocks": 100},
        {
            "device_blocks": NEED // 4,
            "streamed_blocks": 100,
            "debug": True,
            "check_copies": True,
        },
        {"device_blocks": NEED // 4, "streamed_blocks": 100, "layer_group": 2, "ring_depth": 2},
        {"device_blocks": NEED // 4, "streamed_blocks": 0, "debug": True},
    ],
    ids=["resident", "streamed", "streamed-poisoned-checked", "streamed-in-groups", "parked"],
)
def test_the_tokens_are_those_of_the_cpu(driver, on_the_cpu, how: dict) -> None:
    outputs, stats = generate("cuda", **how)
    assert tokens(outputs) == on_the_cpu
    if how.get("streamed_blocks"):
        assert stats.h2d_bytes > 100 * BLOCK_BYTES, "it did not stream"
    assert stats.copy_attempts_failed == stats.copies_lost == 0


CORRUPTED_COPIES = {"stage": tuple(range(40, 43)), "promote": (1,), "demote": (1, 2)}


@pytest.mark.parametrize("kind", CORRUPTED_COPIES)
async def test_copies_that_arrive_corrupted_are_found_by_their_checksums(
    driver, on_the_cpu, kind: str
) -> None:
    plan = FaultPlan(faults=(CopyCorrupted(at=CORRUPTED_COPIES[kind], copies=(kind,)),))
    tight = options(device_blocks=12, streamed_blocks=8, check_copies=True)
    async with Engine(device="cuda", faults=plan, **tight) as engine:
        streams = [await engine.submit(each, GREEDY) for each in PROMPTS]
        found = [[output async for output in stream][-1] for stream in streams]
        await engine.drain()
        stats = engine.stats()
    assert tokens(found) == on_the_cpu
    assert stats.copy_attempts_failed >= 1
    assert stats.sequences_lost == 0
    assert (stats.resident_blocks, stats.pooled_blocks) == (0, 0)
    assert stats.compute_s > 0


def test_a_sequence_four_times_larger_than_the_arena_gives_the_same_tokens(driver) -> None:
    one = [prompt(3, 280)]
    expected, _ = generate("cpu", GREEDY, one, host_blocks=0, cpu_threads=1)
    found, stats = generate("cuda", GREEDY, one, device_blocks=5, host_blocks=30, debug=True)
    assert tokens(found) == tokens(expected)
    assert stats.demotions >= 15


def test_drawn_tokens_and_logprobs_are_reported_as_on_the_cpu(driver) -> None:
    expected, _ = generate("cpu", DRAWN, PROMPTS[:2], cpu_threads=1)
    found, _ = generate("cuda", DRAWN, PROMPTS[:2])
    assert tokens(found) == tokens(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.outputs[0].logprobs and mine.prompt_logprobs
        same_logprobs(mine.outputs[0].logprobs, theirs.outputs[0].logprobs)
        same_logprobs(mine.prompt_logprobs[1:], theirs.prompt_logprobs[1:])


@pytest.mark.parametrize(
    "more", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 4, "logprobs": 1}]
)
def test_guided_tokens_are_those_of_the_cpu(driver, more: dict) -> None:
    guide = StructuredOutputs(regex="([A-Z][a-z]{3,8} ){4,12}[.]")
    params = SamplingParams(structured_outputs=guide, max_tokens=20, **more)
    expected, _ = generate("cpu", params, PROMPTS[:3], cpu_threads=1)
    found, _ = generate("cuda", params, PROMPTS[:3])
    assert tokens(found) == tokens(expected)


def test_guided_tokens_are_right_while_graphs_are_captured(driver) -> None:
    """As sequences end, iterations have sizes that nothing was captured for."""
    guide = StructuredOutputs(regex="([A-Z][a-z]{3,8} ){40}[.]")
    prompts = [prompt(number, 20 + number) for number in range(32)]
    params = [
        SamplingParams(
            structured_outputs=guide if number % 2 else None,
            temperature=0.8,
            seed=number,
            max_tokens=6 + number,
            ignore_eos=True,
        )
        for number in range(32)
    ]
    expected, _ = generate("cpu", params, prompts, cpu_threads=1)
    found, _ = generate("cuda", params, prompts)
    assert tokens(found) == tokens(expected)


@pytest.mark.realtime
async def test_engines_come_and_go_in_one_process(driver) -> None:
    for _ in range(2):
        async with Engine(device="cuda", **options()) as engine:
            async for output in engine.generate(PROMPTS[0], GREEDY):
                last = output
        assert len(last.outputs[0].token_ids) == GREEDY.max_tokens


@pytest.mark.realtime
async def test_auto_computes_in_the_models_own_dtype(driver) -> None:
    async with Engine(device="cuda", **options(dtype="auto")) as engine:
        assert engine.model.dtype == "bfloat16"
        async for output in engine.generate(PROMPTS[0], GREEDY):
            last = output
    assert len(last.outputs[0].token_ids) == GREEDY.max_tokens


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")


@pytest.mark.parametrize(
    "driver",
    [
        pytest.param("stand-in", marks=pytest.mark.realtime),
        pytest.param("gpu", marks=[pytest.mark.gpu, TWO_GPUS]),
    ],
    indirect=True,
)
@pytest.mark.parametrize("streamed_blocks", [100, 0, None], ids=["streamed", "parked", "governed"])
def test_a_pool_in_another_gpu_gives_the_tokens_of_the_cpu(
    driver, on_the_cpu, streamed_blocks: int | None
) -> None:
    outputs, stats = generate(
        "cuda", device_blocks=NEED // 4, streamed_blocks=streamed_blocks, pool="peer:1"
    )
    assert tokens(outputs) == on_the_cpu
    assert stats.d2h_bytes > 0, "nothing went to the pool"
    assert stats.h2d_busy_s > 0, "the governor learns the link's rate from it"


@pytest.mark.parametrize(
    "driver", [pytest.param("stand-in", marks=pytest.mark.realtime)], indirect=True
)
@pytest.mark.parametrize(
    ("how", "option", "says"),
    [
        ({"pool": "peer:9"}, "pool", "there is no GPU 9: .* possible here: host, peer:1"),
        ({"pool": "peer:0"}, "pool", "GPU 0 is the one that computes"),
        ({"pool": "peer:1", "host_blocks": 10**6}, "host_pool_bytes", r"1\.0 GiB are free"),
    ],
    ids=["absent", "its own", "too small"],
)
def test_a_peer_that_cannot_hold_the_pool_is_refused_before_loading(
    driver, monkeypatch, how: dict, option: str, says: str
) -> None:
    from pie_async.assembly import on_cuda

    monkeypatch.setattr(on_cuda, "load", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=says) as refused:
        generate("cuda", **how)
    assert refused.value.option == option


@pytest.mark.gpu
@pytest.mark.parametrize(
    "how",
    [
        {"cuda_graphs": False},
        {"kernels": "torch"},
        {"prefix_caching": False},
        {"token_budget": 16},
        {"token_budget": 512},
        {"token_budget": 8192},
        {"iterations_in_flight": 1},
    ],
    ids=str,
)
def test_the_tokens_do_not_depend_on_how_they_are_computed(on_the_cpu, how: dict) -> None:
    outputs, _ = generate("cuda", **how)
    assert tokens(outputs) == on_the_cpu


@pytest.mark.gpu
async def test_the_memory_taken_stays_below_the_cap() -> None:
    """By the driver's own count, with the arena as large as the cap allows."""
    cap = 12 * 2**30
    async with Engine(device="cuda", gpu_memory=cap, host_pool_bytes=2**30) as engine:
        async for _ in engine.generate(PROMPTS[0], GREEDY):
            pass
        memory = engine.gpu_memory()
    assert memory is not None and memory.used_bytes <= cap
    assert memory.arena_bytes > 9 * 2**30
    assert memory.weight_bytes > 0 and memory.free_bytes >= 0


@pytest.mark.gpu
async def test_the_memory_taken_stays_below_the_cap_whatever_is_asked_for() -> None:
    """Every part of sampling for every lane, beside prompts that fill the iterations."""
    cap = 6 * 2**30
    wide = SamplingParams(
        n=4, temperature=0.9, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.1,
        presence_penalty=0.1, logit_bias={7: 1.0}, min_tokens=2, logprobs=20, prompt_logprobs=20,
        max_tokens=24, ignore_eos=True,
    )  # fmt: skip

    async with Engine(device="cuda", gpu_memory=cap, host_pool_bytes=2**30) as engine:

        async def run(number: int) -> int:
            async for output in engine.generate(prompt(number, 200 + number), wide):
                last = output
            return sum(len(each.token_ids) for each in last.outputs)

        counts = await asyncio.gather(*(run(number) for number in range(64)))
        memory = engine.gpu_memory()
    assert counts == [4 * 24] * 64
    assert memory is not None and memory.used_bytes <= cap
