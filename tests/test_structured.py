"""Structured output from end to end: on the CPU with the real model, on the simulated device."""

from __future__ import annotations

import asyncio
import itertools
import json
import re

import msgspec
import pytest

from pie_async import Engine, SamplingParams
from pie_async.config import MIB
from pie_async.errors import InvalidRequest
from pie_async.messages import RunIteration
from pie_async.model.guides import TimedGuides
from pie_async.outputs import RequestOutput
from pie_async.resilience.replay import Course
from pie_async.runtime.virtual_time import VirtualTimeLoop
from pie_async.structured import StructuredOutputs

SCHEMA = {
    "type": "object",
    "properties": {"who": {"enum": ["Romeo", "Juliet"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["who", "age"],
    "additionalProperties": False,
}
GUIDES = [
    StructuredOutputs(json=SCHEMA),
    StructuredOutputs(regex="[a-z]{3} [0-9]{4}"),
    StructuredOutputs(choice=["to be", "not to be"]),
    StructuredOutputs(grammar='start: "(" start ")" | "x"'),
]


def fits(guide: StructuredOutputs, text: str) -> bool:
    match guide.kind:
        case "json":
            value = json.loads(text)
            return value["who"] in ("Romeo", "Juliet") and value["age"] <= 99 and len(value) == 2
        case "regex":
            return re.fullmatch(guide.regex or "", text) is not None
        case "choice":
            return text in (guide.choice or ())
        case _:
            depth = text.count("(")
            return text == "(" * depth + "x" + ")" * depth


async def final(engine: Engine, prompt: str, **params) -> RequestOutput:
    chosen = SamplingParams(output_kind="final", **{"max_tokens": 80, **params})
    return [output async for output in engine.generate(prompt, chosen)][-1]


def options(device: str, **more) -> dict:
    return {"device": device, "debug": True, "seed": 3, "prefix_caching": False, **more}


@pytest.mark.realtime
async def test_every_kind_of_guide_is_followed_on_the_cpu_beside_plain_requests():
    async with Engine(**options("cpu"), device_kv_bytes=2 * MIB, cpu_threads=1) as engine:
        plain = final(engine, "ROMEO:\n", seed=1, max_tokens=40)
        guided = [
            final(engine, "ROMEO:\n", structured_outputs=guide, n=2, seed=7, logprobs=2)
            for guide in GUIDES
        ]
        free, *outputs = await asyncio.gather(plain, *guided)
        alone = await final(engine, "ROMEO:\n", seed=1, max_tokens=40)
    assert alone.outputs[0].token_ids == free.outputs[0].token_ids, "the others sample as ever"
    for guide, output in zip(GUIDES, outputs, strict=True):
        for choice in output.outputs:
            if choice.finish_reason == "length":  # the grammar may nest for as long as it likes
                assert guide.kind == "grammar"
                continue
            assert fits(guide, choice.text), choice.text
            assert choice.logprobs is not None and len(choice.logprobs) == len(choice.token_ids)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.kind)
async def test_it_is_followed_on_the_simulated_device(guide: StructuredOutputs):
    async with Engine(**options("sim"), device_kv_bytes=256 * MIB) as engine:
        output = await final(engine, "x", structured_outputs=guide, n=3, max_tokens=400)
    assert all(fits(guide, choice.text) for choice in output.outputs)
    assert {choice.finish_reason for choice in output.outputs} == {"stop"}


ENDLESS = StructuredOutputs(regex="([a-f][0-9])*")


async def test_pressure_changes_nothing():
    """Parked, streamed, computed again: the same tokens, guided or not."""

    async def run(device_kv_bytes: int, host_pool_bytes: int) -> tuple[list[str], int]:
        memory = {"device_kv_bytes": device_kv_bytes, "host_pool_bytes": host_pool_bytes}
        async with Engine(**options("sim"), **memory) as engine:
            outputs = await asyncio.gather(
                *(
                    final(
                        engine, f"prompt {number} " * 9, seed=number, max_tokens=60,
                        structured_outputs=ENDLESS if number % 2 else None,
                    )
                    for number in range(6)
                )
            )  # fmt: skip
            stats = engine.stats()
        preemptions = stats.preemptions_parked + stats.preemptions_recomputed
        return [output.outputs[0].text for output in outputs], preemptions

    roomy, none = await run(1024 * MIB, 0)
    tight, some = await run(60 * MIB, 32 * MIB)
    assert none == 0
    assert some > 0
    assert tight == roomy
    assert all(ENDLESS.regex and re.match("([a-f][0-9])*.?$", text) for text in roomy[1::2])


def test_the_same_seed_gives_the_same_story():
    async def story() -> bytes:
        async with Engine(**options("sim"), device_kv_bytes=256 * MIB) as engine:
            streams = [  # one after the other: each is looked at in a thread first
                await engine.submit("x", SamplingParams(structured_outputs=guide, max_tokens=40))
                for guide in GUIDES
            ]
            for stream in streams:
                assert [output async for output in stream][-1].finished
            assert engine.story is not None
            return engine.story.to_bytes()

    def told() -> bytes:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(story())

    assert told() == told()


async def test_others_are_in_every_iteration_whoever_waits_for_a_slow_mask(monkeypatch):
    """A guide that takes a hundred iterations for each mask costs an unguided sequence nothing."""

    async def iterations(mask_s: float, guide: StructuredOutputs | None) -> float:
        monkeypatch.setattr(TimedGuides.__init__, "__kwdefaults__", {"mask_s": mask_s})
        async with Engine(**options("sim"), device_kv_bytes=256 * MIB) as engine:
            slow = asyncio.ensure_future(
                final(engine, "x", structured_outputs=guide, max_tokens=50)
            )
            await asyncio.sleep(1.02)  # it has its first mask, and waits for the second
            began_s = asyncio.get_running_loop().time()
            await final(engine, "y", max_tokens=50)
            took_s = asyncio.get_running_loop().time() - began_s
            slow.cancel()
        return took_s

    alone = await iterations(50e-6, None)
    beside = await iterations(0.5, ENDLESS)
    assert beside < alone * 1.02


async def test_guided_sequences_alone_take_one_iteration_for_each_token():
    async with Engine(**options("sim"), device_kv_bytes=256 * MIB) as engine:
        await asyncio.gather(
            *(
                final(engine, "x", structured_outputs=ENDLESS, max_tokens=100, seed=number)
                for number in range(6)
            )
        )
        assert engine.story is not None
        ran = [e.message for e in engine.story if isinstance(e.message, RunIteration)]
    assert len(ran) < 110


@pytest.mark.parametrize(("mask_s", "every"), [(50e-6, 1), (3e-3, 3)])
async def test_beside_others_a_guided_sequence_is_in_every_iteration_unless_its_guide_is_slow(
    monkeypatch, mask_s: float, every: int
):
    """Nobody waits for a guide that takes longer than a quarter of an iteration."""
    monkeypatch.setattr(TimedGuides.__init__, "__kwdefaults__", {"mask_s": mask_s})
    async with Engine(**options("sim"), device_kv_bytes=256 * MIB) as engine:
        await asyncio.gather(
            final(engine, "x", structured_outputs=ENDLESS, max_tokens=50),
            final(engine, "y", max_tokens=200),
        )
        assert engine.story is not None
        ran = [e.message for e in engine.story if isinstance(e.message, RunIteration)]
    with_mask = [n for n, each in enumerate(ran) if any(row.mask is not None for row in each.rows)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(with_mask)]
    assert len(with_mask) == 50
    assert sorted(set(gaps)) == [every]


async def test_stop_strings_lengths_and_deltas_work_as_ever():
    async with Engine(**options("sim"), device_kv_bytes=256 * MIB) as engine:
        guide = StructuredOutputs(regex="abc(d|e){9}f")
        cut = await final(engine, "x", structured_outputs=guide, max_tokens=5)
        stopped = await final(engine, "x", structured_outputs=guide, stop=["bc"])
        params = SamplingParams(structured_outputs=guide, max_tokens=99, output_kind="delta")
        deltas = [output async for output in engine.generate("x", params)]
    assert (cut.outputs[0].text[:3], cut.outputs[0].finish_reason) == ("abc", "length")
    assert (stopped.outputs[0].text, stopped.outputs[0].stop_reason) == ("a", "bc")
    assert re.fullmatch(guide.regex or "", "".join(each.outputs[0].text for each in deltas))
    assert deltas[-1].outputs[0].finish_reason == "stop"


async def test_a_bad_guide_is_refused_before_anything_is_queued():
    async with Engine(**options("sim")) as engine:
        with pytest.raises(InvalidRequest, match="unclosed") as refused:
            await engine.submit(
                "x", SamplingParams(structured_outputs=StructuredOutputs(regex="("))
            )
        assert engine.stats().waiting == engine.stats().running == 0
    assert refused.value.param == "structured_outputs.regex"


async def test_it_goes_on_in_another_engine_where_it_was(monkeypatch):
    """What the front tells a new engine after the old one died: the output so far."""
    guide = StructuredOutputs(regex="(ab|ba){40}")
    whole = []
    async with Engine(**options("sim"), device_kv_bytes=256 * MIB) as engine:
        first = await final(engine, "x", structured_outputs=guide, seed=5)
        whole = list(first.outputs[0].token_ids)
        assert engine.story is not None
        submit = next(e.message for e in engine.story if type(e.message).__name__ == "Submit")
    course = Course(submit.sequences[0], 0, whole[:33])
    resumed = course.resume(submit, 1000)
    assert resumed is not None

    class Others(Engine):
        """Sends that command in place of its own."""

        async def submit(self, *args, **options):
            mailbox = self._running_actors().scheduler.mailbox

            async def send(command):
                mailbox.post(msgspec.structs.replace(resumed, sequences=command.sequences))

            monkeypatch.setattr(mailbox, "send", send, raising=False)
            try:
                return await super().submit(*args, **options)
            finally:
                monkeypatch.undo()

    async with Others(**options("sim"), device_kv_bytes=256 * MIB) as engine:
        rest = await final(engine, "x", structured_outputs=guide, seed=5)
    assert whole[:33] + list(rest.outputs[0].token_ids) == whole
