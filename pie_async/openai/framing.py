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


def plain_frames(chunks: Iterable[Response]) -> bytes:
    """Each chunk as an event without a name."""
    return b"".join([b"data: " + encoder.encode(chunk) + b"\n\n" for chunk in chunks])


PLAIN = Framing(plain_frames, DONE)
