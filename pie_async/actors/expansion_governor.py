"""Owns the streamed limit: watches what iterations cost and moves one number."""

from __future__ import annotations

from pie_async.core.headroom import Expansion, decide
from pie_async.messages import GovernorMail, SchedulerMail, SetStreamedLimit
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
        super().__init__("expansion_governor", capacity=64, observer=observer)
        self._headroom = headroom
        self._scheduler = scheduler

    def handle(self, mail: GovernorMail) -> None:
        before = self._headroom.limit_blocks
        self._headroom = decide(self._headroom, mail)
        if self._headroom.limit_blocks != before:
            self._scheduler.post(
                SetStreamedLimit(
                    limit_blocks=self._headroom.limit_blocks, reason=self._headroom.reason
                )
            )
