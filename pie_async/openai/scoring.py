"""Prompts that are only scored: `echo` with `max_tokens: 0`, as lm-eval asks for log-likelihoods.

The engine always computes one token more; nobody is shown it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from pie_async.openai.backend import OutputStream
from pie_async.outputs import CompletionOutput, OutputShortcut, RequestOutput


class PromptOnly:
    """A stream of one output token, without it."""

    def __init__(self, stream: OutputStream) -> None:
        self.request_id = stream.request_id
        self.prompt_token_ids = stream.prompt_token_ids
        self.cancel = stream.cancel
        self.shortcut: OutputShortcut | None = None  # there is one output, and it ends
        self._stream = stream

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        output = await self._stream.__anext__()
        return msgspec.structs.replace(output, outputs=tuple(map(_emptied, output.outputs)))


def _emptied(choice: CompletionOutput) -> CompletionOutput:
    return msgspec.structs.replace(
        choice,
        text="",
        token_ids=(),
        logprobs=None if choice.logprobs is None else (),
        finish_reason="length" if choice.finish_reason == "stop" else choice.finish_reason,
    )
