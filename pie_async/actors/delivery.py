"""Owns the request streams: hands what happened to sequences to the requests' readers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import assert_never

from pie_async.errors import MailboxClosed, PieError
from pie_async.ids import SequenceId
from pie_async.messages import (
    Cancel,
    DeliveryMail,
    Drained,
    ReadingChanged,
    SchedulerMail,
    SequencesAdvanced,
)
from pie_async.readers import Readers
from pie_async.request_stream import RequestStream, failure_of
from pie_async.runtime.actor import Actor, Observer
from pie_async.runtime.mailbox import Mailbox


class DeliveryActor(Actor[DeliveryMail]):
    """Turns tokens into text, ends sequences whose text reached a stop string."""

    def __init__(
        self,
        scheduler: Mailbox[SchedulerMail],
        *,
        on_finished: Callable[[RequestStream], None],
        reader_patience_s: float = 0.0,
        observer: Observer | None = None,
    ) -> None:
        """
        Args:
            reader_patience_s: how long output may wait for its reader until its sequences are
                paused; 0: for ever.
        """
        super().__init__("delivery", capacity=1024, observer=observer)
        self._scheduler = scheduler
        self._on_finished = on_finished
        self._streams: dict[SequenceId, RequestStream] = {}
        self.readers = Readers(
            self._streams.values, patience_s=reader_patience_s, changed=self._reading_changed
        )
        self.drained = asyncio.Event()

    async def run(self) -> None:
        """See `Actor`."""
        try:
            await super().run()
        finally:
            self.readers.close()

    def open(self, stream: RequestStream) -> None:
        """Facts about the stream's sequences go to it from now on."""
        for seq in stream.sequences:
            self._streams[seq] = stream

    def abandon(self, stream: RequestStream) -> None:
        """Forget a stream whose request was never submitted."""
        for seq in stream.sequences:
            self._streams.pop(seq, None)
        self._on_finished(stream)

    def fail_all(self, error: PieError) -> None:
        """The engine ended: so does every open stream."""
        for stream in set(self._streams.values()):
            stream.fail(error)
            self._on_finished(stream)
        self._streams.clear()
        self.drained.set()

    def _fail(self, stream: RequestStream, error: PieError) -> None:
        """One of its sequences was lost: the others end with it."""
        rest = stream.unfinished
        for seq in rest:
            self._streams.pop(seq, None)
        stream.fail(error)
        self._on_finished(stream)
        self._scheduler.post(Cancel(sequences=rest))

    def handle(self, mail: DeliveryMail) -> None:
        match mail:
            case SequencesAdvanced():
                self._deliver(mail)
            case Drained():
                self.drained.set()
            case _:
                assert_never(mail)

    def _deliver(self, mail: SequencesAdvanced) -> None:
        for entry in mail.prompt_logprobs:
            if entry.sequence in self._streams:
                self._streams[entry.sequence].push_prompt(entry)
        stopped = []
        for advance in mail.advances:
            stream = self._streams.get(advance.sequence)
            if stream is None:
                continue  # it reached a stop string while its next token was under way
            if (failure := failure_of(advance)) is not None:
                self._fail(stream, failure)
                continue
            if stream.push(advance):
                stopped.append(advance.sequence)
            stream.tell()
            if advance.finish_reason is not None or stopped[-1:] == [advance.sequence]:
                del self._streams[advance.sequence]
                if stream.is_finished:
                    self._on_finished(stream)
        self.readers.note()
        if stopped:
            self._scheduler.post(Cancel(sequences=tuple(stopped), reason="stop"))

    def _reading_changed(self, sequences: tuple[SequenceId, ...], is_read: bool) -> None:
        with contextlib.suppress(MailboxClosed):  # the engine is ending
            self._scheduler.post(ReadingChanged(sequences=sequences, is_read=is_read))
