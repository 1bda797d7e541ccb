"""The simulated device: its timing, its tokens, and everything it catches."""

from __future__ import annotations

import asyncio
import re
from itertools import count

import msgspec
import pytest
from support.device_rigs import DEVICE_SLOTS, LAYOUT, SHAPE, VOCAB, sim_device
from support.device_scripts import (
    bind,
    feed,
    fired,
    issue,
    moves,
    prefill,
    run_resident,
    run_staged,
)

from pie_async.device.cost_model import Work
from pie_async.device.happens_before import UnorderedAccess
from pie_async.device.launcher import Launcher
from pie_async.device.sim import SimDevice, SimStream
from pie_async.device.sim_memory import CorruptKv
from pie_async.device.sim_sampler import EndOfSequence, SimSampler
from pie_async.errors import ConfigError, DeviceFault
from pie_async.messages import CopyRun, Row, RunIteration, StageIteration, TableUpdate
from pie_async.runtime.virtual_time import VirtualTimeLoop
from pie_async.sampling_params import SamplingParams

PROMPT = tuple(range(10, 21))  # 11 tokens: two sealed blocks and a tail
STAGING = DEVICE_SLOTS + 4
FAST = 400e9


def started(**options) -> SimDevice:
    device = sim_device(**options)
    device.start(asyncio.get_running_loop())
    return device


async def run(device: SimDevice, command: RunIteration) -> int:
    forward, done = await issue(device, lambda: run_resident(device, command))
    await fired(device, done)
    return forward.sampled[0].token


async def demote(device: SimDevice, device_slots, host_slots) -> None:
    def work():
        device.demote(moves(device_slots, host_slots))
        return device.d2h.record()

    await fired(device, await issue(device, work))


async def with_streamed_blocks(**options) -> SimDevice:
    """Sequence 0 has its prompt's two sealed blocks in host slots 3 and 4."""
    device = started(**options)
    await run(device, prefill(0, PROMPT, (0, 1, 2)))
    await demote(device, (0, 1), (3, 4))
    return device


def streaming(iteration: int = 1, start: int = len(PROMPT)) -> tuple[RunIteration, tuple]:
    """One token for sequence 0, its sealed blocks staged."""
    table = TableUpdate(0, 0, (STAGING, STAGING + 1))
    command = feed(0, start, (5,), tables=(table,), iteration=iteration, is_staged=True)
    return command, (CopyRun(3, STAGING, 2),)


# --- time -------------------------------------------------------------------------------------


async def test_a_closed_device_announces_nothing_more():
    device = sim_device()
    device.start(asyncio.get_running_loop())
    told: list[BaseException | None] = []
    device.launch(lambda: device.demote(moves((0,), (0,))))
    device.notify(device.d2h.record(), told.append)
    device.close()
    await asyncio.sleep(10)
    assert told == []


async def test_an_iteration_takes_what_the_cost_model_says():
    device = started()
    await run(device, prefill(0, PROMPT, (0, 1, 2)))
    assert asyncio.get_running_loop().time() == pytest.approx(
        device.cost.iteration_s(Work(11, 11, 66.0, 1)), abs=1e-9
    )


async def test_copies_take_bytes_over_link_rate_and_streams_overlap():
    device = started(link_bytes_per_s=1e6)

    def work():
        device.demote(moves((0, 1), (0, 1)))
        device.promote(moves((8,), (8,)))
        return device.d2h.record(), device.h2d.record()

    out, back = await issue(device, work)
    assert out.at_s == pytest.approx(2 * LAYOUT.block_bytes / 1e6)
    assert back.at_s == pytest.approx(LAYOUT.block_bytes / 1e6)


@pytest.mark.parametrize(("link_bytes_per_s", "is_hidden"), [(FAST, True), (1e6, False)])
async def test_staging_stalls_compute_exactly_when_the_link_is_too_slow(
    link_bytes_per_s: float, is_hidden: bool
):
    device = await with_streamed_blocks(link_bytes_per_s=link_bytes_per_s)
    command, runs = streaming()

    def work():
        began = device.compute.record()
        return began, run_staged(device, command, runs)[1]

    began, done = await issue(device, work)
    await fired(device, done)
    span = device.span(began, done)
    one_layer_s = 2 * LAYOUT.layer_block_bytes / link_bytes_per_s
    if is_hidden:
        assert span.waited_s == pytest.approx(one_layer_s)  # only the first is not ahead
    else:
        assert span.waited_s + span.busy_s > LAYOUT.num_layers * one_layer_s
        assert span.waited_s > span.busy_s


