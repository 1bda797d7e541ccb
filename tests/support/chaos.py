"""What one seed makes of a run: memories, options, clients, and everything that may vary.

`chaos_run.run` carries it out. A scenario of `soak` gives the options; here come small
memories, the clients' manners, delays and refused memory.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from pie_async.errors import EngineStopped, PieError, SequenceLost
from pie_async.runtime.faults import AnyFault, CopyKind
from pie_async.sampling_params import SamplingParams
from pie_async.testing import (
    ActorRaises,
    ClockJump,
    CopyCorrupted,
    CopyFailed,
    CopySlow,
    DeviceOutOfMemory,
    KernelSlow,
    LostContext,
    MailDelayed,
    StickyError,
)
from tests.support.soak import BLOCK_TOKENS, GUIDE, SPARE_BLOCKS, Scenario

Manner = Literal["reads", "is slow", "cancels", "cancels by name", "vanishes", "never reads"]
COPIES: tuple[tuple[CopyKind, ...], ...] = ((), (), ("stage",), ("promote",), ("demote",))
DELAYS = ((CopySlow, 0.1), (KernelSlow, 0.1), (MailDelayed, 0.1), (ClockJump, 10.0))
"""Kinds of faults, and the most seconds."""
ENDS: tuple[type[ActorRaises | LostContext | StickyError | DeviceOutOfMemory], ...] = (
    *(ActorRaises, ActorRaises),
    *(LostContext, StickyError, DeviceOutOfMemory),
)
MANNERS: tuple[Manner, ...] = (
    *("reads", "reads", "reads"),
    *("is slow", "cancels", "cancels by name", "vanishes", "never reads"),
)


@dataclass(frozen=True)
class Client:
    """One request and the manners of who sends it."""

    at_s: float
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int
    cache_salt: str | None
    manner: Manner
    patience_s: float
    """Until it cancels or vanishes; between two reads if it is slow."""


@dataclass(frozen=True)
class Pool:
    """How the host pool's memory comes and goes."""

    first_slots: int
    """There from the start; less than all: the rest is pinned while the engine runs."""
    chunk_slots: int
    """By which it shrinks and grows with use; 0: it does not."""
    pinning_s: float
    refused_at: int | None
    """Slots beyond which the operating system pins nothing; None: it never refuses."""


@dataclass(frozen=True)
class Chaos:
    """Everything drawn from one seed, but for what is drawn as the run goes (see `dice`)."""

    seed: int
    device_blocks: int
    host_blocks: int
    options: dict[str, Any]
    clients: tuple[Client, ...]
    pool: Pool
    mail_delay_s: float
    """Mean delay of a message between actors; 0: none."""
    kernel_spread: float
    """Kernels take up to so many times longer or shorter than the cost model says."""
    copy_spread: float
    closes_at_s: float | None
    """The engine is closed then, whatever runs."""
    drain_s: float
    faults: tuple[AnyFault, ...]
    """What goes wrong: copies, messages, and now and then an actor or the device."""

    @classmethod
    def of(cls, seed: int) -> Chaos:
        base = Scenario.of(seed)
        dice = random.Random(f"chaos {seed}")
        device_blocks = dice.choice([4, 5, 8, 8, 12, 16])
        host_blocks = dice.choice([0, 3, 8, 40, 40, 200])
        options = base.options | {
            "token_budget": dice.choice([32, 64, 512]),
            "max_queued_requests": dice.choice([3, 4096, 4096, 4096]),
            "pool_idle_s": dice.choice([0.0, 0.01, 1.0, 60.0]),
        }
        if host_blocks == 0:
            options["streamed_blocks"] = None
        longest = (device_blocks + host_blocks - SPARE_BLOCKS) * BLOCK_TOKENS
        families = [tuple(dice.randrange(1000) for _ in range(600)) for _ in range(2)]
        within_s = dice.choice([0.0, 0.01, 0.1])
        return cls(
            seed=seed,
            device_blocks=device_blocks,
            host_blocks=host_blocks,
            options=options,
            clients=tuple(
                _client(dice, longest, families, number, within_s)
                for number in range(dice.choice([2, 6, 12]))
            ),
            pool=_pool(dice, host_blocks),
            mail_delay_s=dice.choice([0.0, 0.0, 1e-6, 1e-4, 1e-2]),
            kernel_spread=dice.choice([1.0, 1.5, 10.0]),
            copy_spread=dice.choice([1.0, 1.5, 10.0, 100.0]),
            closes_at_s=dice.random() * 0.2 if dice.random() < 0.15 else None,
            drain_s=dice.choice([0.0, 0.01, 10.0]),
            faults=_faults(seed),
        )

    @property
    def may_lose(self) -> bool:
        """Whether requests may end with an error, or the engine."""
        harmless = CopySlow | KernelSlow | MailDelayed | ClockJump
        return any(not isinstance(fault, harmless) for fault in self.faults)

    def is_meant(self, error: PieError) -> bool:
        """Whether what ended a request, or the engine, was planned."""
        if isinstance(error, SequenceLost) or "in a row failed" in str(error):
            return any(isinstance(fault, CopyFailed | CopyCorrupted) for fault in self.faults)
        return isinstance(error, EngineStopped) and "(by a plan of faults)" in str(error)

    def dice(self, purpose: str) -> random.Random:
        """A source of randomness for one purpose, so that one more draw changes no other."""
        return random.Random(f"{purpose} {self.seed}")


