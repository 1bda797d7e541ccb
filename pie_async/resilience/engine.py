"""The asyncio interface of an engine that runs in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Self

import msgspec

from pie_async.assembly import Progress, Tokenizer
from pie_async.chat_options import ChatOptions
from pie_async.config import EngineConfig
from pie_async.core.admission import Admission
from pie_async.errors import EngineStopped, InvalidRequest, PieError
from pie_async.ids import RequestId, SequenceId
from pie_async.intake import Intake, Prompt, check_cache_salt
from pie_async.live.timeline import Timeline
from pie_async.live.view import EngineView
from pie_async.messages import Cancel, ReadingChanged, Submit
from pie_async.metrics import EngineStats
from pie_async.model_info import ModelInfo
from pie_async.outputs import RequestOutput
from pie_async.readers import Readers
from pie_async.request_stream import RequestStream, SequenceOutput, names_of
from pie_async.resilience.journal import Journal
from pie_async.resilience.policy import RestartPolicy
from pie_async.resilience.replay import engine_params
from pie_async.resilience.supervision import Supervision
from pie_async.runtime.faults import FaultPlan
from pie_async.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pie_async.model.guides import GuideCompiler


class ResilientEngine:
    """As `Engine`, whose streams go on when the engine dies.

    The engine's process is started anew, and every unfinished request goes on from its prompt
    and the tokens that it has: its stream pauses. Tokens become text on this side, so this
    process needs the tokenizer, but neither weights nor a GPU. New requests are refused while
    there is no engine, as while draining.

    Args:
        config: how to set the engine up; or give the fields of `EngineConfig`.
        policy: when to start it again.
        faults: what is to go wrong with it, for tests; see `pie_async.runtime.faults`.

    Raises:
        ConfigError: options that cannot work (on construction and in `start`).
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        policy: RestartPolicy | None = None,
        faults: FaultPlan | None = None,
        **options: Any,
    ) -> None:
        if config is None:
            config = EngineConfig(**options)
        elif options:
            config = msgspec.structs.replace(config, **options)
        self.config = config
        self._streams: dict[str, RequestStream] = {}
        self._admission = Admission(
            most_requests=config.max_queued_requests, most_tokens=config.max_queued_tokens
        )
        policy = policy or RestartPolicy()
        self._journal = Journal(most_deaths=policy.most_deaths_of_request, on_finished=self._forget)
        self._readers = Readers(
            self._streams.values,
            patience_s=config.reader_patience_s,
            changed=self._reading_changed,
        )
        if faults is not None:
            from pie_async.wiring import arm  # actors and numpy, which no other front needs

            arm(faults)  # refused here, not by a process that would start again and again
        self._supervision = Supervision(
            config, policy, self._journal, faults, on_news=self._readers.note
        )
        self._tokenizer: Tokenizer | None = None
        self._compiler: GuideCompiler | None = None
        self._is_draining = False
        self._dice = random.Random(config.seed)
        self._request_numbers = itertools.count(1)
        self._sequence_numbers = itertools.count(1)
        self._emptied: asyncio.Future[None] | None = None

    # --- life -------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def start(self, *, progress: Progress | None = None) -> None:
        """Start the process and have it load the model.

        Raises:
            ConfigError, ModelError: what is wrong and what to change.
            EngineStopped: the process ended for another reason; its own output says more.
        """
        await self._supervision.start(progress or _no_progress)
        try:
            self._tokenizer = await asyncio.to_thread(
                _read_tokenizer, self.config, self._supervision.model.vocab_size
            )
        except BaseException:
            await self._supervision.close()
            raise

    async def aclose(self, *, drain_s: float = 0.0) -> None:
        """End the engine's process; calling it again does nothing.

        Args:
            drain_s: let accepted requests go on for this long; the rest is cancelled.
        """
        self._is_draining = True
        self._readers.close()
        if drain_s > 0:
            with contextlib.suppress(TimeoutError, EngineStopped):
                async with asyncio.timeout(drain_s):
                    await self.drain()
        for stream in list(self._streams.values()):
            stream.cancel()
        await self._supervision.close()

    async def drain(self) -> None:
        """Accept nothing more; return when everything accepted is finished.

        Raises:
            EngineStopped: the engine failed for good meanwhile.
        """
        self._is_draining = True
        self._readers.close()  # everything is to be finished, read or not
        while self._streams:
            if self._emptied is None:
                self._emptied = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._emptied)
        if self._supervision.failure is not None:
            raise self._supervision.failure

    async def failed(self) -> PieError:
        """Wait until the engine is given up, and say why."""
        return await self._supervision.failed()

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

        Raises: what `submit` raises, and what ends a stream, see there.
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

        Arguments and errors as `Engine.submit`. The stream raises RequestGivenUp if the engine
        kept dying while it ran this request, and EngineStopped if it is not restarted again.
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
        number = RequestId(next(self._request_numbers))
        name = request_id if request_id is not None else f"request-{number}"
        if name in self._streams:
            raise InvalidRequest(f"request_id {name!r} is in use", param="request_id")
        self._admission.check(now_s=_now_s(), num_tokens=params.n * len(tokens))
        stream = self._open_stream(name, prompt, tokens, params)
        command = Submit(
            request=number,
            sequences=stream.sequences,
            prompt_tokens=tokens,
            sampling=engine_params(params),
            seed=params.seed if params.seed is not None else self._dice.getrandbits(62),
            max_tokens=max_tokens,
            priority=priority,
            cache_salt=cache_salt,
        )
        self._journal.open(stream, command)
        try:
            await self._supervision.send(command)
        except BaseException:
            stream.cancel()
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
        """The token ids that a prompt becomes; errors as `Engine.tokenize`."""
        return await self._intake().tokenize(prompt, chat)

    def _open_stream(
        self, name: str, prompt: Prompt, tokens: tuple[int, ...], params: SamplingParams
    ) -> RequestStream:
        tokenizer = self.tokenizer
        skips = params.skip_special_tokens
        outputs = [
            SequenceOutput(
                index,
                params,
                tokenizer.detokenizer(tokens, skip_special_tokens=skips),
                tokenizer.token_text,
            )
            for index in range(params.n)
        ]
        stream = self._streams[name] = RequestStream(
            request_id=name,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_tokens=tokens,
            params=params,
            sequences=[SequenceId(next(self._sequence_numbers)) for _ in outputs],
            outputs=outputs,
            cancel=self._cancel_stream,
            token_text=tokenizer.token_text,
        )
        self._admission.enter(stream.num_queued_tokens)
        return stream

    def _cancel_stream(self, stream: RequestStream) -> None:
        """At once: whether there is an engine to end it does not matter to the reader."""
        sequences = stream.unfinished
        if self._journal.close(stream):
            self._supervision.post(Cancel(sequences=sequences))

    def _reading_changed(self, sequences: tuple[SequenceId, ...], is_read: bool) -> None:
        self._supervision.post(ReadingChanged(sequences=sequences, is_read=is_read))

    def _forget(self, stream: RequestStream) -> None:
        if self._streams.pop(stream.request_id, None) is not None:
            self._admission.leave(stream.num_queued_tokens, now_s=_now_s())
        if not self._streams and self._emptied is not None:
            self._emptied.set_result(None)
            self._emptied = None

    # --- state ------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether requests are, or will be, worked on; also while it is restarted."""
        return self._tokenizer is not None and self._supervision.is_running

    @property
    def is_accepting(self) -> bool:
        return self.is_running and self._supervision.is_ready and not self._is_draining

    @property
    def failure(self) -> PieError | None:
        """Why the engine was given up; None while it was not."""
        return self._supervision.failure

    @property
    def restarts(self) -> int:
        """How often the engine's process was started again."""
        return self._supervision.restarts

    @property
    def engine_pid(self) -> int | None:
        """The engine's process; None while there is none."""
        return self._supervision.pid

    @property
    def model(self) -> ModelInfo:
        return self._supervision.model

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise EngineStopped("the engine has not started; use `async with` or `start()`")
        return self._tokenizer

    def stats(self) -> EngineStats:
        """A snapshot of counts, memory and times, as the engine last told: every 0.25 s.

        Totals start again with each engine. While there is none, all requests wait.
        """
        if not self._supervision.is_ready:
            return EngineStats(waiting=len(self._journal))
        return self._supervision.stats

    async def look(self, *, since_s: float = math.inf) -> EngineView:
        """As `Engine.look`; the clock is that of the engine's process, another one after a restart.

        Raises:
            EngineStopped: there is no engine now.
        """
        view = await self._supervision.look(since_s=since_s)
        return view.named(names_of(self._streams.values()))

    async def timeline(self, *, last_iterations: int = 200) -> Timeline:
        """As `Engine.timeline`; raises EngineStopped while there is no engine."""
        return await self._supervision.timeline(last_iterations=last_iterations)

    def _check_accepting(self) -> None:
        if self._supervision.failure is not None:
            raise self._supervision.failure
        if not self.is_accepting:
            state = "not running"
            if self.is_running:
                state = "draining" if self._is_draining else "restarting"
            raise EngineStopped(f"the engine is {state} and accepts no requests")
        self._admission.check(now_s=_now_s())

    def _intake(self) -> Intake:
        if self._compiler is None:
            from pie_async.model.guides import GuideCompiler  # loads numpy

            tokenizer, size = self.tokenizer, self.model.vocab_size
            self._compiler = GuideCompiler(tokenizer, size, tokenizer.eos_ids)
        return Intake(self.tokenizer, self.model, self._compiler)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _read_tokenizer(config: EngineConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer that the engine's process has too."""
    # Imported here: nothing heavy is loaded before an engine starts.
    if config.device == "sim":
        from pie_async.assembly.byte_tokenizer import ByteTokenizer

        return ByteTokenizer(vocab_size)
    from pie_async.assembly.loading import read_files

    return read_files(config).tokenizer


def _no_progress(_done: int, _total: int) -> None:
    """Nobody wants to know."""
