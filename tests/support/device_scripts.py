"""Hand-written issue loops over the Device protocol, and waiting for what they issue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Literal, TypeVar

from pie_async.device.protocol import Device, Event, Pass
from pie_async.messages import BlockMove, CopyRun, LaneBinding, Row, RunIteration, TableUpdate
from pie_async.sampling_params import SamplingParams

T = TypeVar("T")

GREEDY = SamplingParams(temperature=0.0, logprobs=1)


async def issue(device: Device, work: Callable[[], T]) -> T:
    """Run `work` on the launch thread; its result, or its error."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except Exception as error:
            loop.call_soon_threadsafe(done.set_exception, error)
        else:
            loop.call_soon_threadsafe(done.set_result, result)

    device.launch(run)
    return await done


async def fired(device: Device, event: Event) -> None:
    """Return when the event fired; raises its fault."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def settle(fault: BaseException | None) -> None:
        if fault is None:
            done.set_result(None)
        else:
            done.set_exception(fault)

    device.notify(event, settle)
    await done


def bind(sequence: int, *, lane: int, prompt_len: int, seed: int = 1, **kwargs) -> LaneBinding:
    """A greedy sequence that asks for logprobs, unless told otherwise."""
    options = {"sampling": GREEDY, "stop_ids": (), **kwargs}
    return LaneBinding(lane=lane, sequence=sequence, seed=seed, prompt_len=prompt_len, **options)


def prefill(
    sequence: int, tokens: Sequence[int], slots: Sequence[int], *, lane: int = 0, iteration: int = 0
) -> RunIteration:
    """A whole prompt into these slots; the first entries of the lane's block table."""
    return RunIteration(
        iteration=iteration,
        rows=(Row(sequence, lane, 0, tuple(tokens), True),),
        bindings=(bind(sequence, lane=lane, prompt_len=len(tokens), seed=sequence + 1),),
        tables=(TableUpdate(lane, 0, tuple(slots)),),
    )


def feed(
    sequence: int,
    start: int,
    tokens: Sequence[int],
    *,
    lane: int = 0,
    iteration: int = 1,
    tables: Sequence[TableUpdate] = (),
    is_staged: bool = False,
) -> RunIteration:
    """More tokens of a running sequence."""
    return RunIteration(
        iteration=iteration,
        rows=(Row(sequence, lane, start, tuple(tokens), True),),
        tables=tuple(tables),
        is_staged=is_staged,
    )


def run_resident(device: Device, command: RunIteration) -> tuple[Pass, Event]:
    """Issue an iteration without staging: its pass, and the event at its end."""
    forward = device.begin_pass(command)
    device.run_layers(forward, range(device.memory.layout.num_layers), is_staged=False)
    device.sample(forward)
    return forward, device.compute.record()


def run_staged(
    device: Device,
    command: RunIteration,
    runs: Sequence[CopyRun],
    *,
    without: Collection[Literal["staged", "computed"]] = (),
) -> tuple[Pass, Event]:
    """Issue an iteration with its staging; `without` leaves out one kind of wait."""
    layout = device.memory.layout
    forward = device.begin_pass(command)
    computed: list[Event] = []
    for group in range(layout.num_groups):
        if group >= layout.ring_depth and "computed" not in without:
            device.h2d.wait(computed[group - layout.ring_depth])
        for layer in layout.group(group):
            device.stage(range(layer, layer + 1), runs)
        staged = device.h2d.record()
        if "staged" not in without:
            device.compute.wait(staged)
        device.run_layers(forward, layout.group(group), is_staged=True)
        computed.append(device.compute.record())
    device.sample(forward)
    return forward, device.compute.record()


def moves(device_slots: Sequence[int], host_slots: Sequence[int]) -> tuple[BlockMove, ...]:
    """Blocks numbered from 0, between these slots."""
    pairs = zip(device_slots, host_slots, strict=True)
    return tuple(BlockMove(block, device, host) for block, (device, host) in enumerate(pairs))
