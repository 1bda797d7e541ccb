"""`pie-async chat`: a conversation in the terminal.

The loop has a thread of its own and the main one reads lines, so that Ctrl-C finds it wherever it
is: while an answer comes it ends the answer alone.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Annotated, Any, Self, TypeVar

import typer

from pie_async.cli.options import MODEL, count, with_engine_flags
from pie_async.config import BUILTIN_MODEL, EngineConfig
from pie_async.sampling_params import SamplingParams

T = TypeVar("T")
Messages = list[dict[str, str]]
Answer = Callable[[Messages], AsyncGenerator[str, None]]

_PANEL = "Conversation"
_HELP = "Ctrl-C stops an answer, /new starts anew, Ctrl-D ends."


@with_engine_flags
def chat(
    *,
    model: MODEL = BUILTIN_MODEL,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", rich_help_panel=_PANEL,
                     help="Talk with this OpenAI-compatible server's model, not with one in here."),
    ] = None,
    url_model: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=_PANEL,
                     help="The server's model; by default the first it lists."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", rich_help_panel=_PANEL, help="The server's key."),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", rich_help_panel=_PANEL, help="System message."),
    ] = None,
    max_tokens: Annotated[
        str,
        typer.Option("--max-tokens", "-n", parser=count, metavar="N", rich_help_panel=_PANEL,
                     help="Most output tokens of an answer."),
    ] = "512",
    temperature: Annotated[
        float,
        typer.Option(min=0.0, max=2.0, rich_help_panel=_PANEL, help="0 is greedy."),
    ] = 0.8,
    engine: EngineConfig,
) -> int:  # fmt: skip
    """Talk with MODEL, or with a server's model. Ctrl-C stops an answer, Ctrl-D ends."""
    del model
    if url is not None:
        answering = _from_server(url, url_model, api_key, temperature, int(max_tokens))
    else:
        params = SamplingParams(
            max_tokens=int(max_tokens), temperature=temperature, output_kind="delta"
        )
        answering = _from_engine(engine, params)
    opening: Messages = [{"role": "system", "content": system}] if system is not None else []
    with LoopThread() as loop:
        answer = loop.call(answering.__aenter__())
        try:
            return _converse(loop, answer, opening)
        finally:
            loop.call(answering.__aexit__(None, None, None))


def _from_engine(
    config: EngineConfig, params: SamplingParams
) -> AbstractAsyncContextManager[Answer]:
    from pie_async.cli.running import started

    @asynccontextmanager
    async def opened() -> AsyncIterator[Answer]:
        async with started(config) as engine:

            async def answer(messages: Messages) -> AsyncGenerator[str, None]:
                async with aclosing(engine.generate(messages, params)) as outputs:
                    async for output in outputs:
                        yield output.outputs[0].text

            yield answer

    return opened()


def _from_server(
    url: str, model: str | None, api_key: str | None, temperature: float, max_tokens: int
) -> AbstractAsyncContextManager[Answer]:
    from pie_async.api.client import CompletionsClient

    @asynccontextmanager
    async def opened() -> AsyncIterator[Answer]:
        async with CompletionsClient(
            url, model=model, api_key=api_key, temperature=temperature
        ) as client:
            yield lambda messages: client.chat(messages, max_tokens=max_tokens)

    return opened()


def _converse(loop: LoopThread, answer: Answer, opening: Messages) -> int:
    history, was_interrupted = list(opening), False
    if sys.stdin.isatty():
        import readline  # noqa: F401  # gives input() its line editing

        _say(f"{_HELP}\n")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            if was_interrupted:
                raise
            was_interrupted = True
            _say(f"\n{_HELP}\n")
            continue
        was_interrupted = False
        if line == "/new":
            history = list(opening)
        elif line:
            history.append({"role": "user", "content": line})
            history.append({"role": "assistant", "content": _answer(loop, answer, history)})


def _answer(loop: LoopThread, answer: Answer, history: Messages) -> str:
    """What the model said until it had done or was stopped."""
    pieces: list[str] = []

    async def speak() -> None:
        async with aclosing(answer(history)) as texts:
            async for text in texts:
                pieces.append(text)
                _say(text)

    try:
        loop.call(speak())
    except KeyboardInterrupt:
        _say(" [stopped]")
    _say("\n")
    return "".join(pieces)


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class LoopThread:
    """An event loop in a thread; use it as a context manager."""

    def __enter__(self) -> Self:
        import uvloop

        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pie-loop")
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns. Ctrl-C cancels it, and is raised once it has ended."""
        over = threading.Event()

        async def tracked() -> T:
            try:
                return await work
            finally:
                over.set()

        future = asyncio.run_coroutine_threadsafe(tracked(), self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            over.wait()
            raise
