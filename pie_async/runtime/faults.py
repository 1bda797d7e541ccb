"""Named fault points: what a plan makes go wrong, when, and who asks for it.

A plan is data, read from JSON or TOML or written in Python. `Faults` is a plan that is running:
places where something can go wrong ask it, and it counts how often each was reached. Without a
plan nothing is in place that could ask (after FoundationDB's BUGGIFY, which is compiled in and
switched by a seed). docs/reliability.md says what each point does on which device.
"""

from __future__ import annotations

import random
import re
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import msgspec

from pie_async.errors import ConfigError

CopyKind = Literal["stage", "promote", "demote"]
StreamName = Literal["compute", "h2d", "d2h"]


def _point_name(class_name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", class_name).lower()


class Fault(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="point",
    tag=_point_name,
):
    """Base of all faults: at which occurrences of its point one bites.

    Raises:
        ConfigError: on construction, naming the field and what is possible.
    """

    at: tuple[int, ...] = ()
    """Occurrences, counted from 1."""
    probability: float = 0.0
    """Of each occurrence, 0 to 1; instead of `at`."""
    seed: int = 0
    """Where `probability` is drawn from."""

    def __post_init__(self) -> None:
        if bool(self.at) == bool(self.probability):
            raise self._wrong("give either `at` (occurrences, from 1) or `probability`, above 0")
        if any(number < 1 for number in self.at):
            raise self._wrong(f"at is {list(self.at)}, but occurrences are counted from 1")
        if not 0.0 <= self.probability <= 1.0:
            raise self._wrong(f"probability must be 0 to 1, not {self.probability}")
        seconds, share = getattr(self, "seconds", 0.0), getattr(self, "share", 0.0)
        if not 0.0 <= seconds < float("inf"):
            raise self._wrong(f"seconds must be at least 0, not {seconds}")
        if not 0.0 <= share <= 1.0:
            raise self._wrong(f"share must be 0 to 1, not {share}")

    @property
    def point(self) -> str:
        return _point_name(type(self).__name__)

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"fault {self.point}: {what}", option="faults")

    def bites_where(self, **place: str) -> bool:
        """Whether this place, for example copy="stage", is one of those that are meant."""
        for name, value in place.items():
            meant = getattr(self, _FILTERS[name])
            if meant and value not in meant:
                return False
        return True


_FILTERS = {"copy": "copies", "stream": "streams", "actor": "actors", "message": "messages"}


# --- copies: a layer group's staging, or all blocks of one promotion or demotion ------------


class CopySlow(Fault, frozen=True, kw_only=True):
    """A copy starts `seconds` late, and those behind it."""

    copies: tuple[CopyKind, ...] = ()
    """Kinds that are meant; none: all."""
    seconds: float


class CopyStuck(Fault, frozen=True, kw_only=True):
    """A copy never ends, nor does what waits for it."""

    copies: tuple[CopyKind, ...] = ()


class CopyFailed(Fault, frozen=True, kw_only=True):
    """An attempt to copy brings nothing. Occurrences are attempts: a copy has three."""

    copies: tuple[CopyKind, ...] = ()


class CopyCorrupted(Fault, frozen=True, kw_only=True):
    """An attempt to copy brings other bytes than it read."""

    copies: tuple[CopyKind, ...] = ()


# --- the device -------------------------------------------------------------------------------


class KernelSlow(Fault, frozen=True, kw_only=True):
    """The kernels of some layers (all of them, or one layer group) start `seconds` late."""

    seconds: float


class EventNeverFires(Fault, frozen=True, kw_only=True):
    """An event is recorded and never fires; what waits for it never starts."""

    streams: tuple[StreamName, ...] = ()


class DeviceOutOfMemory(Fault, frozen=True, kw_only=True):
    """An iteration finds no memory for its workspace."""


class StickyError(Fault, frozen=True, kw_only=True):
    """An iteration's kernels fail; its stream does nothing more, nor do those that wait for it."""


class LostContext(Fault, frozen=True, kw_only=True):
    """The device is gone in the middle of an iteration: no stream does anything more."""


class ArenaRefused(Fault, frozen=True, kw_only=True):
    """While it is set up the device has no memory for its arena."""


class PoolRefused(Fault, frozen=True, kw_only=True):
    """While it is set up the host has no memory for the pool."""


class PinningRefused(Fault, frozen=True, kw_only=True):
    """The operating system pins a share of the host pool and no more."""

    share: float = 0.5


# --- actors and their messages ------------------------------------------------------------------


class MailDelayed(Fault, frozen=True, kw_only=True):
    """A message to an actor comes `seconds` late, and its sender's later ones with it."""

    actors: tuple[str, ...] = ()
    """Who it is for; none: everybody."""
    messages: tuple[str, ...] = ()
    """Their names in `messages.py`; none: all."""
    seconds: float


class ActorRaises(Fault, frozen=True, kw_only=True):
    """An actor raises when it is to handle a message."""

    actors: tuple[str, ...] = ()
    messages: tuple[str, ...] = ()


class ClockJump(Fault, frozen=True, kw_only=True):
    """When an actor is to handle a message it is suddenly `seconds` later: the machine slept."""

    actors: tuple[str, ...] = ()
    messages: tuple[str, ...] = ()
    seconds: float


