"""Owns the streamed limit: watches what iterations cost and moves one number."""

from __future__ import annotations

from pie_async.core.headroom import Expansion, decide
from pie_async.messages import GovernorMail, LimitCause, SchedulerMail, SetStreamedLimit
from pie_async.runtime.actor import Actor, Observer
from pie_async.runtime.mailbox import Mailbox


class ExpansionGovernorActor(Actor[GovernorMail]):
    """Carries out the expansion policy of `core/headroom.py`."""

    def __init__(
        self,
        headroom: Expansion,
        scheduler: Mailbox[SchedulerMail],
        *,
        observer: Observer | None = None,
    ) -> None:
        # What was staged may be told late, of many iterations at once: then so is this.
        super().__init__("expansion_governor", capacity=1024, observer=observer)
        self._headroom = headroom
        self._scheduler = scheduler
        self._told: tuple[int, LimitCause] | None = None

    def handle(self, mail: GovernorMail) -> None:
        self._headroom = now = decide(self._headroom, mail)
        if (now.limit_blocks, now.cause) != self._told:
            self._told = (now.limit_blocks, now.cause)
            self._scheduler.post(
                SetStreamedLimit(limit_blocks=now.limit_blocks, cause=now.cause, reason=now.reason)
            )