async def test_idle_time_is_neither_work_nor_waiting():
    device = started()
    began = await issue(device, device.compute.record)
    await asyncio.sleep(3600)
    done = await issue(device, device.compute.record)
    assert done.at_s == pytest.approx(3600)
    assert device.span(began, done).busy_s == device.span(began, done).waited_s == 0


def test_the_same_calls_give_the_same_times_to_the_last_bit():
    async def times() -> list[float]:
        device = await with_streamed_blocks(link_bytes_per_s=3e8)
        events = []

        def work() -> None:
            for i in range(4):
                command, runs = streaming(i + 1)
                device.h2d.wait(device.compute.record())
                events.append(run_staged(device, command, runs)[1])
                device.d2h.wait(events[-1])
                device.demote(moves((1,), (9,)))
                events.append(device.d2h.record())

        await issue(device, work)
        await device.drain()
        return [event.at_s for event in events]

    def once() -> list[float]:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(times())

    assert once() == once()


async def test_spans_across_streams_are_refused():
    device = started()
    first, last = await issue(device, lambda: (device.h2d.record(), device.d2h.record()))
    with pytest.raises(DeviceFault, match="two streams"):
        device.span(first, last)


async def test_a_wait_for_an_event_of_another_device_names_stream_and_event():
    device, other = started(), started()
    foreign = await issue(other, other.h2d.record)
    with pytest.raises(DeviceFault, match=r"compute waits for <event of h2d.*never recorded"):
        await issue(device, lambda: device.compute.wait(foreign))


async def test_tokens_read_before_their_event_are_an_error():
    device = started()
    forward, done = await issue(device, lambda: run_resident(device, prefill(0, PROMPT, (0, 1, 2))))
    with pytest.raises(DeviceFault, match="read before an event"):
        _ = forward.sampled
    await fired(device, done)
    assert len(forward.sampled) == 1


def test_a_layout_of_another_model_is_refused():
    shape = msgspec.structs.replace(SHAPE, num_layers=4)
    with pytest.raises(ConfigError, match="5 layers, the model shape 4"):
        sim_device(shape=shape)


async def test_a_device_that_was_not_started_says_so():
    with pytest.raises(DeviceFault, match=r"before start\(\)"):
        sim_device().launch(lambda: None)


# --- tokens -----------------------------------------------------------------------------------


async def tokens_of(device: SimDevice, sequence: int, *, lane: int, num: int = 12) -> list[int]:
    slots = tuple(range(lane * 8, lane * 8 + 8))
    tokens = [await run(device, prefill(sequence, PROMPT, slots, lane=lane))]
    rest = (feed(sequence, len(PROMPT) + i, (), lane=lane) for i in range(num))
    return tokens + [await run(device, command) for command in rest]


async def test_tokens_depend_on_seed_and_position_only():
    alone = await tokens_of(started(), 3, lane=0)
    busy = started()
    await tokens_of(busy, 8, lane=0)
    assert await tokens_of(busy, 3, lane=2) == alone
    assert await tokens_of(started(), 4, lane=0) != alone  # another seed
    assert await tokens_of(started(seed=1), 3, lane=0) != alone  # another device seed


def many_tokens(binding, num: int, end: EndOfSequence | None = None) -> list[int]:
    """Sampled one after the other."""
    sampler = SimSampler(seed=0, vocab_size=VOCAB, end=end or EndOfSequence())
    sampler.bind(binding)
    starts = range(binding.prompt_len - 1, binding.prompt_len - 1 + num)
    rows = [Row(binding.sequence, binding.lane, start, (1,), True) for start in starts]
    return [sampled.token for sampled in sampler.sample(rows)]


def test_stop_ids_are_never_sampled_and_all_others_are():
    binding = bind(0, lane=0, prompt_len=4, stop_ids=(7, 8, VOCAB - 1))
    tokens = many_tokens(binding, 4000)
    assert set(tokens) == set(range(VOCAB)) - {7, 8, VOCAB - 1}


def test_sampling_ends_even_if_every_id_is_a_stop_id():
    binding = bind(0, lane=0, prompt_len=4, stop_ids=tuple(range(VOCAB)))
    assert len(many_tokens(binding, 3)) == 3


