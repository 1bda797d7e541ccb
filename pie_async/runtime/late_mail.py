"""Mail that takes a while, for plans of faults and for simulation."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

from pie_async.errors import MailboxClosed
from pie_async.runtime.mailbox import Mailbox


class LateMail:
    """Hands a mailbox its messages late: those of one sender in order, of several in any."""

    def __init__(
        self,
        mailbox: Mailbox[Any],
        *,
        delay_s: Callable[[Any], float],
        sender_of: Callable[[Any], str],
    ) -> None:
        """Take the place of the mailbox's `post`.

        Args:
            delay_s: of each message; 0: none of its own.
            sender_of: whose order counts.
        """
        self._mailbox = mailbox
        self._deliver = mailbox.post
        self._delay_s = delay_s
        self._sender_of = sender_of
        self._under_way: dict[str, deque[Any]] = {}
        self._last_s: dict[str, float] = {}
        mailbox.post = self.post  # type: ignore[method-assign]

    def post(self, message: Any) -> None:
        """See `Mailbox`."""
        if self._mailbox.is_closed:
            raise MailboxClosed(f"the {self._mailbox.name} mailbox is closed")
        sender, delay_s = self._sender_of(message), self._delay_s(message)
        under_way = self._under_way.setdefault(sender, deque())
        if not delay_s and not under_way:
            self._deliver(message)
            return
        loop = asyncio.get_running_loop()
        at_s = max(loop.time() + delay_s, self._last_s.get(sender, 0.0))
        self._last_s[sender] = at_s
        under_way.append(message)
        loop.call_at(at_s, self._arrive, under_way)

    def _arrive(self, under_way: deque[Any]) -> None:
        if len(self._mailbox) >= self._mailbox.capacity and not self._mailbox.is_closed:
            # What was late comes all at once: no sender's doing. Its reader has its turn first.
            asyncio.get_running_loop().call_soon(self._arrive, under_way)
            return
        # Which of a sender's timers this is does not matter: its oldest message comes first.
        with contextlib.suppress(MailboxClosed):  # the engine has ended
            self._deliver(under_way.popleft())
