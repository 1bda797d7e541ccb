"""Keeps an engine process running: starts it, hears it, buries it, starts the next."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections import deque
from collections.abc import Callable

import msgspec

from pie_async.assembly import Progress
from pie_async.config import EngineConfig
from pie_async.errors import EngineStopped, PieError
from pie_async.live.timeline import Timeline
from pie_async.live.view import EngineView
from pie_async.messages import Cancel, ReadingChanged, SequencesAdvanced, Submit
from pie_async.metrics import EngineStats
from pie_async.model_info import ModelInfo
from pie_async.resilience.journal import Journal
from pie_async.resilience.policy import RestartPolicy
from pie_async.resilience.process import EngineProcess
from pie_async.resilience.questions import Questions
from pie_async.resilience.wire import (
    Alive,
    Failed,
    FromEngine,
    Loading,
    Look,
    Looked,
    Ready,
    Recall,
    Recalled,
    Shortened,
)
from pie_async.runtime.faults import ApiKilled, FaultPlan, Faults

_log = logging.getLogger(__name__)


class Supervision:
    """One task that hears one process after the other."""

    def __init__(
        self,
        config: EngineConfig,
        policy: RestartPolicy,
        journal: Journal,
        faults: FaultPlan | None = None,
        *,
        on_news: Callable[[], None],
    ) -> None:
        """`on_news` is called when streams got output."""
        self._config = config
        self._policy = policy
        self._journal = journal
        self._on_news = on_news
        self._plan = None if faults is None else faults.without(ApiKilled)
        self._faults = None if faults is None else Faults(faults.only(ApiKilled))
        self._process: EngineProcess | None = None
        self._model: ModelInfo | None = None
        self._watch: asyncio.Task[None] | None = None
        self._deaths_s: deque[float] = deque(maxlen=policy.most_restarts + 1)
        self._ended = asyncio.Event()
        self._questions = Questions()
        self.is_ready = False
        """Whether there is a process that takes requests."""
        self.stats = EngineStats()
        self.failure: PieError | None = None
        self.restarts = 0

    async def start(self, progress: Progress) -> None:
        """Start the first process; return when it is ready.

        Raises:
            ConfigError, ModelError, EngineStopped: why it is not.
        """
        if self._watch is not None:
            raise EngineStopped("an engine starts once; make a new one")
        process = await self._load(progress)
        self._watch = asyncio.create_task(self._keep_running(process), name="pie-supervision")

    async def close(self) -> None:
        """Hang up and return when the process has ended."""
        if self._watch is not None and not self._watch.done():
            self._watch.cancel()
            await asyncio.wait([self._watch])

    async def failed(self) -> PieError:
        """Wait for the end, and say why."""
        await self._ended.wait()
        return self.failure or EngineStopped("the engine was closed")

    # --- talking to it ----------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        return self._watch is not None and not self._watch.done()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def model(self) -> ModelInfo:
        if self._model is None:
            raise EngineStopped("the engine has not started; use `async with` or `start()`")
        return self._model

    async def send(self, command: Submit) -> None:
        """Tell it of a request that the journal has: without a process, the next one learns."""
        if self._process is not None and self.is_ready:
            await self._process.send(command)

    def post(self, command: Cancel | ReadingChanged) -> None:
        """Tell it what to end, or who reads; without a process the journal will tell the next."""
        if self._process is not None and self.is_ready:
            self._process.post(command)
            self._try_next_suspect()

    async def look(self, *, since_s: float) -> EngineView:
        """As `Engine.look`. Raises EngineStopped while there is no process, or if it ends."""
        looked = await self._questions.ask(
            self._present(), lambda number: Look(number=number, since_s=since_s)
        )
        assert isinstance(looked, Looked)
        return looked.view

    async def timeline(self, *, last_iterations: int) -> Timeline:
        """As `Engine.timeline`. Raises as `look`."""
        recalled = await self._questions.ask(
            self._present(),
            lambda number: Recall(number=number, last_iterations=last_iterations),
        )
        assert isinstance(recalled, Recalled)
        return recalled.timeline

    def _present(self) -> EngineProcess:
        if self._process is None or not self.is_ready:
            raise self.failure or EngineStopped("the engine is restarting")
        return self._process

    # --- one life after the other -----------------------------------------------------------

    async def _keep_running(self, process: EngineProcess) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                died_of = await self._live(process)
                died_s = loop.time()
                process = await self._start_again(died_of)
                took_s = loop.time() - died_s
                _log.warning("the engine runs again, after %.1f s", took_s)
        except EngineStopped as failure:
            self.failure = failure
            _log.error("%s", failure)
        except Exception:
            _log.exception("supervising the engine failed")
            self.failure = EngineStopped("the engine stopped; see the log")
        finally:
            self.is_ready = False
            self._process = None
            self._journal.fail_all(self.failure or EngineStopped("the engine was closed"))
            self._ended.set()

    async def _live(self, process: EngineProcess) -> str:
        """Hear a process out; what it died of."""
        self._process, self.is_ready = process, True
        try:
            async with asyncio.TaskGroup() as group:
                beside = [
                    group.create_task(process.kill_when_silent(self._policy.silence_s)),
                    group.create_task(self._resume(process)),
                ]
                while (message := await process.receive()) is not None:
                    self._take(message, has_next=process.has_next)
                for task in beside:
                    task.cancel()
        finally:
            self._process, self.is_ready = None, False
            self._questions.fail()
            died_of = await asyncio.shield(process.buried())
        return died_of

    async def _start_again(self, died_of: str) -> EngineProcess:
        while True:
            self._journal.engine_died()
            self._deaths_s.append(asyncio.get_running_loop().time())
            pause_s = self._policy.pause_s(self._deaths_s)
            if pause_s is None:
                _log.error("the engine process died: %s", died_of)
                raise EngineStopped(
                    f"the engine died {len(self._deaths_s)} times and is not started again; "
                    "the log says of what"
                )
            _log.warning(
                "the engine process died: %s; %d requests wait for a new one, to start in %g s",
                died_of,
                len(self._journal),
                pause_s,
            )
            await asyncio.sleep(pause_s)
            self.restarts += 1
            try:
                return await self._load(lambda _done, _total: None)
            except PieError as error:
                died_of = str(error)

    async def _load(self, progress: Progress) -> EngineProcess:
        plan = self._plan if self._plan and self.restarts < self._plan.lives else None
        process = await self._spawn(plan)
        alarm = asyncio.create_task(process.kill_when_silent(self._policy.silence_s))
        try:
            while not isinstance(message := await process.receive(), Ready):
                if message is None or isinstance(message, Failed):
                    break
                if isinstance(message, Loading):
                    progress(message.done, message.total)
        except BaseException:
            await _give_up(process)
            raise
        finally:
            alarm.cancel()
        if not isinstance(message, Ready):
            died_of = await process.buried()
            why = f"the engine process ended while it started: {died_of}"
            raise process.refusal() or EngineStopped(why)
        self._model = message.model
        return process

    async def _spawn(self, plan: FaultPlan | None) -> EngineProcess:
        """A new process; if this is cancelled meanwhile, none stays behind."""
        spawning = asyncio.create_task(EngineProcess.spawn(self._config, plan))
        try:
            return await asyncio.shield(spawning)
        except asyncio.CancelledError:
            await asyncio.wait([spawning])  # one that is half started cannot be ended
            if not spawning.cancelled() and spawning.exception() is None:
                await _give_up(spawning.result())
            raise

    async def _resume(self, process: EngineProcess) -> None:
        longest = self.model.max_model_len
        for command in self._journal.resume(longest):
            await process.send(command)
            await asyncio.sleep(0)  # others get a turn: prompts may be long and many
        self._try_next_suspect()

    def _try_next_suspect(self) -> None:
        if self._process is not None:
            for command in self._journal.try_next_suspect(self.model.max_model_len):
                self._process.post(command)

    def _take(self, message: FromEngine, *, has_next: bool) -> None:
        match message:
            case SequencesAdvanced():
                if self._faults is not None and self._faults.at(ApiKilled):
                    os.kill(os.getpid(), signal.SIGKILL)
                stopped = self._journal.take(message, has_next=has_next)
                self._on_news()
                if stopped and self._process is not None:
                    self._process.post(Cancel(sequences=tuple(stopped), reason="stop"))
                self._try_next_suspect()
            case Alive(stats=stats) if stats is not None:
                self.stats = stats
            case Looked() | Recalled():
                self._questions.answered(message)
            case Shortened(max_model_len=longest):
                model = self.model
                longest = min(longest, model.max_model_len)
                self._model = msgspec.structs.replace(model, max_model_len=longest)
            case _:
                pass  # `Failed` speaks when the process is buried
        if not has_next:
            self._journal.tell()


async def _give_up(process: EngineProcess) -> None:
    process.kill("nobody waits for it")
    await asyncio.shield(process.buried())
