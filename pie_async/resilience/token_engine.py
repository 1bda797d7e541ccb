"""The engine without its door and without text: commands in, facts about sequences out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from pie_async.assembly import Parts, Progress, assemble
from pie_async.config import EngineConfig
from pie_async.errors import EngineStopped, MailboxClosed
from pie_async.live.timeline import Timeline, recent_spans, timeline
from pie_async.live.view import EngineView
from pie_async.messages import AnyMessage, Cancel, ReadingChanged, SequencesAdvanced, Submit
from pie_async.metrics import EngineStats
from pie_async.model_info import ModelInfo
from pie_async.request_stream import RequestStream
from pie_async.runtime.faults import ApiKilled, FaultPlan, Faults
from pie_async.runtime.faulty_actors import log_on_full_disk
from pie_async.story import Story
from pie_async.watching import watch_engine
from pie_async.wiring import Actors, arm

_log = logging.getLogger(__name__)

Advanced = Callable[[SequencesAdvanced], None]


class _Tap(Story):
    """A story that is also told to somebody: what the delivery actor hears goes on to the front.

    That actor has no streams here, so it does nothing itself.
    """

    def __init__(self, now: Callable[[], float], advanced: Advanced) -> None:
        super().__init__(now)
        self._advanced = advanced

    def note(self, actor: str, message: AnyMessage) -> None:
        super().note(actor, message)
        if isinstance(message, SequencesAdvanced):
            self._advanced(message)


class TokenEngine:
    """One engine's actors on the running loop."""

    def __init__(
        self,
        parts: Parts,
        config: EngineConfig,
        *,
        advanced: Advanced,
        shorter: Callable[[int], None],
        faults: Faults | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        parts.device.start(loop)
        self._parts = parts
        self._started_s = loop.time()
        self._config = config
        self._story = _Tap(loop.time, advanced)
        self._actors = Actors(
            parts,
            config,
            self._story,
            on_finished=_no_streams,
            on_shorter=shorter,
            faults=faults,
        )
        self._faults = faults

    @classmethod
    async def load(
        cls,
        config: EngineConfig,
        *,
        advanced: Advanced,
        shorter: Callable[[int], None],
        progress: Progress,
        faults: FaultPlan | None = None,
    ) -> TokenEngine:
        """Load the model in a thread.

        Args:
            advanced: told what happened to sequences.
            shorter: told the most tokens of a sequence, should they get fewer.
            progress: called in that thread.
            faults: what is to go wrong with it.

        Raises:
            ConfigError, ModelError: as `Engine.start`.
        """
        armed = None
        if faults is not None:
            armed = arm(faults, ApiKilled, why="it is for the server's process")
        parts = await asyncio.to_thread(assemble, config, progress=progress, faults=armed)
        return cls(parts, config, advanced=advanced, shorter=shorter, faults=armed)

    @property
    def model(self) -> ModelInfo:
        return self._parts.model

    def stats(self) -> EngineStats:
        return msgspec.structs.replace(
            self._actors.scheduler.stats(),
            block_bytes=self._parts.device.memory.layout.block_bytes,
            uptime_s=asyncio.get_running_loop().time() - self._started_s,
        )

    def look(self, *, since_s: float) -> EngineView:
        """As `Engine.look`; sequences have no names here."""
        scheduler = self._actors.scheduler
        spans = recent_spans(self._story, since_s=since_s, lookback_s=scheduler.issued_ahead_s)
        return scheduler.view(self._parts.device.memory.layout, self.stats(), spans)

    def timeline(self, *, last_iterations: int) -> Timeline:
        """As `Engine.timeline`."""
        now_s = asyncio.get_running_loop().time()
        return timeline(self._story, last_iterations=last_iterations, now_s=now_s)

    async def tell(self, command: Submit | Cancel | ReadingChanged) -> None:
        """Pass a command on, waiting while many are waiting.

        Raises:
            EngineStopped: the actors have ended.
        """
        try:
            await self._actors.scheduler.mailbox.send(command)
        except MailboxClosed:
            raise EngineStopped("the engine has ended") from None

    async def run(self) -> None:
        """Return when it was closed.

        Raises:
            EngineStopped: it failed.
        """
        with log_on_full_disk(self._faults):
            await self._run()

    async def _run(self) -> None:
        watchdog = watch_engine(self._actors, self._config, self._story, stop=None)
        try:
            await self._actors.supervisor.run()
        except EngineStopped as failure:
            _log.error("%s; what happened last:\n%s", failure, self._story.tell())
            raise
        finally:
            if watchdog is not None:
                watchdog.close()
            if self._actors.supervisor.is_drained:
                self._parts.device.close()


def _no_streams(_stream: RequestStream) -> None:
    """Nothing is open here that could end."""
