"""The synchronous interface, for notebooks and scripts."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Self, TypeVar

import msgspec
import uvloop
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pie_async.assembly import ChatMessage
from pie_async.config import EngineConfig
from pie_async.engine import Engine
from pie_async.errors import EngineStopped, InvalidRequest
from pie_async.intake import Prompt
from pie_async.metrics import EngineStats
from pie_async.model_info import ModelInfo
from pie_async.outputs import RequestOutput
from pie_async.sampling_params import SamplingParams

T = TypeVar("T")


class LLM:
    """An `Engine` on an event loop of its own, in a thread of its own.

    Works wherever it is called, inside a running event loop too (it then blocks that loop).
    Close it, or use it as a context manager, to give its memory back.

    Args:
        options: the fields of `EngineConfig`, e.g. `model`, `device_kv_bytes`.

    Raises:
        ConfigError, ModelError: what is wrong and what to change.
    """

    def __init__(self, **options: Any) -> None:
        self._engine = Engine(EngineConfig(**options))
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pie-llm", daemon=True)
        self._thread.start()
        # Also when the caller forgets: at the latest when the interpreter exits.
        self._finalizer = weakref.finalize(self, _close, self._engine, self._loop, self._thread)
        try:
            self._call(self._engine.start())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Complete the prompts, all at once; their outputs in the same order.

        Args:
            prompts: a text, a list of token ids or a conversation, or a list of such prompts.
            params: one for all prompts, or one for each.
            progress: show a progress bar on a terminal.
            cache_salt: share KV only with prompts of the same salt.

        Raises:
            InvalidRequest: for the first prompt that cannot run; nothing is returned.
            EngineStopped: it was closed, or the engine failed.
        """
        return self._run(_as_prompts(prompts), params, progress=progress, cache_salt=cache_salt)

    def chat(
        self,
        conversations: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """The assistant's next turn in one conversation, or in each of several.

        Arguments and errors: as `generate`; a text is no conversation.
        """
        if isinstance(conversations, str) or any(isinstance(one, str) for one in conversations):
            raise InvalidRequest(
                'a conversation is a list of messages such as {"role": "user", "content": "Hi"}; '
                "generate() continues a text",
                param="conversations",
            )
        prompts: list[Any] = list(conversations)
        if prompts and not isinstance(prompts[0], Sequence):
            prompts = [prompts]
        return self._run(prompts, params, progress=progress, cache_salt=cache_salt)

    def stats(self) -> EngineStats:
        return self._call(_later(self._engine.stats))

    @property
    def model(self) -> ModelInfo:
        return self._engine.model

    def close(self) -> None:
        """End the engine and its thread; calling it again does nothing."""
        self._finalizer()

    # --- inside -------------------------------------------------------------------------------

    def _run(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        progress: bool,
        cache_salt: str | None,
    ) -> list[RequestOutput]:
        each = _params_for(len(prompts), params)
        bar = _progress_bar() if progress else None
        with bar or nullcontext():
            done: Callable[[], None] | None = None
            if bar is not None:
                task = bar.add_task("requests", total=len(prompts))

                def done() -> None:
                    bar.advance(task)

            return self._call(self._finish_all(prompts, each, cache_salt, done))

    async def _finish_all(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        cache_salt: str | None,
        done: Callable[[], None] | None,
    ) -> list[RequestOutput]:
        # Held back here, not refused there: more prompts than the engine queues is fine.
        places = asyncio.Semaphore(self._engine.config.max_queued_requests)

        async def finish(prompt: Prompt, one: SamplingParams) -> RequestOutput:
            one = msgspec.structs.replace(one, output_kind="final")
            async with places:
                async for output in self._engine.generate(prompt, one, cache_salt=cache_salt):
                    if done is not None:
                        done()
                    return output
            raise AssertionError("a final output always comes")

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(finish(prompt, one))
                    for prompt, one in zip(prompts, params, strict=True)
                ]
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        return [task.result() for task in tasks]

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        if not self._finalizer.alive:
            work.close()
            raise EngineStopped("this LLM was closed; make a new one")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise


def _close(engine: Engine, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    asyncio.run_coroutine_threadsafe(engine.aclose(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def _later(read: Callable[[], T]) -> T:
    """`read`, on the loop that owns what it reads."""
    return read()


def _as_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    several: list[Prompt] = list(prompts)
    is_one = bool(several) and isinstance(several[0], (int, Mapping))
    return [list(prompts)] if is_one else several


def _params_for(
    count: int, params: SamplingParams | Sequence[SamplingParams] | None
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params if params is not None else SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequest(f"{count} prompts but {len(params)} SamplingParams", param="params")
    return params


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        transient=True,
    )
