"""Makes one engine's actors and connects their mailboxes. It decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from typing import Any, get_args

from pie_async.actors.compute import ComputeActor
from pie_async.actors.delivery import DeliveryActor
from pie_async.actors.expansion_governor import ExpansionGovernorActor
from pie_async.actors.scheduler import Neighbours, SchedulerActor
from pie_async.actors.swap_in import SwapInActor
from pie_async.actors.swap_out import PoolReview, SwapOutActor
from pie_async.assembly import Parts
from pie_async.assembly.sizing import SPARE_SLOTS
from pie_async.config import EngineConfig
from pie_async.core.headroom import Expansion, pays
from pie_async.core.residency import ResidencyMap
from pie_async.core.schedule import SHRINK_TOLERANCE, Schedule
from pie_async.device.launcher import Launcher
from pie_async.device.watched import WatchedQueues
from pie_async.errors import MailboxClosed
from pie_async.messages import (
    AnyMessage,
    IterationRan,
    IterationStaged,
    PoolGrown,
    PoolShrunk,
    SetStreamedLimit,
    SwappedIn,
    SwappedOut,
)
from pie_async.request_stream import RequestStream
from pie_async.runtime.actor import Actor
from pie_async.runtime.faults import CLIENT_POINTS, Fault, FaultPlan, Faults
from pie_async.runtime.faulty_actors import check_names, delay_mail, faulty
from pie_async.runtime.supervisor import Supervisor
from pie_async.runtime.watchdog import Mail, Watched
from pie_async.story import Story

_log = logging.getLogger(__name__)


class Actors:
    """One engine's actors, wired."""

    def __init__(
        self,
        parts: Parts,
        config: EngineConfig,
        story: Story,
        *,
        on_finished: Callable[[RequestStream], None],
        on_shorter: Callable[[int], None],
        faults: Faults | None = None,
    ) -> None:
        """Connect them.

        Args:
            on_finished: called with every request that ended.
            on_shorter: called if sequences have to be shorter than planned, with their most
                tokens: the operating system would not pin the whole pool.
            faults: what goes wrong with actors and their messages.
        """
        observer = story.note if faults is None else faulty(story.note, faults)
        schedule = _schedule(parts, config)
        self.scheduler = SchedulerActor(
            schedule,
            iterations_in_flight=config.iterations_in_flight,
            # Of every queued request it may be said at once, without waiting, that its reader is
            # back and that it is cancelled.
            mailbox_capacity=3 * config.max_queued_requests + 256,
            checks_invariants=config.debug,
            observer=observer,
        )
        to_scheduler = self.scheduler.mailbox
        launcher = Launcher(parts.device, asyncio.get_running_loop(), exchanges=config.exchange)
        queues = WatchedQueues(launcher)
        self.delivery = DeliveryActor(
            to_scheduler,
            on_finished=on_finished,
            reader_patience_s=config.reader_patience_s,
            observer=observer,
        )
        compute = ComputeActor(queues, to_scheduler, observer=observer)
        swap_in = SwapInActor(queues, to_scheduler, observer=observer)
        swap_out = SwapOutActor(
            queues, to_scheduler, review=_pool_review(parts, config), observer=observer
        )
        actors: list[Actor[Any]] = [self.delivery, self.scheduler, compute, swap_in, swap_out]
        governor = None
        self.most_streamed = _most_streamed(parts)
        if config.streamed_blocks is not None:
            to_scheduler.post(
                SetStreamedLimit(
                    limit_blocks=min(config.streamed_blocks, self.most_streamed),
                    cause="fixed",
                    reason="fixed by streamed_blocks",
                )
            )
        elif self.most_streamed:
            memory = parts.device.memory
            block_bytes = memory.layout.block_bytes
            # Without a floor nothing is known of the device's memory, as with a CPU.
            is_worth_it = not parts.decode_floor_s or pays(
                weight_bytes=parts.model.weight_bytes,
                resident_bytes=memory.device_slots * block_bytes,
            )
            headroom = Expansion(
                block_bytes=block_bytes,
                most_blocks=self.most_streamed if is_worth_it else 0,
                itl_limit_s=config.itl_limit_s,
                decode_floor_s=parts.decode_floor_s,
            )
            governor = ExpansionGovernorActor(headroom, to_scheduler, observer=observer)
            actors.append(governor)
        self.scheduler.connect(
            Neighbours(
                compute=compute.mailbox,
                swap_in=swap_in.mailbox,
                swap_out=swap_out.mailbox,
                delivery=self.delivery.mailbox,
                governor=governor.mailbox if governor else None,
            )
        )
        if faults is not None:
            delay_mail(actors, faults, sender_of)
        self.supervisor = Supervisor(actors, parts.device)
        self.watched: tuple[Watched, ...] = (
            queues.compute, queues.h2d, queues.d2h, *(Mail(actor.mailbox) for actor in actors)
        )  # fmt: skip
        self._memory = parts.device.memory
        self._pool_slots = self._memory.first_host_slots
        self._on_shorter = on_shorter
        parts.device.watch_pool(self._pool_grown)

    def _pool_grown(self, slots: int, refusal: str | None) -> None:
        memory, longest = self._memory, None
        if refusal is not None:
            usable = memory.device_slots + min(slots, memory.staging_slots) - SPARE_SLOTS
            longest = max(0, usable) * memory.layout.block_tokens
            self._on_shorter(longest)
            _log.warning("%s. Going on with that: sequences of %d tokens at most", refusal, longest)
        is_all = refusal is not None or slots >= memory.host_slots
        is_less, self._pool_slots = slots < self._pool_slots, slots
        with contextlib.suppress(MailboxClosed):
            self.scheduler.mailbox.post(
                PoolShrunk(slots=slots)
                if is_less
                else PoolGrown(slots=slots, is_all=is_all, longest=longest)
            )


