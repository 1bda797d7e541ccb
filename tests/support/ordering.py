"""Which waits order a run of the engine on the simulated device, and what if one were missing.

`record` follows everything that the happens-before checker is told. `replay` tells a fresh
checker the same without some of it. `is_racy` answers the same question from the definition: it
searches all pairs of conflicting operations for one without a path between them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pie_async.device import launcher
from pie_async.device.happens_before import Clock, HappensBefore, Locations, UnorderedAccess
from pie_async.device.sim import SimDevice, SimStream
from pie_async.device.sim_memory import STREAMS


class Site(NamedTuple):
    """Where the launcher waits or records."""

    stream: str
    lines: tuple[tuple[str, int], ...]
    """(function, line) in the launcher, the innermost first."""

    @property
    def line(self) -> int:
        return self.lines[0][1]


def launcher_site(stream: int | str) -> Site | None:
    """Of the call that is under way; None if the launcher is not part of it."""
    lines = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == launcher.__file__:
            lines.append((frame.f_code.co_name, frame.f_lineno))
            if frame.f_code.co_name in ("_issue_staged", "_issue_resident", "issue"):
                break
        frame = frame.f_back
    name = stream if isinstance(stream, str) else STREAMS[stream]
    return Site(name, tuple(lines)) if lines else None


class Step(NamedTuple):
    """One thing that the checker was told."""

    what: str
    """"begin", "read", "write", "record", "wait", "observe" or "host issues"."""
    stream: int = 0
    locations: Locations | None = None
    label: str = ""
    span_s: tuple[float, float] | None = None
    event: int = 0
    """Number of the record step that a wait or the host's observation is about."""
    site: Site | None = None


@dataclass
class Trace:
    """All steps of a run, in order."""

    num_locations: int
    describe: Callable[[int], str]
    steps: list[Step] = field(default_factory=list)

    def waits(self, what: str = "wait") -> dict[Site, list[int]]:
        """Steps of this kind that the launcher caused, by site; of observations, that of the
        event that was recorded."""
        found: dict[Site, list[int]] = {}
        for number, step in enumerate(self.steps):
            if step.what == what:
                site = step.site if what == "wait" else self.steps[step.event].site
                if site is not None:
                    found.setdefault(site, []).append(number)
        return found


class _Recorder(HappensBefore):
    """A checker that writes down what it is told."""

    trace: Trace

    def start(self, trace: Trace) -> None:
        self.trace = trace
        self._recorded: dict[int, tuple[Clock, int]] = {}

    def _note(self, step: Step) -> int:
        self.trace.steps.append(step)
        return len(self.trace.steps) - 1

    def begin(self, stream: int, label: str, span_s: tuple[float, float] | None = None) -> None:
        self._note(Step("begin", stream, label=label, span_s=span_s))
        super().begin(stream, label, span_s)

    def read(self, stream: int, locations: Locations) -> None:
        self._note(Step("read", stream, locations))
        super().read(stream, locations)

    def write(self, stream: int, locations: Locations) -> None:
        self._note(Step("write", stream, locations))
        super().write(stream, locations)

    def record(self, stream: int) -> Clock:
        number = self._note(Step("record", stream, site=launcher_site(stream)))
        clock = super().record(stream)
        self._recorded[id(clock)] = (clock, number)  # kept, so that the id stays its own
        return clock

    def wait(self, stream: int, recorded: Clock) -> None:
        event = self._recorded[id(recorded)][1]
        self._note(Step("wait", stream, event=event, site=launcher_site(stream)))
        super().wait(stream, recorded)

    def observe(self, recorded: Clock) -> None:
        self._note(Step("observe", event=self._recorded[id(recorded)][1]))
        super().observe(recorded)

    def host_issues(self) -> None:
        self._note(Step("host issues"))
        super().host_issues()


def record(device: SimDevice) -> Trace:
    """Follow this device's accesses from now on."""
    assert device.checker is not None
    memory = device.checker.memory
    assert memory.order is not None
    trace = Trace(len(memory._tags), memory.describe)
    recorder = _Recorder(STREAMS, trace.num_locations, memory.describe)
    recorder.start(trace)
    memory.order = recorder
    return trace


