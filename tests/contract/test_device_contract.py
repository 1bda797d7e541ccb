"""What every device promises, whatever it is made of."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import msgspec
import pytest
from support.cpu_rig import cpu_rig
from support.cuda_rig import cuda_rig, fake_cuda_rig
from support.device_rigs import SLOW_LINK_BYTES_PER_S, VOCAB, Rig, sim_rig
from support.device_scripts import (
    feed,
    fired,
    issue,
    moves,
    prefill,
    run_resident,
    run_staged,
)

from pie_async.device.faulty import FaultyDevice
from pie_async.device.launcher import Launcher
from pie_async.device.protocol import Device, Event, Pass
from pie_async.errors import DeviceFault
from pie_async.messages import CopyRun, SampledToken, TableUpdate
from pie_async.runtime.faults import FaultPlan, Faults

PROMPT = tuple(range(10, 21))  # 11 tokens: two sealed blocks and a tail
OTHER = tuple(range(30, 41))


async def sampled(device: Device, ran: tuple[Pass, Event]) -> SampledToken:
    forward, done = ran
    await fired(device, done)
    (token,) = forward.sampled
    return token


async def ran(device: Device, command) -> SampledToken:
    return await sampled(device, await issue(device, lambda: run_resident(device, command)))


async def copied(
    device: Device, way: str, slots: tuple[int, ...], host_slots: tuple[int, ...]
) -> tuple[int, tuple[int, ...]]:
    """Promote or demote; failed attempts, and host slots that had no good one."""
    stream = device.h2d if way == "promote" else device.d2h

    def copy() -> tuple[Event, Event]:
        began = stream.record()
        getattr(device, way)(moves(slots, host_slots))
        return began, stream.record()

    began, done = await issue(device, copy)
    await fired(device, done)
    span = device.span(began, done)
    return span.failed_attempts, span.damaged


async def demoted(device: Device, slots: tuple[int, ...], host_slots: tuple[int, ...]) -> None:
    def demote() -> Event:
        device.demote(moves(slots, host_slots))
        return device.d2h.record()

    await fired(device, await issue(device, demote))


def in_staging(device: Device, count: int) -> tuple[TableUpdate, tuple[CopyRun, ...]]:
    """Lane 0's first `count` blocks are host slots 3, 4, ..., staged one after the other."""
    first = device.memory.first_staging_slot
    return TableUpdate(0, 0, tuple(range(first, first + count))), (CopyRun(3, first, count),)


async def resized(device: Device, *sizes: int) -> None:
    """Make the host pool so large, one size after the other."""
    if not device.memory.chunk_slots:
        pytest.skip("this pool keeps its memory")
    told: asyncio.Queue[int] = asyncio.Queue()
    device.watch_pool(lambda slots, _: told.put_nowait(slots))
    for slots in sizes:
        device.resize_pool(slots)
        while await asyncio.wait_for(told.get(), 10) != slots:
            pass


