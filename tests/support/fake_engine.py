"""A scripted engine for the tests of everything that stands in front of one.

Every character is a token (its code point), every prompt gets the scripted reply, and nothing
happens without being allowed to: `gate` holds all streams back at a token of the test's choice.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from pie_async.chat_options import ChatOptions
from pie_async.errors import ContextTooLong, EngineStopped, InvalidRequest, PieError
from pie_async.intake import check_cache_salt
from pie_async.live.timeline import Timeline
from pie_async.live.view import EngineView, MemoryMap
from pie_async.metrics import EngineStats
from pie_async.outputs import (
    CompletionOutput,
    Logprob,
    OutputShortcut,
    RequestOutput,
    TokenLogprobs,
)
from pie_async.sampling_params import SamplingParams

VOCAB_SIZE = 0x3000
CACHED_TOKENS = 2


NOTHING_TO_SEE = EngineView(
    now_s=0.0,
    stats=EngineStats(),
    memory=MemoryMap(
        num_layers=2, groups=(0, 1), ring_depth=2, arena=".", ring="", pool="",
        arena_slots=1, ring_slots=0, pool_slots=0,
    ),
    sequences=(),
    limits=(),
    spans=(),
)  # fmt: skip


@dataclass(frozen=True)
class FakeModel:
    name: str = "fake-model"
    max_model_len: int = 256
    vocab_size: int = VOCAB_SIZE
    writes_tools_as: str = "hermes"
    thinks: bool = False


class CharTokenizer:
    """A token is a character."""

    vocab_size = VOCAB_SIZE

    def encode(self, text: str) -> list[int]:
        return [min(ord(char), VOCAB_SIZE - 1) for char in text]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))

    def token_text(self, token: int) -> str:
        return chr(token)


@dataclass(frozen=True)
class Submission:
    """What the engine was asked for."""

    prompt: str | Sequence[int] | Sequence[Mapping[str, str]]
    params: SamplingParams
    request_id: str
    priority: int
    cache_salt: str | None = None
    chat: ChatOptions | None = None


@dataclass
class FakeEngine:
    reply: str = "Hello, world"
    hold_at: int | None = None
    """Output token before which every stream waits for `gate`."""
    fail_at: int | None = None
    """Output token before which a stream raises `failure`."""
    failing: int | None = None
    """Which submission fails so; None: every one."""
    failure: BaseException = field(default_factory=lambda: EngineStopped("the engine failed"))
    refusal: PieError | None = None
    """What every submit raises, if anything."""
    refuse_after: int = 0
    """Submits that pass before `refusal` applies."""
    cancels_at: int | None = None
    """Output token before which the engine itself ends every sequence as cancelled."""
    model: FakeModel = field(default_factory=FakeModel)
    tokenizer: CharTokenizer = field(default_factory=CharTokenizer)
    is_running: bool = True
    is_accepting: bool = True
    snapshot: EngineStats = field(default_factory=EngineStats)
    seen: EngineView = field(default_factory=lambda: NOTHING_TO_SEE)
    """What `look` shows."""
    looks: list[float] = field(default_factory=list)
    """What each look asked for."""

    def __post_init__(self) -> None:
        self.gate = asyncio.Event()
        self.holding = asyncio.Event()
        """Set when a stream waits at the gate."""
        self.cancelled = asyncio.Event()
        """Set when a request was cancelled before its end."""
        self.submissions: list[Submission] = []
        self.cancelled_ids: list[str] = []
        self.open_ids: set[str] = set()

    def stats(self) -> EngineStats:
        return self.snapshot

    async def tokenize(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        return list(self._tokens(prompt))

    async def look(self, *, since_s: float = math.inf) -> EngineView:
        if not self.is_running:
            raise EngineStopped("the engine is restarting")
        self.looks.append(since_s)
        return msgspec.structs.replace(self.seen, now_s=asyncio.get_running_loop().time())

    async def timeline(self, *, last_iterations: int = 200) -> Timeline:
        return Timeline(now_s=1.0, spans=self.seen.spans, requests=(), limits=(), iterations=0)

    async def submit(
        self,
        prompt: str | Sequence[int] | Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        chat: ChatOptions | None = None,
    ) -> FakeStream:
        params = params or SamplingParams()
        check_cache_salt(cache_salt)
        await asyncio.sleep(0)  # the real one tokenizes in a thread
        if self.refusal is not None and len(self.submissions) >= self.refuse_after:
            raise self.refusal
        tokens = self._tokens(prompt)
        params.check_vocabulary(VOCAB_SIZE)
        request_id = request_id or f"request-{len(self.submissions)}"
        assert request_id not in self.open_ids, "request ids must be distinct"
        self.submissions.append(Submission(prompt, params, request_id, priority, cache_salt, chat))
        self.open_ids.add(request_id)
        return FakeStream(self, request_id, tokens, params)

    def _tokens(self, prompt: str | Sequence[int] | Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt)
        elif prompt and isinstance(prompt[0], Mapping):
            turns = "".join(f"{turn['role']}: {turn['content']}\n" for turn in prompt)
            tokens = self.tokenizer.encode(turns)
        else:
            tokens = list(prompt)
        if not tokens:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if any(not 0 <= token < VOCAB_SIZE for token in tokens):
            raise InvalidRequest("a token id is out of range", param="prompt")
        if len(tokens) >= self.model.max_model_len:
            raise ContextTooLong("the prompt is too long", param="prompt")
        return tuple(tokens)


class FakeStream:
    """One request's outputs: one token of every choice at a time, or one final output."""

    def __init__(
        self, engine: FakeEngine, request_id: str, prompt: tuple[int, ...], params: SamplingParams
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt
        self.shortcut: OutputShortcut | None = None  # every output waits for its step
        self._engine = engine
        self._number = len(engine.submissions) - 1
        self._params = params
        self._token = 0
        self._is_over = False
        self._text, self._ended_by = self._script()

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._is_over:
            raise StopAsyncIteration
        if self._params.output_kind == "final":
            while self._token < len(self._text):
                await self._pass_gate()
                self._token += 1
            return self._last(self._text, len(self._text))
        await self._pass_gate()
        if self._engine.cancels_at == self._token:
            self._close()
            return self._output("", ended_by="abort")
        char = self._text[self._token : self._token + 1]
        self._token += 1
        if self._token >= len(self._text):
            return self._last(char, self._token)
        return self._output(char, ended_by=None)

    def cancel(self) -> None:
        if not self._is_over:
            self._engine.cancelled_ids.append(self.request_id)
            self._engine.cancelled.set()
            self._close()

    async def _pass_gate(self) -> None:
        if self._engine.fail_at == self._token and self._engine.failing in (None, self._number):
            self._close()
            raise self._engine.failure
        if self._engine.hold_at == self._token:
            self._engine.holding.set()
            await self._engine.gate.wait()
        await asyncio.sleep(0)

    def _last(self, text: str, at: int) -> RequestOutput:
        self._close()
        first = at - len(text) == 0
        return self._output(text, ended_by=self._ended_by, is_first=first)

    def _close(self) -> None:
        self._is_over = True
        self._engine.open_ids.discard(self.request_id)

    def _script(self) -> tuple[str, str]:
        text, ended_by = self._engine.reply, "stop"
        for stop in self._params.stop:
            if (at := text.find(stop)) >= 0:
                text = text[: at + len(stop) * self._params.include_stop_str_in_output]
        limit = self._params.max_tokens
        if limit is not None and limit < len(text):
            text, ended_by = text[:limit], "length"
        return text, ended_by

    def _output(
        self, text: str, *, ended_by: str | None, is_first: bool | None = None
    ) -> RequestOutput:
        tokens = tuple(self._engine.tokenizer.encode(text))
        is_first = self._token <= 1 if is_first is None else is_first
        return RequestOutput(
            request_id=self.request_id,
            prompt=None,
            prompt_token_ids=self.prompt_token_ids,
            outputs=tuple(
                CompletionOutput(
                    index=index,
                    text=text,
                    token_ids=tokens,
                    logprobs=self._logprobs(tokens, self._params.logprobs),
                    finish_reason=ended_by,
                )
                for index in range(self._params.n)
            ),
            finished=ended_by is not None,
            prompt_logprobs=self._prompt_logprobs() if is_first else None,
            num_cached_tokens=CACHED_TOKENS,
        )

    def _prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        known = self._logprobs(self.prompt_token_ids[1:], self._params.prompt_logprobs)
        return None if known is None else (None, *known)

    def _logprobs(
        self, tokens: Sequence[int], count: int | None
    ) -> tuple[TokenLogprobs, ...] | None:
        return None if count is None else tuple(token_logprobs(token, count) for token in tokens)


def token_logprobs(token: int, count: int) -> TokenLogprobs:
    """The token is the second likeliest; its code-point neighbours are the others."""
    entry = {token: Logprob(-1.0, 2, chr(token))}
    ranks = [1, *range(3, count + 1)] if count else []
    for rank in ranks:
        entry[token + rank] = Logprob(-0.5 * rank, rank, chr(token + rank))
    return entry
