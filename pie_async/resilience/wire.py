"""What the front and the engine's process say to each other, and how it lies in a socket.

A frame is a length (4 bytes, little endian) and one message as msgpack. Both ends know all
types beforehand; nothing that is read can name code to run.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Generic, TypeVar

import msgspec

from pie_async.config import EngineConfig
from pie_async.errors import ConfigError, InvalidRequest, PieError
from pie_async.live.timeline import Timeline
from pie_async.live.view import EngineView
from pie_async.messages import Cancel, Message, ReadingChanged, SequencesAdvanced, Submit
from pie_async.metrics import EngineStats
from pie_async.model_info import ModelInfo
from pie_async.runtime.faults import FaultPlan

MAX_FRAME_BYTES = 64 * 2**20
"""A longer one is a mistake: prompts have some bytes per token."""
MAX_UNSENT_BYTES = 256 * 2**20
"""An end that leaves so much unread has stopped reading."""
FRAMES_PER_TURN = 32
"""After this many frames in a row the loop gets a turn."""
_CHUNK_BYTES = 64 * 2**10

_LENGTH_BYTES = 4
_NO_MESSAGE = (
    msgspec.DecodeError,
    UnicodeDecodeError,
    RecursionError,
    InvalidRequest,  # of parameters and configurations, which check themselves
    ConfigError,
)


class Start(Message, frozen=True, kw_only=True):
    """Command: load this; the first message of a connection."""

    config: EngineConfig
    faults: FaultPlan | None = None
    """What is to go wrong with it, for tests."""


class Loading(Message, frozen=True, kw_only=True):
    """Fact: so many of the weights' bytes are loaded."""

    done: int
    total: int


class Ready(Message, frozen=True, kw_only=True):
    """Fact: requests can be submitted."""

    model: ModelInfo


class Shortened(Message, frozen=True, kw_only=True):
    """Fact: sequences have to be shorter than `Ready` said."""

    max_model_len: int


class Alive(Message, frozen=True, kw_only=True):
    """Fact, every `ALIVE_EVERY_S`: the process's event loop turns."""

    stats: EngineStats | None
    """None while it loads."""


class Look(Message, frozen=True, kw_only=True):
    """Command: show what the engine is doing; `Looked` answers."""

    number: int
    since_s: float
    """As in `Engine.look`."""


class Looked(Message, frozen=True, kw_only=True):
    """Fact: what there was to see."""

    number: int
    view: EngineView


class Recall(Message, frozen=True, kw_only=True):
    """Command: tell what happened in the last iterations; `Recalled` answers."""

    number: int
    last_iterations: int


class Recalled(Message, frozen=True, kw_only=True):
    """Fact: as much of it as is remembered."""

    number: int
    timeline: Timeline


class Failed(Message, frozen=True, kw_only=True):
    """Fact: the engine could not start, or failed; the last message of a process."""

    kind: str
    """The error's class."""
    message: str
    option: str | None = None
    """As in `ConfigError`."""


ToEngine = Start | Submit | Cancel | ReadingChanged | Look | Recall
FromEngine = Loading | Ready | Shortened | Alive | Failed | SequencesAdvanced | Looked | Recalled

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()


class WireError(PieError):
    """A frame that the other end cannot have meant, or one that it does not read."""


class Wire(Generic[M]):
    """One end of the connection; `M` is what it reads."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: Any
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(kind)
        self._num_read = 0
        self._unread = bytearray()

    def post(self, message: Message) -> None:
        """Send without waiting; nothing happens if the other end is gone.

        Raises:
            WireError: the other end leaves too much unread.
        """
        if self._writer.is_closing():
            return
        frame = _encoder.encode(message)
        self._writer.writelines((len(frame).to_bytes(_LENGTH_BYTES, "little"), frame))
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            raise WireError(f"{MAX_UNSENT_BYTES} bytes wait to be read")

    async def send(self, message: Message) -> None:
        """Send, then wait while much of what was sent is unread. Raises: as `post`."""
        self.post(message)
        with contextlib.suppress(ConnectionError):  # the reader learns of it
            await self._writer.drain()

    async def receive(self) -> M | None:
        """The next message; None when the other end is gone.

        Raises:
            WireError: it is none.
        """
        self._num_read += 1
        if self._num_read % FRAMES_PER_TURN == 0:
            await asyncio.sleep(0)
        try:
            while not self.has_next:
                if (length := self._next_bytes()) > MAX_FRAME_BYTES:
                    raise WireError(f"a frame of {length} bytes")
                if not (chunk := await self._reader.read(_CHUNK_BYTES)):
                    return None
                self._unread += chunk
            end = _LENGTH_BYTES + self._next_bytes()
            frame = bytes(self._unread[_LENGTH_BYTES:end])
            del self._unread[:end]
            return self._decoder.decode(frame)
        except ConnectionError:
            return None
        except _NO_MESSAGE as error:
            raise WireError(f"not a message: {error}") from error

    @property
    def has_next(self) -> bool:
        """Whether `receive` will not wait for the other end."""
        return len(self._unread) >= _LENGTH_BYTES + self._next_bytes()

    def _next_bytes(self) -> int:
        """Of the next message; 0 while that is not known."""
        length = self._unread[:_LENGTH_BYTES]
        return int.from_bytes(length, "little") if len(length) == _LENGTH_BYTES else 0

    def close(self) -> None:
        """Hang up, once what was sent is on its way."""
        self._writer.close()
