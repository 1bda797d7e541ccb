"""The engine on the simulated device while things go wrong as planned."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

import pytest

from pie_async import Engine, SamplingParams
from pie_async.errors import ConfigError, EngineStopped, PieError, SequenceLost
from pie_async.messages import IterationRan, IterationStaged, SwappedIn, SwappedOut
from pie_async.metrics import EngineStats
from pie_async.runtime.faults import (
    ActorRaises,
    ArenaRefused,
    ClockJump,
    CopyCorrupted,
    CopyFailed,
    CopySlow,
    CopyStuck,
    DeviceOutOfMemory,
    EngineKilled,
    EventNeverFires,
    Fault,
    FaultPlan,
    KernelSlow,
    LogDiskFull,
    LostContext,
    MailDelayed,
    PinningRefused,
    PoolRefused,
    SlowReader,
    StickyError,
)
from pie_async.runtime.virtual_time import VirtualTimeLoop
from pie_async.testing import check_returned
from tests.support.soak import BLOCK_BYTES

Tokens = list[tuple[int, ...] | BaseException]
PRESSURE = {
    "device_kv_bytes": 10 * BLOCK_BYTES,
    "host_pool_bytes": 30 * BLOCK_BYTES,
    "streamed_blocks": 5,
}


class Ran:
    """What came of a run: five sequences that do not fit together."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outputs: Tokens = []
        self.stats = EngineStats()
        self.took_s = 0.0

    def facts(self, kind: type) -> list[Any]:
        assert self.engine.story is not None
        return [entry.message for entry in self.engine.story if isinstance(entry.message, kind)]


def run(*faults: Fault, **options: Any) -> Ran:
    """Run on virtual time to the end, whatever that is."""
    plan = FaultPlan(faults=faults) if faults else None
    options = {"device": "sim", "model": "tiny", "debug": True, **PRESSURE, **options}
    ran = Ran(Engine(faults=plan, **options))

    async def ask(number: int) -> tuple[int, ...]:
        prompt = [(100 * number + 7 * i) % 1000 for i in range(40 + 17 * number)]
        params = SamplingParams(max_tokens=40 + 11 * (number % 4), seed=1, ignore_eos=True)
        async for output in ran.engine.generate(prompt, params):
            last = output
        return last.outputs[0].token_ids

    async def main() -> None:
        async with ran.engine:
            assert ran.engine.story is not None
            ran.engine.story.keep_all()
            asking = asyncio.gather(*map(ask, range(5)), return_exceptions=True)
            async with asyncio.timeout(3600):
                ran.outputs = await asking
            ran.took_s = asyncio.get_running_loop().time()
            if ran.engine.is_running:
                await ran.engine.drain()
                check_returned(ran.engine)
            ran.stats = ran.engine.stats()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())
    return ran


@cache
def calm() -> Ran:
    return run()


def bites(ran: Ran) -> dict[str, int]:
    assert ran.engine.faults is not None
    return dict(ran.engine.faults.bites)


# --- copies that go wrong -----------------------------------------------------------------------

KINDS = {"stage": IterationStaged, "promote": SwappedIn, "demote": SwappedOut}


@pytest.mark.parametrize("copy", KINDS)
@pytest.mark.parametrize("kind", [CopyFailed, CopyCorrupted])
def test_a_copy_that_goes_wrong_is_made_again_and_costs_nothing(kind: type[Fault], copy: str):
    ran = run(kind(at=(1,), copies=(copy,)), check_copies=True)
    assert ran.outputs == calm().outputs
    assert sum(fact.failed_attempts for fact in ran.facts(KINDS[copy])) == 1
    assert ran.stats.copy_attempts_failed == sum(bites(ran).values()) == 1
    assert ran.stats.copies_lost == ran.stats.sequences_begun_anew == 0


