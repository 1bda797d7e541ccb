"""The asyncio interface: builds the engine, wires its actors, takes requests in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Self

import msgspec

from pie_async.assembly import Parts, Progress, Tokenizer, assemble
from pie_async.chat_options import ChatOptions
from pie_async.config import EngineConfig
from pie_async.core.admission import Admission
from pie_async.core.layout import KvLayout
from pie_async.cuda.memory_budget import GpuMemory
from pie_async.errors import (
    ConfigError,
    EngineStopped,
    EngineStuck,
    InvalidRequest,
    MailboxClosed,
    PieError,
)
from pie_async.ids import RequestId, SequenceId
from pie_async.intake import Intake, Prompt, check_cache_salt
from pie_async.live.timeline import Timeline, recent_spans, timeline
from pie_async.live.view import EngineView
from pie_async.messages import Cancel, Drain, SetStreamedLimit, Submit
from pie_async.metrics import EngineStats
from pie_async.model_info import ModelInfo
from pie_async.outputs import RequestOutput
from pie_async.request_stream import RequestStream, SequenceOutput, names_of
from pie_async.runtime.faults import PROCESS_POINTS, FaultPlan
from pie_async.runtime.faulty_actors import log_on_full_disk
from pie_async.sampling_params import SamplingParams
from pie_async.story import Story
from pie_async.watching import watch_engine
from pie_async.wiring import Actors, arm

_log = logging.getLogger(__name__)

CLOSE_S = 30.0
"""How long closing waits for what was issued before it gives up on the device."""


class Engine:
    """An LLM inference engine on the running event loop.

    Use it as an async context manager, or call `start` and `aclose`. It sets no signal
    handlers, starts no loop and works on any loop and thread; several can live side by side.

    Args:
        config: how to set it up; or give the fields of `EngineConfig` as keyword arguments.
        exits_when_stuck: end the process, with status 71, if the engine stands still for
            `watchdog_s`: for a process that is the engine's own. Otherwise the engine stops, and
            its streams end with `EngineStuck`.
        faults: what is to go wrong with it, for tests; see `pie_async.runtime.faults`.

    Raises:
        ConfigError: options that cannot work (on construction and in `start`).
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        exits_when_stuck: bool = False,
        faults: FaultPlan | None = None,
        **options: Any,
    ) -> None:
        if config is None:
            config = EngineConfig(**options)
        elif options:
            config = msgspec.structs.replace(config, **options)
        self.config = config
        self.faults = None
        if faults is not None:
            why = "the engine has no process of its own; use ResilientEngine"
            self.faults = arm(faults, *PROCESS_POINTS, why=why)
        self._parts: Parts | None = None
        self._actors: Actors | None = None
        self._exits_when_stuck = exits_when_stuck
        self._watch: asyncio.Task[None] | None = None
        self._streams: dict[str, RequestStream] = {}
        self._admission = Admission(
            most_requests=config.max_queued_requests, most_tokens=config.max_queued_tokens
        )
        self._has_started = False
        self._is_draining = False
        self._failure: PieError | None = None
        self._dice = random.Random(config.seed)
        self._numbers = _Numbers()
        self._started_s = 0.0
        self.story: Story | None = None

    # --- life -------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def start(self, *, progress: Progress | None = None) -> None:
        """Load the model (in a thread) and start the actors.

        Raises:
            ConfigError, ModelError: what is wrong and what to change.
        """
        if self._has_started:
            raise EngineStopped("an engine starts once; make a new one")
        self._has_started = True
        loop = asyncio.get_running_loop()
        parts = await asyncio.to_thread(
            assemble, self.config, progress=progress, faults=self.faults
        )
        parts.device.start(loop)
        self.story = Story(loop.time)
        self._parts = parts
        self._actors = Actors(
            parts,
            self.config,
            self.story,
            on_finished=self._forget,
            on_shorter=self._limit_length,
            faults=self.faults,
        )
        self._started_s = loop.time()
        self._watch = asyncio.create_task(self._supervise(parts), name="pie-supervisor")

    async def _supervise(self, parts: Parts) -> None:
        with log_on_full_disk(self.faults):
            await self._run_actors(parts)

    async def _run_actors(self, parts: Parts) -> None:
        assert self._actors is not None and self.story is not None
        supervisor = self._actors.supervisor
        stop = None if self._exits_when_stuck else self._stop_stuck
        watchdog = watch_engine(
            self._actors, self.config, self.story, faults=self.faults, stop=stop
        )
        try:
            await supervisor.run()
        except EngineStopped as failure:
            self._failure = failure
            _log.error("%s; what happened last:\n%s", failure, self.story.tell())
        finally:
            if watchdog is not None:
                watchdog.close()
            self._actors.delivery.fail_all(self._stopped())
            if supervisor.is_drained:
                parts.device.close()
            else:
                _log.error("the device did not finish; it keeps its memory until the process ends")

    def _stop_stuck(self, failure: EngineStuck) -> None:
        """Called by the watchdog. The streams must not wait until the device is given up."""
        assert self._actors is not None and self._watch is not None
        if self._failure is None:
            self._failure = failure
            self._actors.delivery.fail_all(failure)
            self._watch.cancel()

    async def aclose(self, *, drain_s: float = 0.0) -> None:
        """End the engine and give its memory back; calling it again does nothing.

        Args:
            drain_s: let accepted requests go on for this long; the rest is cancelled.
        """
        if self._watch is None or self._actors is None:
            return
        if not self._watch.done():
            if drain_s > 0:
                with contextlib.suppress(TimeoutError, EngineStopped):
                    async with asyncio.timeout(drain_s):
                        await self.drain()
            for stream in list(self._streams.values()):
                stream.cancel()
            try:
                async with asyncio.timeout(CLOSE_S):
                    await self.drain()
                    await self._actors.supervisor.close()
            except (TimeoutError, EngineStopped):
                if not self._watch.cancelling():
                    self._watch.cancel()
        await asyncio.wait([self._watch])

    async def drain(self) -> None:
        """Accept nothing more; return when everything accepted is finished.

        Raises:
            EngineStopped: the engine failed meanwhile.
        """
        actors = self._running_actors()
        if not self._is_draining:
            self._is_draining = True
            actors.delivery.readers.close()  # everything is to be finished, read or not
            try:
                await actors.scheduler.mailbox.send(Drain())
            except MailboxClosed:
                raise self._stopped() from None
        await actors.delivery.drained.wait()
        if self._failure is not None:
            raise self._failure

    # --- requests ---------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        chat: ChatOptions | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs as they come. Leaving the loop early, or cancelling it, cancels the request.

        Raises: what `submit` raises, and EngineStopped if the engine ends meanwhile.
        """
        stream = await self.submit(
            prompt,
            params,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
            chat=chat,
        )
        async with aclosing(stream):
            async for output in stream:
                yield output

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        chat: ChatOptions | None = None,
    ) -> RequestStream:
        """Accept a request; its outputs come from the stream returned.

        Args:
            request_id: the caller's name for it; must not be in use. None makes one up.
            priority: lower runs first; equal ones run first come, first served.
            cache_salt: KV is shared only with requests of the same salt, so that nobody can
                tell from how fast a request starts what others have sent. None: with all
                requests that have none.
            chat: what a conversation's template is told beside the messages.

        Raises:
            InvalidRequest: names the parameter; nothing was queued.
            ContextTooLong: prompt and `max_tokens` exceed `model.max_model_len`.
            Overloaded: too many requests are queued.
            EngineStopped: not running, or draining.
        """
        params = params if params is not None else SamplingParams()
        if not isinstance(priority, int):
            raise InvalidRequest(f"priority is {priority!r}, not a number", param="priority")
        check_cache_salt(cache_salt)
        self._check_accepting()
        tokens = tuple(await self.tokenize(prompt, chat))
        await self._intake().check_guide(params)
        self._check_accepting()  # all that took a while
        max_tokens = self._intake().check(tokens, params)
        number = self._numbers.request()
        name = request_id if request_id is not None else f"request-{number}"
        if name in self._streams:
            raise InvalidRequest(f"request_id {name!r} is in use", param="request_id")
        self._admission.check(now_s=_now_s(), num_tokens=params.n * len(tokens))
        stream = self._open_stream(name, prompt, tokens, params)
        seed = params.seed if params.seed is not None else self._dice.getrandbits(62)
        command = Submit(
            request=number,
            sequences=stream.sequences,
            prompt_tokens=tokens,
            sampling=params,
            seed=seed,
            max_tokens=max_tokens,
            priority=priority,
            cache_salt=cache_salt,
        )
        actors = self._running_actors()
        try:
            await actors.scheduler.mailbox.send(command)
        except BaseException as error:
            actors.delivery.abandon(stream)
            if isinstance(error, MailboxClosed):  # the actors ended while it waited for room
                raise self._stopped() from None
            raise
        return stream

    async def cancel(self, request_id: str) -> bool:
        """End a request now. Its stream ends with finish reason "abort".

        Returns: whether there was such a request.
        """
        stream = self._streams.get(request_id)
        if stream is None:
            return False
        stream.cancel()
        return True

    async def tokenize(self, prompt: Prompt, chat: ChatOptions | None = None) -> list[int]:
        """The token ids that a prompt becomes; long ones are tokenised off the loop.

        Raises:
            InvalidRequest, ContextTooLong: it is not a prompt, or could never fit.
        """
        return await self._intake().tokenize(prompt, chat)

    async def fix_streaming(self, limit_blocks: int, *, least_blocks: int = 0) -> None:
        """Say, for measurements, how many blocks are streamed from now on.

        Args:
            limit_blocks: that may be.
            least_blocks: that are, even where everything fits, as soon as so many are sealed.

        Raises:
            ConfigError: the governor decides (`streamed_blocks` was not given), the pool or the
                staging ring is too small, or `least_blocks` is above the limit.
            EngineStopped: not running.
        """
        actors = self._running_actors()
        most = 0 if self.config.streamed_blocks is None else actors.most_streamed
        if not 0 <= least_blocks <= limit_blocks <= most:
            raise ConfigError(
                f"streamed blocks cannot be fixed to {least_blocks} .. {limit_blocks}: with "
                f"streamed_blocks {self.config.streamed_blocks} it can be 0 .. {most}",
                option="streamed_blocks",
            )
        await actors.scheduler.mailbox.send(
            SetStreamedLimit(
                limit_blocks=limit_blocks,
                least_blocks=least_blocks,
                cause="fixed",
                reason="fixed by the caller",
            )
        )

    def _open_stream(
        self, name: str, prompt: Prompt, tokens: tuple[int, ...], params: SamplingParams
    ) -> RequestStream:
        sequences = [self._numbers.sequence() for _ in range(params.n)]
        tokenizer = self.tokenizer
        outputs = [
            SequenceOutput(
                index,
                params,
                tokenizer.detokenizer(tokens, skip_special_tokens=params.skip_special_tokens),
                tokenizer.token_text,
            )
            for index in range(params.n)
        ]
        stream = RequestStream(
            request_id=name,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_tokens=tokens,
            params=params,
            sequences=sequences,
            outputs=outputs,
            cancel=self._cancel_stream,
            token_text=tokenizer.token_text,
        )
        self._streams[name] = stream
        self._admission.enter(stream.num_queued_tokens)
        self._running_actors().delivery.open(stream)
        return stream

    def _cancel_stream(self, stream: RequestStream) -> None:
        if self._actors is None or self._actors.scheduler.mailbox.is_closed:
            return
        self._actors.scheduler.mailbox.post(Cancel(sequences=stream.unfinished))

    def _forget(self, stream: RequestStream) -> None:
        if self._streams.pop(stream.request_id, None) is not None:
            self._admission.leave(stream.num_queued_tokens, now_s=_now_s())

    # --- state ------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        return self._watch is not None and not self._watch.done() and self._failure is None

    @property
    def is_accepting(self) -> bool:
        return self.is_running and not self._is_draining

    @property
    def failure(self) -> PieError | None:
        """Why it stopped; None while it runs, and when it was closed."""
        return self._failure

    @property
    def model(self) -> ModelInfo:
        return self._loaded().model

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded().tokenizer

    @property
    def layout(self) -> KvLayout:
        """How KV is cut into blocks and layers."""
        return self._loaded().device.memory.layout

    def stats(self) -> EngineStats:
        """A snapshot of counts, memory and times."""
        actors, memory = self._running_actors(), self._loaded().device.memory
        return msgspec.structs.replace(
            actors.scheduler.stats(),
            block_bytes=memory.layout.block_bytes,
            uptime_s=asyncio.get_running_loop().time() - self._started_s,
        )

    async def look(self, *, since_s: float = math.inf) -> EngineView:
        """What it is doing now, for people; costs a millisecond or two, and not looking nothing.

        Args:
            since_s: tell of what the streams did after this time of the engine's clock
                (`EngineView.now_s`, of the last look); the story goes back for some seconds.

        Raises:
            EngineStopped: it has not started.
        """
        actors, layout = self._running_actors(), self.layout
        assert self.story is not None
        scheduler = actors.scheduler
        spans = recent_spans(self.story, since_s=since_s, lookback_s=scheduler.issued_ahead_s)
        view = scheduler.view(layout, self.stats(), spans)
        return view.named(names_of(self._streams.values()))

    async def timeline(self, *, last_iterations: int = 200) -> Timeline:
        """What streams and requests did in the last iterations, as far as the story goes back.

        Raises:
            EngineStopped: it has not started.
        """
        self._running_actors()
        assert self.story is not None
        return timeline(self.story, last_iterations=last_iterations, now_s=_now_s())

    def gpu_memory(self) -> GpuMemory | None:
        """Where the card's memory is, and what is in use now; None without a card."""
        report = self._loaded().gpu_memory
        return None if report is None else report()

    def _stopped(self) -> PieError:
        return self._failure or EngineStopped("the engine was closed")

    def _check_accepting(self) -> None:
        if self._failure is not None:
            raise self._failure
        if not self.is_accepting:
            state = "draining" if self.is_running else "not running"
            raise EngineStopped(f"the engine is {state} and accepts no requests")
        self._admission.check(now_s=_now_s())

    def _intake(self) -> Intake:
        parts = self._loaded()
        return Intake(parts.tokenizer, parts.model, parts.compiler)

    def _limit_length(self, longest: int) -> None:
        parts = self._loaded()
        length = min(longest, parts.model.max_model_len)
        model = msgspec.structs.replace(parts.model, max_model_len=length)
        self._parts = msgspec.structs.replace(parts, model=model)

    def _loaded(self) -> Parts:
        if self._parts is None:
            raise EngineStopped("the engine has not started; use `async with` or `start()`")
        return self._parts

    def _running_actors(self) -> Actors:
        if self._actors is None:
            raise EngineStopped("the engine has not started; use `async with` or `start()`")
        return self._actors


def _now_s() -> float:
    return asyncio.get_running_loop().time()


class _Numbers:
    """Request and sequence ids, counted from 1."""

    def __init__(self) -> None:
        self._requests = 0
        self._sequences = 0

    def request(self) -> RequestId:
        self._requests += 1
        return RequestId(self._requests)

    def sequence(self) -> SequenceId:
        self._sequences += 1
        return SequenceId(self._sequences)
