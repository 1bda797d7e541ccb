"""Server-sent events as OpenAI's endpoints frame them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec

from pie_async.openai.responses import Response

KEEPALIVE = b": keepalive\n\n"
DONE = b"data: [DONE]\n\n"

encoder = msgspec.json.Encoder()


class Framing(NamedTuple):
    """How one kind of stream is written."""

    frames: Callable[[Iterable[Response]], bytes]
    end: bytes = b""
    """After the last chunk of a stream that did not fail."""


class TextFrame:
    """A frame in which a text changes and nothing else: the rest of it is encoded once."""

    def __init__(self, empty: bytes) -> None:
        """`empty`: the frame with no text; no string behind the text's is empty."""
        self._before, _, self._behind = empty.rpartition(b'""')

    def of(self, text: str) -> bytes:
        """The frame of this text."""
        return self._before + encoder.encode(text) + self._behind


def plain_frames(chunks: Iterable[Response]) -> bytes:
    """Each chunk as an event without a name."""
    return b"".join([b"data: " + encoder.encode(chunk) + b"\n\n" for chunk in chunks])


PLAIN = Framing(plain_frames, DONE)
