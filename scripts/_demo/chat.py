"""The clients of the demo: chats that are streamed, and when their tokens came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec

from pie_async.measurements import RequestTimes


class Scene(msgspec.Struct, frozen=True):
    """What is asked of the model: who is on stage, and the first line."""

    cast: str
    line: str

    @property
    def messages(self) -> list[dict[str, str]]:
        return [
            {"role": "system", "content": f"A scene with {self.cast}."},
            {"role": "user", "content": self.line},
        ]


SCENES = (
    Scene("ROMEO, JULIET", "But soft! What light through yonder window breaks?"),
    Scene("KING RICHARD II, NORTHUMBERLAND", "What must the king do now? Must he submit?"),
    Scene("GLOUCESTER, LADY ANNE", "Was ever woman in this humour woo'd?"),
    Scene("MENENIUS, CORIOLANUS", "What news from Rome, and what say the people?"),
    Scene("PROSPERO, MIRANDA", "Canst thou remember a time before we came unto this cell?"),
    Scene("PETRUCHIO, KATHARINA", "Good morrow, Kate; for that's your name, I hear."),
    Scene("LEONTES, PAULINA", "Good lady, what is this they say of the queen?"),
    Scene("ISABELLA, ANGELO", "I am a woeful suitor to your honour; please but hear me."),
)


class Reply:
    """What one client has received."""

    def __init__(self, scene: Scene, *, prompt_tokens: int) -> None:
        self.scene = scene
        self.prompt_tokens = prompt_tokens
        self.text = ""
        self.times: RequestTimes | None = None
        """None until the request is sent."""

    @property
    def is_finished(self) -> bool:
        return self.times is not None and self.times.finished_s is not None

    async def receive(self, session: aiohttp.ClientSession, *, tokens: int, seed: int) -> None:
        """Ask for so many tokens and take them in as they come; a failure is noted in `times`."""
        clock = asyncio.get_running_loop().time
        self.times = RequestTimes(submitted_s=clock(), prompt_tokens=self.prompt_tokens)
        body = {
            "messages": self.scene.messages,
            "max_completion_tokens": tokens,
            "min_tokens": tokens,  # or replies end when they like, and the load is unknown
            "temperature": 0.8,
            "top_p": 0.95,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async for event in _events(session, body):
                self._take(event, self.times, clock())
        except (aiohttp.ClientError, ConnectionError, ValueError) as error:
            self.times.error = str(error) or type(error).__name__
        self.times.finished_s = clock()

    def _take(self, event: dict[str, Any], times: RequestTimes, now_s: float) -> None:
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                self.text += text
                times.arrived(now_s, 1)
        if usage := event.get("usage"):
            # a chunk carries more than one token when a character is made of several
            times.output_tokens = usage["completion_tokens"]


async def _events(
    session: aiohttp.ClientSession, body: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event.

    Raises:
        ValueError: the server refused the request or ended the answer, and said why.
        aiohttp.ClientError: it cannot be reached, or broke off.
    """
    async with session.post("/v1/chat/completions", json=body) as answer:
        if answer.status != 200:
            raise ValueError(f"status {answer.status}: {await answer.text()}")
        async for line in answer.content:
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            event = msgspec.json.decode(data)
            if "error" in event:
                raise ValueError(event["error"]["message"])
            yield event
