"""A small client of the OpenAI completions API, for measuring servers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Self

import aiohttp
import msgspec

from pie_async.errors import PieError


class ServerError(PieError):
    """A server could not be reached, refused a request or broke off its answer."""


class CompletionsClient:
    """Streams completions of token prompts from any OpenAI-compatible server.

    Use it as an async context manager.

    Args:
        url: the server, with or without "/v1".
        model: what the server calls the model; None takes the first one it lists.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        temperature: float = 0.0,
    ) -> None:
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._model = model
        self._temperature = temperature
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10.0),
        )
        try:
            self._model = await self._find_model()
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def model(self) -> str:
        """The model that is asked."""
        assert self._model is not None, "the client has not been entered"
        return self._model

    async def _find_model(self) -> str:
        with named_failures(self._base):
            async with self._http.get(f"{self._base}/models") as answer:
                await check(answer)
                listed = [str(entry["id"]) for entry in (await answer.json())["data"]]
        if self._model is not None and self._model not in listed:
            raise ServerError(
                f"{self._base} has no model {self._model!r}; it has {', '.join(listed)}"
            )
        if not listed:
            raise ServerError(f"{self._base} serves no model")
        return self._model or listed[0]

    async def stream(
        self, prompt: Sequence[int], *, output_tokens: int
    ) -> AsyncGenerator[int, None]:
        """Number of output tokens, each time some arrive; they add up to what was counted.

        The prompt is sent as token ids and the end-of-sequence token is ignored, so that
        every server does the same work. A chunk counts as one token until the server's own
        count, at the end, corrects it.

        Raises:
            ServerError: the request failed.
        """
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": output_tokens,
            "temperature": self._temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        counted = 0
        with named_failures(self._base):
            async with self._http.post(f"{self._base}/completions", json=body) as answer:
                await check(answer)
                async for event in _events(answer):
                    if event.get("choices") and not _is_only_an_end(event):
                        counted += 1
                        yield 1
                    total = (event.get("usage") or {}).get("completion_tokens", 0)
                    if total > counted:
                        yield total - counted
                        counted = total

    async def chat(
        self, messages: Sequence[Mapping[str, str]], *, max_tokens: int
    ) -> AsyncGenerator[str, None]:
        """The pieces of the assistant's next message.

        Raises:
            ServerError: the request failed.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": self._temperature,
            "stream": True,
        }
        with named_failures(self._base):
            async with self._http.post(f"{self._base}/chat/completions", json=body) as answer:
                await check(answer)
                async for event in _events(answer):
                    for choice in event.get("choices") or ():
                        if text := choice.get("delta", {}).get("content"):
                            yield text

    @property
    def _http(self) -> aiohttp.ClientSession:
        assert self._session is not None, "use `async with`"
        return self._session


def _is_only_an_end(event: dict[str, Any]) -> bool:
    choice = event["choices"][0]
    return not choice.get("text") and choice.get("finish_reason") is not None


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event."""
    async for line in answer.content:
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        event = msgspec.json.decode(data)
        if "error" in event:
            raise ServerError(f"the server ended the answer: {_message(event)}")
        yield event
    raise ServerError("the server broke off the answer")


async def check(answer: aiohttp.ClientResponse) -> None:
    if answer.status == 200:
        return
    text = await answer.text()
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = _message(msgspec.json.decode(text))
    raise ServerError(f"the server answered {answer.status}: {text[:200]}")


def _message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)


@contextlib.contextmanager
def named_failures(base: str) -> Iterator[None]:
    try:
        yield
    except aiohttp.InvalidURL as error:
        raise ServerError(
            f"{base} is not a URL; write for example http://127.0.0.1:8000"
        ) from error
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise ServerError(f"cannot talk to {base}: {error or type(error).__name__}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ServerError(f"{base} does not answer as OpenAI's API does: {error}") from error