@pytest.mark.parametrize("kind", [CopyFailed, CopyCorrupted])
def test_blocks_that_cannot_be_staged_have_their_readers_computed_again(kind: type[Fault]):
    ran = run(kind(at=tuple(range(40, 46)), copies=("stage",)), check_copies=True)
    assert ran.outputs == calm().outputs
    unstaged = [fact.unstaged for fact in ran.facts(IterationRan) if fact.unstaged]
    assert unstaged
    assert ran.stats.copies_lost >= len(set().union(*unstaged))
    assert 1 <= ran.stats.sequences_begun_anew <= 2
    assert ran.stats.sequences_lost == 0


def test_blocks_that_cannot_come_home_have_the_sequence_that_waits_computed_again():
    ran = run(CopyFailed(at=(1, 2, 3), copies=("promote",)))
    assert ran.outputs == calm().outputs
    failed = [fact.failed for fact in ran.facts(SwappedIn) if fact.failed]
    assert len(failed) == 1
    assert ran.stats.copies_lost == len(failed[0])
    assert ran.stats.sequences_begun_anew == 1


def test_blocks_that_cannot_be_pooled_stay_where_they_are():
    ran = run(CopyFailed(at=tuple(range(1, 13)), copies=("demote",)))
    assert ran.outputs == calm().outputs
    assert [bool(fact.failed) for fact in ran.facts(SwappedOut)[:5]] == [True] * 4 + [False]
    assert ran.stats.sequences_begun_anew == 0


def test_a_sequence_whose_kv_is_lost_again_and_again_ends_with_an_error_and_the_others_go_on():
    bursts = tuple(number for number in range(1, 1500) if number // 12 % 3 == 0)
    ran = run(CopyFailed(at=bursts, copies=("stage",)))
    lost = [output for output in ran.outputs if isinstance(output, BaseException)]
    assert lost
    for error in lost:
        assert isinstance(error, SequenceLost)
        assert "lost 4 times in copies that failed" in str(error)
    assert ran.stats.sequences_lost == len(lost)
    others = zip(ran.outputs, calm().outputs, strict=True)
    assert all(got == right for got, right in others if got not in lost)


def test_a_link_that_copies_nothing_any_more_stops_the_engine():
    ran = run(CopyFailed(probability=1.0, copies=("demote",)))
    assert len(ran.outputs) == 5
    for error in ran.outputs:
        assert isinstance(error, EngineStopped)
        assert "16 copies to the pool in a row failed" in str(error)
    assert not ran.engine.is_running


def test_without_checksums_a_corrupted_copy_goes_unnoticed_by_the_engine():
    """The checker of the simulated device sees it: otherwise the tests above would prove little."""
    ran = run(CopyCorrupted(at=(1,), copies=("demote",)))
    assert any("should hold" in str(error) for error in ran.outputs)
    assert ran.stats.copy_attempts_failed == 0


# --- what only takes time ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        *[CopySlow(at=(1, 3), copies=(copy,), seconds=0.01) for copy in KINDS],
        KernelSlow(probability=0.1, seconds=0.01),
        MailDelayed(probability=0.1, seconds=0.01),
        MailDelayed(probability=0.5, actors=("scheduler",), messages=("SwappedOut",), seconds=0.1),
        ClockJump(at=(20, 70), seconds=100.0),
    ],
    ids=lambda fault: "-".join((fault.point, *getattr(fault, "copies", ()))),
)
def test_what_is_slow_changes_no_token(fault: Fault):
    ran = run(fault)
    assert ran.outputs == calm().outputs
    assert sum(bites(ran).values()) >= 1
    if not isinstance(fault, CopySlow | MailDelayed):
        assert ran.took_s > calm().took_s


def test_a_log_on_a_full_disk_stops_nothing(capsys):
    ran = run(LogDiskFull(probability=1.0), ActorRaises(at=(50,)))
    assert all(isinstance(error, EngineStopped) for error in ran.outputs)
    assert bites(ran)["log_disk_full"] >= 1
    assert "No space left on device" in capsys.readouterr().err


