"""What this room needs of an engine: the part of `Engine` that it calls.

Structural types, so that an engine in another process, or a scripted one in a test, serves too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from pie_async.chat_options import ChatOptions
from pie_async.live.timeline import Timeline
from pie_async.live.view import EngineView
from pie_async.metrics import EngineStats
from pie_async.outputs import OutputShortcut, RequestOutput
from pie_async.sampling_params import SamplingParams

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text, token ids, or a conversation."""


class OutputStream(Protocol):
    """One accepted request: iterate it to the end, or cancel it."""

    shortcut: OutputShortcut | None
    """Set by whoever iterates. A stream may send it what the next step of the iteration would
    return, while that is waited for; never an output with which something ends."""

    request_id: str

    prompt_token_ids: tuple[int, ...]

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...

    async def __anext__(self) -> RequestOutput: ...

    def cancel(self) -> None:
        """Ask for the end now; never waits, and does nothing after the end."""


class ServedModel(Protocol):
    """What clients may know of the model."""

    @property
    def name(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def writes_tools_as(self) -> Literal["hermes", "llama3"]: ...

    @property
    def thinks(self) -> bool: ...


class TextDecoder(Protocol):
    """The part of the tokenizer that echoing prompts takes."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def token_text(self, token: int) -> str: ...


class Backend(Protocol):
    """A running engine."""

    @property
    def is_running(self) -> bool: ...

    @property
    def is_accepting(self) -> bool: ...

    @property
    def model(self) -> ServedModel: ...

    @property
    def tokenizer(self) -> TextDecoder: ...

    def stats(self) -> EngineStats: ...

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """The token ids that a prompt becomes. Raises: as `submit`."""
        ...

    async def look(self, *, since_s: float = ...) -> EngineView:
        """See `Engine`."""
        ...

    async def timeline(self, *, last_iterations: int = ...) -> Timeline:
        """See `Engine`."""
        ...

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        chat: ChatOptions | None = None,
    ) -> OutputStream:
        """Accept a request; tokenizing happens off the loop.

        Raises:
            InvalidRequest, ContextTooLong, Overloaded, EngineStopped: nothing was queued.
        """
        ...
