"""Makes one engine's actors and connects their mailboxes. It decides nothing."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

from pie_async.actors.compute import ComputeActor
from pie_async.actors.delivery import DeliveryActor
from pie_async.actors.expansion_governor import ExpansionGovernorActor
from pie_async.actors.scheduler import Neighbours, SchedulerActor
from pie_async.actors.swap_in import SwapInActor
from pie_async.actors.swap_out import SwapOutActor
from pie_async.assembly import Parts
from pie_async.config import EngineConfig
from pie_async.core.headroom import Expansion
from pie_async.core.residency import ResidencyMap
from pie_async.core.schedule import Schedule
from pie_async.device.launcher import Launcher
from pie_async.request_stream import RequestStream
from pie_async.runtime.actor import Actor
from pie_async.runtime.supervisor import Supervisor
from pie_async.story import Story


class Actors:
    """One engine's actors, wired."""

    def __init__(
        self,
        parts: Parts,
        config: EngineConfig,
        story: Story,
        *,
        on_finished: Callable[[RequestStream], None],
    ) -> None:
        observer = story.note
        schedule = _schedule(parts, config)
        self.scheduler = SchedulerActor(
            schedule,
            iterations_in_flight=config.iterations_in_flight,
            # Every queued request may be cancelled at once, and cancelling never waits.
            mailbox_capacity=2 * config.max_queued_requests + 256,
            checks_invariants=config.debug,
            observer=observer,
        )
        to_scheduler = self.scheduler.mailbox
        launcher = Launcher(parts.device, asyncio.get_running_loop())
        self.delivery = DeliveryActor(to_scheduler, on_finished=on_finished, observer=observer)
        compute = ComputeActor(launcher, to_scheduler, observer=observer)
        swap_in = SwapInActor(launcher, to_scheduler, observer=observer)
        swap_out = SwapOutActor(launcher, to_scheduler, observer=observer)
        actors: list[Actor[Any]] = [self.delivery, self.scheduler, compute, swap_in, swap_out]
        governor = None
        self.most_streamed = _most_streamed(parts)
        if config.streamed_blocks is None and self.most_streamed:
            block_bytes = parts.device.memory.layout.block_bytes
            headroom = Expansion(block_bytes=block_bytes, most_blocks=self.most_streamed)
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
        self.supervisor = Supervisor(actors, parts.device)


def _schedule(parts: Parts, config: EngineConfig) -> Schedule:
    memory = parts.device.memory
    return Schedule(
        residency=ResidencyMap(
            device_slots=memory.device_slots,
            host_slots=memory.host_slots,
            staging_slots=memory.staging_slots,
            first_staging_slot=memory.first_staging_slot,
        ),
        block_tokens=config.block_tokens,
        token_budget=parts.limits.token_budget,
        max_running=parts.limits.max_running_sequences,
        eos_ids=parts.eos_ids,
        shares_prefixes=config.prefix_caching,
        prefix_seed=secrets.token_bytes(32),
        streamed_limit=min(config.streamed_blocks or 0, _most_streamed(parts)),
    )


def _most_streamed(parts: Parts) -> int:
    memory = parts.device.memory
    return min(memory.staging_slots, memory.host_slots)