class DeviceContract:
    """The promises; a subclass says which device."""

    def build(self, tmp_path) -> Rig:
        raise NotImplementedError

    @pytest.fixture
    async def rig(self, tmp_path):
        rig = self.build(tmp_path)
        rig.device.start(asyncio.get_running_loop())
        yield rig
        await rig.device.drain()
        rig.device.close()

    @pytest.fixture
    def device(self, rig: Rig) -> Device:
        return rig.device

    async def test_events_of_a_stream_fire_in_the_order_of_their_recording(self, device: Device):
        def work() -> list[Event]:
            events = []
            for sequence in range(3):
                device.demote(moves((sequence,), (sequence,)))
                events.append(device.d2h.record())
            return events

        order: list[int] = []
        events = await issue(device, work)
        for number in (2, 0, 1):
            device.notify(events[number], lambda _, number=number: order.append(number))
        await device.drain()
        await asyncio.sleep(0)
        assert order == [0, 1, 2]

    async def test_an_event_fires_after_the_work_before_it(self, device: Device):
        token = await ran(device, prefill(0, PROMPT, (0, 1, 2)))
        assert token.sequence == 0
        assert 0 <= token.token < VOCAB

    async def test_a_wait_orders_work_after_another_streams_event(self, device: Device):
        order: list[str] = []

        def work() -> None:
            device.demote(moves(range(8), range(8)))
            copied = device.d2h.record()
            device.notify(copied, lambda _: order.append("copied"))
            device.compute.wait(copied)
            _, computed = run_resident(device, prefill(0, PROMPT, (0, 1, 2)))
            device.notify(computed, lambda _: order.append("computed"))

        await issue(device, work)
        await device.drain()
        await asyncio.sleep(0)
        assert order == ["copied", "computed"]

    async def test_while_masks_are_waited_for_nothing_is_computed(self, device: Device):
        await ran(device, prefill(0, PROMPT, (0, 1, 2)))  # whatever had to be compiled
        launcher = Launcher(device, asyncio.get_running_loop())
        command = msgspec.structs.replace(prefill(1, OTHER, (3, 4, 5), lane=1), awaits_masks=True)
        waiting = launcher.run(command)
        await asyncio.sleep(0.2)
        assert not waiting.done()
        launcher.sample(command.iteration)
        result = await waiting
        assert len(result.sampled) == 1
        assert result.compute_s < 0.1 < result.mask_wait_s
        assert result.stall_s == 0
        at_once = await launcher.run(msgspec.structs.replace(command, awaits_masks=False))
        assert at_once.mask_wait_s == 0

    async def test_promote_brings_back_what_demote_took(self, rig: Rig):
        device = rig.device
        await ran(device, prefill(0, PROMPT, (0, 1, 2)))
        before = [rig.contents(slot) for slot in (0, 1, 2)]
        await demoted(device, (0, 1, 2), (7, 3, 5))
        await ran(device, prefill(1, OTHER, (0, 1, 2), lane=1))
        assert [rig.contents(slot) for slot in (0, 1, 2)] != before

        def promote() -> Event:
            device.promote(moves((20, 9, 21), (7, 3, 5)))
            return device.h2d.record()

        await fired(device, await issue(device, promote))
        assert [rig.contents(slot) for slot in (20, 9, 21)] == before

    async def test_staged_blocks_give_the_same_token_as_resident_ones(self, device: Device):
        await ran(device, prefill(0, PROMPT, (0, 1, 2)))
        await demoted(device, (0, 1), (3, 4))
        resident = await ran(device, feed(0, len(PROMPT), (5,)))
        await ran(device, prefill(1, OTHER, (0, 1, 4), lane=1))  # the old copies are gone
        table, runs = in_staging(device, 2)
        again = feed(0, len(PROMPT), (5,), tables=(table,), is_staged=True)
        staged = await issue(device, lambda: run_staged(device, again, runs))
        assert await sampled(device, staged) == resident

    async def test_what_was_staged_is_written_back_to_where_it_came_from(self, device: Device):
        await ran(device, prefill(0, PROMPT, (0, 1, 2)))
        await demoted(device, (0, 1), (3, 4))
        resident = await ran(device, feed(0, len(PROMPT), (5,)))
        table, runs = in_staging(device, 2)
        again = feed(0, len(PROMPT), (5,), tables=(table,), is_staged=True)

        def exchange() -> None:
            for layer in range(device.memory.layout.num_layers):
                layers = range(layer, layer + 1)
                device.stage(layers, runs)
                device.d2h.wait(device.h2d.record())
                # Other slots than those it came from: what is there now is seen to arrive.
                first = device.memory.first_staging_slot
                device.write_back(layers, (CopyRun(8, first, 2),))
                device.h2d.wait(device.d2h.record())

        await issue(device, exchange)
        await device.drain()
        moved = (CopyRun(8, device.memory.first_staging_slot, 2),)
        staged = await issue(device, lambda: run_staged(device, again, moved))
        assert await sampled(device, staged) == resident

    async def test_scattered_runs_are_staged_where_they_belong(self, device: Device):
        await ran(device, prefill(0, PROMPT, (0, 1, 2)))
        await demoted(device, (0, 1), (6, 2))
        resident = await ran(device, feed(0, len(PROMPT), (5,)))
        first = device.memory.first_staging_slot
        runs = (CopyRun(2, first + 3, 1), CopyRun(6, first + 1, 1))
        table = TableUpdate(0, 0, (first + 1, first + 3))
        again = feed(0, len(PROMPT), (5,), tables=(table,), is_staged=True)
        staged = await issue(device, lambda: run_staged(device, again, runs))
        assert await sampled(device, staged) == resident

    async def test_a_ring_buffer_overwritten_before_its_reader_is_wrong(self, device: Device):
        """Otherwise the suite could not tell a ring from a buffer for every layer."""
        await ran(device, prefill(0, PROMPT, (0, 1, 2)))
        await demoted(device, (0, 1), (3, 4))
        right = await ran(device, feed(0, len(PROMPT), (5,)))
        table, runs = in_staging(device, 2)
        again = feed(0, len(PROMPT), (5,), tables=(table,), is_staged=True)

        def all_layers_at_once() -> tuple[Pass, Event]:
            layers = range(device.memory.layout.num_layers)
            for layer in layers:
                device.stage(range(layer, layer + 1), runs)
            device.compute.wait(device.h2d.record())
            forward = device.begin_pass(again)
            device.run_layers(forward, layers, is_staged=True)
            device.sample(forward)
            return forward, device.compute.record()

        try:
            wrong = await sampled(device, await issue(device, all_layers_at_once))
        except DeviceFault:
            return
        assert wrong != right

    async def test_a_token_that_stayed_on_the_device_is_fed_next(self, device: Device):
        first = await ran(device, prefill(0, PROMPT, (0, 1, 2, 3)))
        fed_back = await ran(device, feed(0, len(PROMPT), ()))
        told = await ran(device, feed(0, len(PROMPT), (first.token,)))
        assert fed_back == told

    async def test_notify_calls_back_once_on_the_loop(self, device: Device):
        calls: list[tuple[int, BaseException | None]] = []
        event = await issue(device, device.compute.record)
        device.notify(event, lambda fault: calls.append((threading.get_ident(), fault)))
        await fired(device, event)
        await device.drain()
        await asyncio.sleep(0)
        assert calls == [(threading.get_ident(), None)]
        await fired(device, event)  # an event that fired long ago is announced too

    async def test_span_tells_waiting_from_work(self, device: Device):
        def work() -> tuple[Event, Event, Event, Event]:
            began, copy_began = device.compute.record(), device.d2h.record()
            device.demote(moves(range(8), range(8)))
            copied = device.d2h.record()
            device.compute.wait(copied)
            done = run_resident(device, prefill(0, PROMPT, (0, 1, 2)))[1]
            return began, done, copy_began, copied

        began, done, copy_began, copied = await issue(device, work)
        await fired(device, done)
        await fired(device, copied)
        compute, copy = device.span(began, done), device.span(copy_began, copied)
        assert compute.waited_s > 0
        assert compute.busy_s > 0
        assert copy.waited_s == 0
        num_bytes = 8 * device.memory.layout.block_bytes
        assert copy.busy_s >= num_bytes / SLOW_LINK_BYTES_PER_S * 0.99

    async def test_drain_returns_after_everything_issued(self, device: Device):
        fired_events: list[str] = []

        def work() -> None:
            device.demote(moves(range(4), range(4)))
            device.promote(moves(range(8, 10), range(8, 10)))
            for name, stream in (("d2h", device.d2h), ("h2d", device.h2d)):
                device.notify(stream.record(), lambda _, name=name: fired_events.append(name))

        await issue(device, work)
        await device.drain()
        await asyncio.sleep(0)
        assert sorted(fired_events) == ["d2h", "h2d"]

    async def test_drain_of_an_idle_device_returns(self, device: Device):
        await device.drain()
        await device.drain()

    async def test_a_failure_reaches_the_events_behind_it_and_those_who_wait(self, rig: Rig):
        device = rig.device

        def work() -> tuple[Event, Event, Event]:
            before = device.compute.record()
            rig.break_compute()
            behind = device.compute.record()
            device.d2h.wait(behind)
            device.demote(moves((0,), (0,)))
            return before, behind, device.d2h.record()

        before, behind, waiting = await issue(device, work)
        await fired(device, before)
        for event in (behind, waiting):
            with pytest.raises(DeviceFault, match="broken by the test"):
                await fired(device, event)
        await device.drain()  # never raises

    async def test_a_copy_of_a_slot_whose_memory_was_given_back_fails(self, rig: Rig):
        device = rig.device
        await resized(device, device.memory.host_slots, device.memory.chunk_slots)

        def promote() -> Event:
            device.promote(moves((20,), (device.memory.chunk_slots,)))
            return device.h2d.record()

        with pytest.raises(DeviceFault, match=r"host pool|the pool has memory"):
            await fired(device, await issue(device, promote))

    async def test_a_pool_grown_again_holds_blocks_and_kept_the_others(self, rig: Rig):
        device = rig.device
        chunk, most = device.memory.chunk_slots, device.memory.host_slots
        await resized(device, most)
        await ran(device, prefill(0, PROMPT, (0, 1, 2)))
        before = [rig.contents(slot) for slot in (0, 1)]
        await demoted(device, (0,), (1,))
        await resized(device, chunk, most)
        await demoted(device, (1,), (most - 1,))

        def promote() -> Event:
            device.promote(moves((20, 9), (1, most - 1)))
            return device.h2d.record()

        await fired(device, await issue(device, promote))
        assert [rig.contents(slot) for slot in (20, 9)] == before

    async def test_a_delay_keeps_a_stream_busy(self, device: Device):
        def work() -> tuple[Event, Event]:
            began = device.h2d.record()
            device.h2d.delay(0.02)
            return began, device.h2d.record()

        began, done = await issue(device, work)
        await fired(device, done)
        assert device.span(began, done).busy_s == pytest.approx(0.02, rel=0.9)

    async def test_a_copy_that_failed_is_made_again_and_counted(self, rig: Rig):
        device = rig.device
        await ran(device, prefill(0, PROMPT, (0, 1, 2)))
        before = [rig.contents(slot) for slot in (0, 1)]
        outcomes = iter(["fails", "arrives", "fails", "fails", "arrives"])
        device.tamper = lambda kind: next(outcomes)
        assert await copied(device, "demote", (0, 1), (3, 4)) == (1, ())
        assert await copied(device, "promote", (20, 21), (3, 4)) == (2, ())
        assert [rig.contents(slot) for slot in (20, 21)] == before

    @pytest.mark.parametrize("way", ["promote", "demote"])
    async def test_a_copy_that_failed_for_good_is_told_by_its_host_slots(self, rig: Rig, way: str):
        device = rig.device
        await ran(device, prefill(0, PROMPT, (0, 1, 2)))
        await demoted(device, (0, 1), (3, 4))
        kinds = []
        device.tamper = lambda kind: kinds.append(kind) or "fails"
        assert await copied(device, way, (0, 1), (3, 4)) == (3, (3, 4))
        assert kinds == [way] * 3
        device.tamper = None
        assert await copied(device, way, (0, 1), (3, 4)) == (0, ()), "it is over and forgotten"

    async def test_staging_that_failed_for_good_is_told_and_the_stream_goes_on(
        self, device: Device
    ):
        await ran(device, prefill(0, PROMPT, (0, 1, 2)))
        await demoted(device, (0, 1), (3, 4))
        table, runs = in_staging(device, 2)
        again = feed(0, len(PROMPT), (5,), tables=(table,), is_staged=True)
        device.tamper = lambda kind: "fails"

        def staged() -> tuple[Pass, Event, Event, Event]:
            began = device.h2d.record()
            forward, done = run_staged(device, again, runs)
            return forward, done, began, device.h2d.record()

        forward, done, began, last = await issue(device, staged)
        await fired(device, done)
        await fired(device, last)
        assert len(forward.sampled) == 1
        assert set(device.span(began, last).damaged) == {3, 4}

    async def test_close_ends_the_devices_threads(self, tmp_path):
        rig = self.build(tmp_path)
        before = set(threading.enumerate())
        rig.device.start(asyncio.get_running_loop())
        await fired(rig.device, await issue(rig.device, rig.device.compute.record))
        await rig.device.drain()
        started = {thread for thread in threading.enumerate() if thread.name.startswith("pie-")}
        rig.device.close()
        assert not any(thread.is_alive() for thread in started - before)


