"""Request streams whose tokens are characters."""

from __future__ import annotations

from collections.abc import Callable

from pie_async.request_stream import RequestStream, SequenceOutput
from pie_async.sampling_params import SamplingParams


class CharDecoder:
    """Token ids are code points; 0 stands for an incomplete character, shown at the end."""

    def __init__(self) -> None:
        self._held = 0

    def push(self, token: int) -> str:
        if token == 0:
            self._held += 1
            return ""
        return chr(token)

    def flush(self) -> str:
        held, self._held = self._held, 0
        return "\N{REPLACEMENT CHARACTER}" * held


def a_stream(
    *sequences: int,
    params: SamplingParams | None = None,
    cancel: Callable[[RequestStream], None] = lambda stream: None,
    prompt: str | None = None,
) -> RequestStream:
    """A stream of these sequences."""
    params = params if params is not None else SamplingParams(n=len(sequences))
    return RequestStream(
        request_id="request",
        prompt=prompt,
        prompt_tokens=(1, 2),
        params=params,
        sequences=sequences,
        outputs=[
            SequenceOutput(index, params, CharDecoder(), chr) for index in range(len(sequences))
        ],
        cancel=cancel,
        token_text=chr,
    )