def test_sequences_end_at_the_rate_asked_for_but_not_before_min_tokens():
    sampling = SamplingParams(min_tokens=500, max_tokens=None)
    binding = bind(0, lane=0, prompt_len=4, stop_ids=(7,), sampling=sampling)
    tokens = many_tokens(binding, 4500, EndOfSequence(0.1, (7,)))
    assert 7 not in tokens[:500]
    assert tokens[500:].count(7) == pytest.approx(400, rel=0.2)


async def test_prompt_logprobs_cover_every_position_but_the_first():
    device = started()
    sampling = SamplingParams(prompt_logprobs=2)
    binding = bind(0, lane=0, prompt_len=len(PROMPT), sampling=sampling)
    chunks = ((0, PROMPT[:5]), (5, PROMPT[5:]))
    found = []
    for start, tokens in chunks:
        command = RunIteration(
            iteration=0,
            rows=(Row(0, 0, start, tokens, start > 0),),
            bindings=(binding,) if start == 0 else (),
            tables=(TableUpdate(0, 0, (0, 1, 2)),),
        )
        forward, done = await issue(device, lambda c=command: run_resident(device, c))
        await fired(device, done)
        found += forward.prompt_logprobs
    assert [f.first for f in found] == [1, 5]
    assert [t.token for f in found for t in f.tokens] == list(PROMPT[1:])
    assert all(len(t.top) == 2 for f in found for t in f.tokens)


# --- what it catches --------------------------------------------------------------------------


async def test_a_wrong_slot_is_named_with_what_it_should_and_does_hold():
    device = started()
    await run(device, prefill(0, PROMPT, (0, 1, 2)))
    await run(device, prefill(6, PROMPT[::-1], (4, 5, 6), lane=1))
    wrong = feed(0, len(PROMPT), (5,), tables=(TableUpdate(0, 1, (5,)),), iteration=9)
    expected = re.escape(
        "iteration 9, layer 0, sequence 0, block 1: slot 5 (layer 0 of device slot 5) should "
        "hold 4 tokens of block 1 of sequence 0 in layer 0, but holds 4 tokens of block 1 of "
        "sequence 6 in layer 0"
    )
    with pytest.raises(CorruptKv, match=expected):
        await run(device, wrong)


async def test_a_block_given_away_while_in_use_is_caught():
    device = started()
    await run(device, prefill(0, PROMPT, (0, 1, 2)))
    await run(device, prefill(1, PROMPT[::-1], (8, 1, 9), lane=1))
    with pytest.raises(CorruptKv, match=r"sequence 0, block 1: .* holds 4 tokens of block 1 of"):
        await run(device, feed(0, len(PROMPT), (5,)))


async def test_kv_that_was_never_written_is_caught():
    device = started()
    await run(device, prefill(0, PROMPT, (0, 1, 2)))
    with pytest.raises(CorruptKv, match=r"sequence 0, block 0: .* but holds nothing"):
        await run(device, feed(0, len(PROMPT), (5,), tables=(TableUpdate(0, 0, (20,)),)))
    gap = feed(0, len(PROMPT) + 3, (5,), tables=(TableUpdate(0, 3, (3,)),))
    with pytest.raises(CorruptKv, match=r"starts at position 14, but only .* first 12 tokens"):
        await run(device, gap)


async def test_recomputing_other_tokens_than_before_is_caught():
    device = started()
    await run(device, prefill(0, PROMPT, (0, 1, 2)))
    changed = (*PROMPT[:5], 63, *PROMPT[6:])
    with pytest.raises(CorruptKv, match="fed token 63 at position 5"):
        await run(device, prefill(0, changed, (4, 5, 6)))
    await run(device, prefill(0, PROMPT, (4, 5, 6)))


async def test_streaming_the_tail_block_is_caught():
    device = started()
    with pytest.raises(CorruptKv, match="writes block 2 in staging slot"):
        await run(device, prefill(0, PROMPT, (0, 1, STAGING)))