class LogDiskFull(Fault, frozen=True, kw_only=True):
    """A line for the log cannot be written."""


# --- processes and clients ----------------------------------------------------------------------


class EngineKilled(Fault, frozen=True, kw_only=True):
    """The engine's process is killed when an actor is to handle a message."""

    actors: tuple[str, ...] = ()
    messages: tuple[str, ...] = ()


class ApiKilled(Fault, frozen=True, kw_only=True):
    """The server's process is killed when it hears of new tokens."""


class SlowReader(Fault, frozen=True, kw_only=True):
    """A client pauses for `seconds` after an output."""

    seconds: float


class VanishedClient(Fault, frozen=True, kw_only=True):
    """A client goes away without a word after an output."""


AnyFault = (
    CopySlow
    | CopyStuck
    | CopyFailed
    | CopyCorrupted
    | KernelSlow
    | EventNeverFires
    | DeviceOutOfMemory
    | StickyError
    | LostContext
    | ArenaRefused
    | PoolRefused
    | PinningRefused
    | MailDelayed
    | ActorRaises
    | ClockJump
    | LogDiskFull
    | EngineKilled
    | ApiKilled
    | SlowReader
    | VanishedClient
)

_KINDS: tuple[type[Fault], ...] = get_args(AnyFault)
POINTS = tuple(_point_name(kind.__name__) for kind in _KINDS)
CLIENT_POINTS: tuple[type[Fault], ...] = (SlowReader, VanishedClient)
PROCESS_POINTS: tuple[type[Fault], ...] = (EngineKilled, ApiKilled)


# --- plans --------------------------------------------------------------------------------------


class FaultPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What goes wrong, fault by fault; the first one that bites at a place is taken.

    Raises:
        ConfigError: on construction, `lives` is below 1.
    """

    faults: tuple[AnyFault, ...]
    lives: int = 1
    """So many engine processes in a row get the plan; those after them are spared."""

    def __post_init__(self) -> None:
        if self.lives < 1:
            raise ConfigError(
                f"a plan of faults for {self.lives} lives: give at least 1", option="faults"
            )

    @classmethod
    def read(cls, path: Path) -> FaultPlan:
        """The plan in a file, .json or .toml.

        Raises:
            ConfigError: it cannot be read, or says something else than a plan.
        """
        try:
            text = path.read_bytes()
            raw = (msgspec.toml if path.suffix == ".toml" else msgspec.json).decode(text)
        except (
            OSError,
            ValueError,
            RecursionError,
        ) as error:  # no text, no TOML, no JSON; too deep
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"cannot read {path}: {reason}", option="faults") from error
        return cls.of(raw)

    @classmethod
    def of(cls, raw: Any) -> FaultPlan:
        """The plan that these plain values mean.

        Raises:
            ConfigError: an unknown point, whose error lists those there are, or a wrong field.
        """
        named = raw.get("faults", ()) if isinstance(raw, dict) else ()
        for number, each in enumerate(named if isinstance(named, list | tuple) else ()):
            point = each.get("point") if isinstance(each, dict) else None
            if point not in POINTS:
                raise ConfigError(
                    f"faults[{number}]: there is no fault point {point!r}; there are "
                    f"{', '.join(POINTS)}",
                    option="faults",
                )
        try:
            return msgspec.convert(raw, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"not a plan of faults: {error}", option="faults") from None

    def only(self, *kinds: type[Fault]) -> FaultPlan:
        """The plan's faults of these kinds."""
        return self._keeping(fault for fault in self.faults if isinstance(fault, kinds))

    def without(self, *kinds: type[Fault]) -> FaultPlan:
        """The plan's other faults."""
        return self._keeping(fault for fault in self.faults if not isinstance(fault, kinds))

    def _keeping(self, faults: Iterable[Any]) -> FaultPlan:
        return msgspec.structs.replace(self, faults=tuple(faults))

    def refuse(self, *kinds: type[Fault], why: str) -> None:
        """
        Raises:
            ConfigError: it has a fault of one of these kinds.
        """
        for fault in self.only(*kinds).faults:
            raise ConfigError(f"fault {fault.point} cannot happen here: {why}", option="faults")


# --- a plan that is running -------------------------------------------------------------------

F = TypeVar("F", bound=Fault)


class Faults:
    """Says at each place whether something goes wrong there. Any thread may ask.

    Attributes:
        bites: how often each point bit, by its name.
    """

    def __init__(self, plan: FaultPlan) -> None:
        self.plan = plan
        self.bites: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._armed = [_Armed(fault) for fault in plan.faults]

    def has(self, *kinds: type[Fault]) -> bool:
        """Whether a place of these kinds has anything to ask for."""
        return bool(self.plan.only(*kinds).faults)

    def at(self, kind: type[F], **place: str) -> F | None:
        """The fault that bites at this occurrence of the place."""
        with self._lock:
            for armed in self._armed:
                fault = armed.fault
                if isinstance(fault, kind) and fault.bites_where(**place) and armed.bites():
                    self.bites[fault.point] += 1
                    return fault
        return None


class _Armed:
    """One fault, and how often its place was reached."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self._reached = 0
        self._dice = random.Random(f"{fault.point} {fault.seed}")

    def bites(self) -> bool:
        self._reached += 1
        if self.fault.at:
            return self._reached in self.fault.at
        return self._dice.random() < self.fault.probability