class TestSimDevice(DeviceContract):
    def build(self, tmp_path) -> Rig:
        return sim_rig()


class TestFaultyDeviceWithoutFaults(DeviceContract):
    """What a plan of faults is put around."""

    def build(self, tmp_path) -> Rig:
        rig = sim_rig()
        device = FaultyDevice(rig.device, Faults(FaultPlan(faults=())))
        return replace(rig, device=device)


@pytest.mark.realtime
class TestCpuDevice(DeviceContract):
    def build(self, tmp_path) -> Rig:
        return cpu_rig(tmp_path)


@pytest.mark.realtime
class TestCudaDeviceWithoutAGpu(DeviceContract):
    """Everything of it but the driver."""

    def build(self, tmp_path) -> Rig:
        return fake_cuda_rig(tmp_path)


@pytest.mark.gpu
class TestCudaDevice(DeviceContract):
    def build(self, tmp_path) -> Rig:
        return cuda_rig(tmp_path)


@pytest.mark.realtime
class TestCudaDeviceWithAPeerPoolWithoutAGpu(DeviceContract):
    """The pool in memory that the stand-in lends."""

    def build(self, tmp_path) -> Rig:
        return fake_cuda_rig(tmp_path, in_neighbour=True)


@pytest.mark.gpu
class TestCudaDeviceWithAPeerPool(DeviceContract):
    """The pool in the same GPU's memory: all of a peer pool but the way to the peer."""

    def build(self, tmp_path) -> Rig:
        return cuda_rig(tmp_path, in_neighbour=True)