async def test_shared_prefixes_are_followed_to_whoever_wrote_them():
    device = started()
    await run(device, prefill(0, PROMPT, (0, 1, 2)))
    adopted = RunIteration(
        iteration=1,
        rows=(Row(1, 1, 8, (20, 21, 22), True),),
        bindings=(bind(1, lane=1, prompt_len=11),),
        tables=(TableUpdate(1, 0, (0, 1, 5)),),
    )
    await run(device, adopted)
    await run(device, feed(1, 11, (), lane=1, iteration=2))
    broken = RunIteration(
        iteration=3,
        rows=(Row(2, 2, 8, (20,), True),),
        bindings=(bind(2, lane=2, prompt_len=9),),
        tables=(TableUpdate(2, 0, (1, 0, 6)),),
    )
    with pytest.raises(CorruptKv, match="on a prefix that is not one"):
        await run(device, broken)


def beginning_anew(blocks: tuple[int, ...], iteration: int) -> RunIteration:
    """Sequence 1, on two sealed blocks."""
    return RunIteration(
        iteration=iteration,
        rows=(Row(1, 2, 8, (18, 19, 20), True),),
        bindings=(bind(1, lane=2, prompt_len=11),),
        tables=(TableUpdate(2, 0, blocks),),
    )


async def test_a_sequence_that_begins_anew_may_adopt_more_than_it_ever_had():
    device = started()
    await run(device, prefill(0, PROMPT, (0, 1, 2)))
    await run(device, prefill(1, PROMPT[:5], (4, 5), lane=1, iteration=1))
    await run(device, beginning_anew((0, 1, 6), iteration=2))
    await run(device, feed(1, 11, (), lane=2, iteration=3))


async def test_beginning_anew_on_the_prefix_of_others_is_caught():
    device = started()
    await run(device, prefill(0, (63, *PROMPT[1:]), (0, 1, 2)))
    await run(device, prefill(1, PROMPT[:5], (4, 5), lane=1, iteration=1))
    with pytest.raises(CorruptKv, match="begins anew at position 8 on other tokens"):
        await run(device, beginning_anew((0, 1, 6), iteration=2))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (feed(9, 0, (1,), lane=0), "not bound|bound to sequence 0"),
        (feed(9, 0, (1,), lane=3), "bound to sequence None"),
        (feed(0, 11, (1,), tables=(TableUpdate(0, 7, (1,)),)), "starts at entry 7"),
        (feed(0, 11, (1,) * 8), "needs 5 blocks, but the table of lane 0 has 3"),
        (feed(0, 11, (1,), tables=(TableUpdate(0, 2, (DEVICE_SLOTS,)),)), "no device slot 32"),
    ],
)
async def test_bookkeeping_errors_are_caught(command: RunIteration, message: str):
    device = started()
    await run(device, prefill(0, PROMPT, (0, 1, 2)))
    with pytest.raises(DeviceFault, match=message):
        await run(device, command)


async def test_staging_that_came_too_late_is_caught_by_its_contents_alone():
    device = await with_streamed_blocks(is_order_checked=False)
    command, runs = streaming()
    with pytest.raises(CorruptKv, match=r"holds nothing: 4 tokens of block 0 .* will be there at"):
        await issue(device, lambda: run_staged(device, command, runs, without=("staged",)))


async def test_an_overwritten_staging_buffer_is_caught_by_its_contents_alone():
    device = await with_streamed_blocks(is_order_checked=False, link_bytes_per_s=FAST)
    command, runs = streaming()
    with pytest.raises(CorruptKv, match=r"staging of layer 2 overwrites ring buffer 0"):
        await issue(device, lambda: run_staged(device, command, runs, without=("computed",)))


@pytest.mark.parametrize("link_bytes_per_s", [1e4, FAST, 1e15])
@pytest.mark.parametrize("wait", ["staged", "computed"])
async def test_a_missing_wait_is_caught_even_where_the_timing_fits(
    wait: str, link_bytes_per_s: float
):
    device = await with_streamed_blocks(link_bytes_per_s=link_bytes_per_s)
    command, runs = streaming()
    with pytest.raises(UnorderedAccess, match="no event orders the two"):
        await issue(device, lambda: run_staged(device, command, runs, without=(wait,)))