def spread(dice: random.Random, most: float) -> float:
    """A factor between 1/most and most; every thousandth time a hundred times that."""
    if most == 1.0:
        return 1.0
    factor = math.exp(dice.uniform(-1.0, 1.0) * math.log(most))
    return factor * 100 if dice.random() < 0.001 else factor


def _faults(seed: int) -> tuple[AnyFault, ...]:
    """Each kind in some of the seeds; drawn by themselves, so that they change nothing else."""
    dice = random.Random(f"faults {seed}")
    faults: list[AnyFault] = []
    for loss in (CopyFailed, CopyCorrupted):
        if dice.random() < 0.3:
            copies = dice.choice(COPIES)
            often = dice.choice([0.01, 0.1, 0.3, 0.5])
            faults.append(loss(probability=often, seed=seed, copies=copies))
    for delay, most_s in DELAYS:
        if dice.random() < 0.15:
            seconds = dice.choice([1e-3, 0.1, 1.0]) * most_s
            faults.append(delay(probability=0.01, seed=seed, seconds=seconds))
    if dice.random() < 0.1:
        end = dice.choice(ENDS)
        most = 300 if end is ActorRaises else 60
        faults.append(end(at=(dice.randrange(1, most),)))
    return tuple(faults)


def _pool(dice: random.Random, host_blocks: int) -> Pool:
    chunk_slots = dice.choice([0, 0, 2, 8]) if host_blocks else 0
    is_growing = host_blocks > 0 and dice.random() < 0.3
    return Pool(
        first_slots=dice.randrange(1, host_blocks + 1) if is_growing else host_blocks,
        chunk_slots=min(chunk_slots, host_blocks),
        pinning_s=dice.choice([1e-5, 1e-3, 0.1]),
        refused_at=dice.randrange(host_blocks) if is_growing and dice.random() < 0.4 else None,
    )


def _client(
    dice: random.Random,
    longest: int,
    families: list[tuple[int, ...]],
    number: int,
    within_s: float,
) -> Client:
    prompt_len = dice.randrange(1, max(2, min(longest - 1, dice.choice([20, 120, 300]))))
    max_tokens = dice.randrange(1, min(longest - prompt_len, dice.choice([5, 60, 120])) + 1)
    prompt = dice.choice(families)[:prompt_len]
    if dice.random() < 0.5:  # begins like others, ends differently
        shared = prompt_len // 2
        prompt = (*prompt[:shared], *(dice.randrange(1000) for _ in range(prompt_len - shared)))
    manner = dice.choice(MANNERS)
    return Client(
        at_s=dice.random() * within_s,
        prompt=prompt,
        params=SamplingParams(
            max_tokens=max_tokens,
            n=dice.choice([1, 1, 1, 2, 4]),
            seed=number,
            structured_outputs=GUIDE if number % 6 == 5 else None,
            stop=dice.choice([(), (), ("e",), ("th", "qu")]),
            output_kind="delta",
        ),
        priority=dice.choice([0, 0, 1]),
        cache_salt=dice.choice([None, None, "a"]),
        manner=manner,
        patience_s=dice.random()
        * (30.0 if manner == "is slow" else dice.choice([1e-4, 0.01, 0.1])),
    )


def describe(chaos: Chaos) -> str:
    """The scenario for people, without its clients' prompts."""
    brief = msgspec.to_builtins(
        {
            "options": chaos.options,
            "pool": chaos.pool,
            "mail_delay_s": chaos.mail_delay_s,
            "kernel_spread": chaos.kernel_spread,
            "copy_spread": chaos.copy_spread,
            "closes_at_s": chaos.closes_at_s,
            "drain_s": chaos.drain_s,
            "faults": chaos.faults,
        }
    )
    clients = "\n".join(
        f"  {number}: at {each.at_s:.6f} s {len(each.prompt)} + {each.params.max_tokens} tokens, "
        f"n {each.params.n}, stop {each.params.stop}, priority {each.priority}, {each.manner} "
        f"({each.patience_s:.6f} s)"
        for number, each in enumerate(chaos.clients)
    )
    return (
        f"{chaos.device_blocks} device blocks, {chaos.host_blocks} host blocks, {brief}\n{clients}"
    )