SENDERS: dict[type, str] = {
    IterationRan: "compute",
    IterationStaged: "swap_in",
    SwappedIn: "swap_in",
    SwappedOut: "swap_out",
    SetStreamedLimit: "expansion_governor",
}
"""Who sends the scheduler what; everything else comes from one sender, or from callers."""
ACTORS = ("delivery", "scheduler", "compute", "swap_in", "swap_out", "expansion_governor")


def sender_of(message: Any) -> str:
    """Whose messages stay in order with this one, when mail is late."""
    return SENDERS.get(type(message), "")


def arm(plan: FaultPlan, *spared: type[Fault], why: str = "") -> Faults:
    """Get a plan ready for an engine.

    Args:
        spared: faults that cannot happen to it, and `why`.

    Raises:
        ConfigError: the plan has one of these, or names an actor or message that there is not.
    """
    plan.refuse(*CLIENT_POINTS, why="it is a client's; see pie_async.testing")
    plan.refuse(*spared, why=why)
    messages = (kind.__name__ for kind in get_args(AnyMessage))
    check_names(plan, actors=ACTORS, messages=messages)
    return Faults(plan)


def _schedule(parts: Parts, config: EngineConfig) -> Schedule:
    memory = parts.device.memory
    is_exact = config.streamed_blocks is not None or config.itl_limit_s is not None
    return Schedule(
        residency=ResidencyMap(
            device_slots=memory.device_slots,
            host_slots=memory.first_host_slots,
            staging_slots=memory.staging_slots,
            first_staging_slot=memory.first_staging_slot,
            most_host_slots=memory.host_slots,
            chunk_slots=_chunk_slots(parts, config),
        ),
        block_tokens=config.block_tokens,
        token_budget=parts.limits.token_budget,
        max_running=parts.limits.max_running_sequences,
        eos_ids=parts.eos_ids,
        shares_prefixes=config.prefix_caching,
        prefix_seed=secrets.token_bytes(32),
        shrink_tolerance=1.0 if is_exact else SHRINK_TOLERANCE,
        awaits_pool=memory.first_host_slots < memory.host_slots,
    )


def _pool_review(parts: Parts, config: EngineConfig) -> PoolReview | None:
    memory, chunk_slots = parts.device.memory, _chunk_slots(parts, config)
    if not 0 < chunk_slots < memory.host_slots:
        return None
    return PoolReview(every_s=config.pool_idle_s, slots=memory.host_slots, least_slots=chunk_slots)


def _chunk_slots(parts: Parts, config: EngineConfig) -> int:
    """By which the pool shrinks and grows; 0: it keeps its memory. With an exchange it does, for a
    slot that was just freed may still be written to."""
    return parts.device.memory.chunk_slots if config.pool_idle_s and not config.exchange else 0


def _most_streamed(parts: Parts) -> int:
    memory = parts.device.memory
    return min(memory.staging_slots, memory.host_slots)