@pytest.mark.parametrize("is_ordered", [True, False])
async def test_demotion_after_the_write_and_promotion_after_the_demotion_need_events(
    is_ordered: bool,
):
    device = started()

    def write_and_demote() -> None:
        _, written = run_resident(device, prefill(0, PROMPT, (0, 1, 2)))
        if is_ordered:
            device.d2h.wait(written)
        device.demote(moves((0, 1), (3, 4)))

    def promote_and_read() -> None:
        if is_ordered:
            device.h2d.wait(device.d2h.record())
        device.promote(moves((10, 11), (3, 4)))
        if is_ordered:
            device.compute.wait(device.h2d.record())
        table = TableUpdate(0, 0, (10, 11))
        run_resident(device, feed(0, len(PROMPT), (5,), tables=(table,)))

    if is_ordered:
        await issue(device, write_and_demote)
        await issue(device, promote_and_read)
        return
    with pytest.raises(UnorderedAccess, match=r"d2h: demotion .* compute: iteration 0, layer"):
        await issue(device, write_and_demote)
    device = await with_streamed_blocks()
    with pytest.raises(UnorderedAccess, match=r"compute: iteration 1.* h2d: promotion of blocks"):
        await issue(device, promote_and_read)


async def test_a_slot_reused_before_its_last_reader_was_seen_is_caught():
    device = await with_streamed_blocks()

    def read_then_overwrite() -> None:
        run_resident(device, feed(0, len(PROMPT), (5,)))
        device.promote(moves((0,), (3,)))

    with pytest.raises(UnorderedAccess, match=r"promotion of blocks 0 writes .* device slot 0"):
        await issue(device, read_then_overwrite)


# --- the launcher's waits, taken away one by one ----------------------------------------------


SIX_LAYERS = msgspec.structs.replace(LAYOUT, num_layers=6, num_groups=6)
"""A multiple of the ring: otherwise one wait per iteration is implied by the one before it."""


async def launch_three_iterations(*, exchanges: bool = False) -> None:
    """Three staged iterations in flight at once, and a promotion behind them."""
    device = await with_streamed_blocks(
        link_bytes_per_s=3e8,
        layout=SIX_LAYERS,
        shape=msgspec.structs.replace(SHAPE, num_layers=6),
    )
    launcher = Launcher(device, asyncio.get_running_loop(), exchanges=exchanges)
    futures: list[asyncio.Future] = []
    for iteration in range(1, 4):
        command, runs = streaming(iteration)
        futures.append(launcher.run(command))
        futures.append(launcher.stage(StageIteration(iteration=iteration, runs=runs)))
    futures.append(launcher.promote(moves((20,), (runs[0].host_slot,))))
    try:
        for future in futures:
            await future
    finally:
        await device.drain()
        await asyncio.gather(*futures, return_exceptions=True)


async def test_an_iteration_that_awaits_masks_is_sampled_and_passed_only_when_they_come():
    device = await with_streamed_blocks(link_bytes_per_s=3e8)
    launcher = Launcher(device, asyncio.get_running_loop())
    (first, runs), (second, _) = streaming(1), streaming(2)
    first = msgspec.structs.replace(first, awaits_masks=True)
    one = launcher.run(first)
    launcher.sample(first.iteration)  # before its other half is there
    staged = launcher.stage(StageIteration(iteration=1, runs=runs))
    await asyncio.gather(one, staged)

    second = msgspec.structs.replace(second, awaits_masks=True)
    third, _ = streaming(3)
    two, three = launcher.run(second), launcher.run(third)
    for iteration in (2, 3):
        launcher.stage(StageIteration(iteration=iteration, runs=runs))
    await asyncio.sleep(1.0)
    assert not two.done() and not three.done()
    launcher.sample(second.iteration)
    assert (await two).sampled and (await three).sampled
    await device.drain()


@pytest.mark.parametrize("exchanges", [False, True])
async def test_every_single_wait_of_the_launcher_is_needed(
    monkeypatch: pytest.MonkeyPatch, exchanges: bool
):
    real_wait = SimStream.wait
    calls = count()
    monkeypatch.setattr(SimStream, "wait", lambda s, e: (next(calls), real_wait(s, e))[1])
    await launch_three_iterations(exchanges=exchanges)
    num_waits = next(calls)
    groups = SIX_LAYERS.num_groups
    expected = 3 * 2 * groups - SIX_LAYERS.ring_depth
    assert num_waits == expected + (3 * groups + 1 if exchanges else 0)

    for removed in range(num_waits):
        calls = count()
        monkeypatch.setattr(
            SimStream,
            "wait",
            lambda s, e, calls=calls, removed=removed: (
                None if next(calls) == removed else real_wait(s, e)
            ),
        )
        with pytest.raises(UnorderedAccess):
            await launch_three_iterations(exchanges=exchanges)