# --- what stops the engine ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (DeviceOutOfMemory(at=(5,)), "DeviceFault: no memory for an iteration"),
        (StickyError(at=(5,)), "DeviceFault: the compute stream failed"),
        (LostContext(at=(5,)), "DeviceFault: the device was lost"),
        (ActorRaises(at=(3,), actors=("compute",)), "the compute actor failed at RunIteration"),
        (
            ActorRaises(at=(2,), messages=("SwappedOut",)),
            "the scheduler actor failed at SwappedOut",
        ),
        (ActorRaises(at=(9,), actors=("delivery",)), "the delivery actor failed"),
        (ActorRaises(at=(4,), actors=("swap_in",)), "the swap_in actor failed"),
        (ActorRaises(at=(2,), actors=("swap_out",)), "the swap_out actor failed"),
    ],
    ids=lambda value: value.point if isinstance(value, Fault) else "",
)
def test_what_stops_the_engine_ends_every_stream_with_the_cause(fault: Fault, says: str):
    ran = run(fault)
    assert len(ran.outputs) == 5
    for error in ran.outputs:
        assert isinstance(error, EngineStopped)
        assert says in str(error)
        assert error.__cause__ is not None
    assert not ran.engine.is_running
    assert sum(bites(ran).values()) == 1


@pytest.mark.parametrize(
    "fault", [CopyStuck(at=(2,), copies=("stage",)), EventNeverFires(at=(9,), streams=("compute",))]
)
async def test_an_engine_that_waits_for_ever_can_be_closed(fault: Fault):
    """Whether it is to be waited for is the watchdog's to say."""
    options = {"device": "sim", "model": "tiny", **PRESSURE}
    async with Engine(faults=FaultPlan(faults=(fault,)), **options) as engine:
        streams = [await engine.submit([number] * 90) for number in range(1, 5)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1000):
                await engine.drain()
        assert any(not stream.is_finished for stream in streams)
    assert not engine.is_running
    for stream in streams:
        assert [output.finished async for output in stream][-1]


# --- memory that is refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "option"),
    [(ArenaRefused(at=(1,)), "device_kv_bytes"), (PoolRefused(at=(1,)), "host_pool_bytes")],
)
async def test_memory_refused_at_the_start_is_a_config_error_that_names_the_option(
    fault: Fault, option: str
):
    engine = Engine(device="sim", model="tiny", faults=FaultPlan(faults=(fault,)))
    with pytest.raises(ConfigError, match=option) as caught:
        await engine.start()
    assert caught.value.option == option


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_where_pinning_is_refused_the_engine_goes_on_with_what_it_has(share: float):
    ran = run(PinningRefused(at=(1,), share=share))
    assert bites(ran) == {"pinning_refused": 1}
    most = 10 + int(share * 30) - 3
    assert ran.engine.model.max_model_len == most * 16
    for got, right in zip(ran.outputs, calm().outputs, strict=True):
        assert isinstance(got, tuple) and isinstance(right, tuple)
        assert got == right[: len(got)]
    assert ran.stats.host_blocks == int(share * 30)


# --- what cannot happen here ------------------------------------------------------------------


@pytest.mark.parametrize("fault", [EngineKilled(at=(1,)), SlowReader(at=(1,), seconds=1.0)])
def test_faults_of_processes_and_clients_are_refused_by_an_engine(fault: Fault):
    with pytest.raises(ConfigError, match=f"{fault.point} cannot happen here"):
        Engine(device="sim", faults=FaultPlan(faults=(fault,)))


def test_faults_that_name_no_actor_are_refused_by_an_engine():
    plan = FaultPlan(faults=(ActorRaises(at=(1,), actors=("governor",)),))
    with pytest.raises(PieError, match="'governor'; there are compute, delivery"):
        Engine(device="sim", faults=plan)


def test_copies_cannot_fail_where_what_was_staged_is_written_back():
    with pytest.raises(ConfigError, match="copy_failed cannot happen here: with exchange"):
        run(CopyFailed(at=(1,)), exchange=True)