def replay(trace: Trace, without: frozenset[int] = frozenset()) -> UnorderedAccess | None:
    """What the checker says to the same steps but for these waits or observations."""
    order = HappensBefore(STREAMS, trace.num_locations, trace.describe)
    clocks: dict[int, Clock] = {}
    try:
        for number, step in enumerate(trace.steps):
            if number in without:
                continue
            match step.what:
                case "begin":
                    order.begin(step.stream, step.label, step.span_s)
                case "read":
                    assert step.locations is not None
                    order.read(step.stream, step.locations)
                case "write":
                    assert step.locations is not None
                    order.write(step.stream, step.locations)
                case "record":
                    clocks[number] = order.record(step.stream)
                case "wait":
                    order.wait(step.stream, clocks[step.event])
                case "observe":
                    order.observe(clocks[step.event])
                case _:
                    order.host_issues()
    except UnorderedAccess as found:
        return found
    return None


@dataclass
class Conflicts:
    """For every operation of a trace, the earlier ones that it must come after."""

    of_step: dict[int, int]
    """By begin step: a set of operations as the bits of a number."""

    @classmethod
    def of(cls, trace: Trace) -> Conflicts:
        """All pairs that access one location, at least one of them writing."""
        writers: dict[int, int] = {}
        readers: dict[int, int] = {}
        found: dict[int, int] = {}
        current: dict[int, int] = {}
        for number, step in enumerate(trace.steps):
            if step.what == "begin":
                current[step.stream] = number
                found[number] = 0
            if step.locations is None:
                continue
            operation = current[step.stream]
            own = 1 << operation
            for location in set(step.locations.tolist()):
                earlier = writers.get(location, 0)
                if step.what == "write":
                    earlier |= readers.get(location, 0)
                    writers[location] = writers.get(location, 0) | own
                else:
                    readers[location] = readers.get(location, 0) | own
                found[operation] |= earlier & ~own
        return cls(found)


def is_racy(trace: Trace, conflicts: Conflicts, without: frozenset[int]) -> bool:
    """Whether two conflicting operations have no path between them, by searching all."""
    before = [0] * len(STREAMS)
    host = 0
    events: dict[int, int] = {}
    for number, step in enumerate(trace.steps):
        if number in without:
            continue
        if step.what == "begin":
            if conflicts.of_step[number] & ~before[step.stream]:
                return True
            before[step.stream] |= 1 << number
        elif step.what == "record":
            events[number] = before[step.stream]
        elif step.what == "wait":
            before[step.stream] |= events[step.event]
        elif step.what == "observe":
            host |= events[step.event]
        elif step.what == "host issues":
            before = [earlier | host for earlier in before]
    return False


def implied(trace: Trace) -> set[int]:
    """Waits for events that their streams come after anyway, by other waits or by the host's."""
    before = [0] * len(STREAMS)
    host = 0
    events: dict[int, int] = {}
    found = set()
    for number, step in enumerate(trace.steps):
        if step.what == "begin":
            before[step.stream] |= 1 << number
        elif step.what == "record":
            events[number] = before[step.stream]
        elif step.what == "wait":
            if not events[step.event] & ~before[step.stream]:
                found.add(number)
            before[step.stream] |= events[step.event]
        elif step.what == "observe":
            host |= events[step.event]
        elif step.what == "host issues":
            before = [earlier | host for earlier in before]
    return found


class Dropped:
    """Replaces `SimStream.wait`: counts the launcher's waits and leaves out those that are told."""

    def __init__(self, is_dropped: Callable[[Site, int], bool]) -> None:
        """
        Args:
            is_dropped: asked with the site and how many waits it has seen before.
        """
        self._is_dropped = is_dropped
        self._wait = SimStream.wait
        self.seen: dict[Site, int] = {}
        self.dropped = 0

    def __call__(self, stream: SimStream, event: Any) -> None:
        site = launcher_site(stream.name)
        assert site is not None, "somebody else than the launcher waits"
        number = self.seen.get(site, 0)
        self.seen[site] = number + 1
        if self._is_dropped(site, number):
            self.dropped += 1
        else:
            self._wait(stream, event)
