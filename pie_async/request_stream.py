"""A request's outputs on their way to its reader.

The delivery actor pushes what happened; the reader takes what is new whenever it likes. A
slow reader costs nothing but the text itself: what it missed is waiting for it in one piece. One
that takes nothing for long is noticed (`readers.py`), and its sequences are paused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from pie_async.core.stop_strings import StopMatcher
from pie_async.errors import GuideFailed, PieError, SequenceLost
from pie_async.ids import SequenceId
from pie_async.messages import Advance, FirstToken, PromptLogprobs, SampledToken
from pie_async.outputs import (
    CompletionOutput,
    FinishReason,
    Logprob,
    OutputShortcut,
    RequestOutput,
    SequenceTimes,
    TokenLogprobs,
)
from pie_async.sampling_params import SamplingParams


class TextDecoder(Protocol):
    """Turns one sequence's tokens into text, never splitting a character."""

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


TokenText = Callable[[int], str]


class SequenceOutput:
    """One sequence's output so far."""

    def __init__(
        self, index: int, params: SamplingParams, decoder: TextDecoder, token_text: TokenText
    ) -> None:
        self.index = index
        self._params = params
        self._decoder = decoder
        self._token_text = token_text
        self._stops = StopMatcher(params.stop, include_stop=params.include_stop_str_in_output)
        self._text: list[str] = []
        self.tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._taken = (0, 0)  # pieces of text and tokens that a delta reader has
        self._has_end = False  # whether it has been told the finish reason
        self._first: tuple[FirstToken, float] | None = None  # and when it came
        self._times: SequenceTimes | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None

    @property
    def has_news(self) -> bool:
        """Whether `take` has something that it has not given yet."""
        if self.finish_reason is not None and not self._has_end:
            return True
        return self._taken != (len(self._text), len(self.tokens))

    def push(self, advance: Advance) -> bool:
        """Take in what happened; True if the text reached a stop string just now."""
        if advance.first is not None:
            self._first = advance.first, _now_s()
        has_stopped = self._take_in(advance)
        if self.finish_reason is not None and self._first is not None:
            first, came_s = self._first
            self._times = SequenceTimes(
                queued_s=first.queued_s, prefill_s=first.prefill_s, decode_s=_now_s() - came_s
            )
        return has_stopped

    def _take_in(self, advance: Advance) -> bool:
        if advance.token is not None:
            self.tokens.append(advance.token.token)
            if self._params.logprobs is not None:
                self._logprobs.append(logprobs_of(advance.token, self._token_text))
            if self._shows_text(advance) and self._add_text(self._decoder.push(self.tokens[-1])):
                return True
        if advance.finish_reason is not None:
            self._finish(advance)
        return False

    def _shows_text(self, advance: Advance) -> bool:
        """A token that ended the output is no text, unless it was asked for."""
        is_end = advance.finish_reason == "stop"
        is_wanted = self._params.include_stop_str_in_output and advance.stop_token is not None
        return not is_end or is_wanted

    def _add_text(self, text: str) -> bool:
        if not self._params.stop or len(self.tokens) < self._params.min_tokens:
            if text:
                self._text.append(text)
            return False
        visible, stop = self._stops.feed(text)
        if visible:
            self._text.append(visible)
        if stop is not None:
            self.finish_reason, self.stop_reason = "stop", stop
        return stop is not None

    def _finish(self, advance: Advance) -> None:
        if self._add_text(self._decoder.flush()):
            return
        rest = self._stops.flush()
        if rest:
            self._text.append(rest)
        self.finish_reason = advance.finish_reason
        self.stop_reason = advance.stop_token

    def take(self, *, is_delta: bool) -> CompletionOutput:
        """What there is, or what is new since the last call."""
        texts, tokens = self._taken if is_delta else (0, 0)
        self._taken = (len(self._text), len(self.tokens))
        self._has_end = self.finish_reason is not None
        has_logprobs = self._params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text="".join(self._text[texts:]),
            token_ids=tuple(self.tokens[tokens:]),
            logprobs=tuple(self._logprobs[tokens:]) if has_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            times=self._times,
        )


def logprobs_of(token: SampledToken, token_text: TokenText) -> TokenLogprobs:
    """The chosen token first, then the likeliest ones in order."""
    entries = {token.token: Logprob(token.logprob, token.rank, token_text(token.token))}
    for rank, (other, logprob) in enumerate(token.top, start=1):
        entries.setdefault(other, Logprob(logprob, rank, token_text(other)))
    return entries


def failure_of(advance: Advance) -> PieError | None:
    """The error that ends a sequence's request, if one does."""
    if advance.lost_because is not None:
        return SequenceLost(f"{advance.lost_because}; send the request again")
    if advance.unguided_because is not None:
        return GuideFailed(
            f"the output cannot go on as structured_outputs wants it: {advance.unguided_because}"
        )
    return None


class RequestStream:
    """An async iterator of one request's `RequestOutput`s.

    Leave it early through `aclose()` (or `contextlib.aclosing`) and the request is cancelled.
    """

    def __init__(
        self,
        *,
        request_id: str,
        prompt: str | None,
        prompt_tokens: tuple[int, ...],
        params: SamplingParams,
        sequences: Sequence[SequenceId],
        outputs: Sequence[SequenceOutput],
        cancel: Callable[[RequestStream], None],
        token_text: TokenText,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_tokens
        self.params = params
        self.sequences = tuple(sequences)
        self._prompt = prompt
        self._outputs = dict(zip(sequences, outputs, strict=True))
        self._cancel = cancel
        self._token_text = token_text
        self._prompt_logprobs: list[TokenLogprobs | None] = [None]
        self._num_cached = 0
        self._error: PieError | None = None
        self._is_over = False
        self._is_cancelled = False
        self._num_open = len(self._outputs)
        self._has_news = False
        self._has_end = False
        """An output has ended, and the reader was not told yet."""
        self._reader: asyncio.Future[None] | None = None
        self.num_taken = 0
        """Outputs that the reader has."""
        self.is_read = True
        """False: its reader took nothing for so long that its sequences are paused."""
        self.shortcut: OutputShortcut | None = None
        """Takes outputs instead of whoever waits for them: waking a task for each costs a
        server a quarter of its time."""
        self.on_read: Callable[[RequestStream], None] | None = None
        """Called when somebody asks for the next output after all."""

    # --- the reader's side ------------------------------------------------------------------

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output, waiting for news.

        Raises:
            EngineStopped: the engine ended before the request did.
        """
        if self._is_over:
            raise StopAsyncIteration
        if self.on_read is not None:
            self.on_read(self)
        self.num_taken += 1
        while not self._is_due:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if self._error is not None:
            self._is_over = True
            raise self._error
        self._is_over = self.is_finished
        return self._output()

    def cancel(self) -> None:
        """End the request now; the stream then ends with finish reason "abort"."""
        if not (self._is_cancelled or self.is_finished or self._error is not None):
            self._is_cancelled = True
            self._cancel(self)

    async def aclose(self) -> None:
        """Stop reading; what still runs is cancelled."""
        self._is_over = True
        self.cancel()

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens, once for each sequence."""
        return len(self.prompt_token_ids) * len(self.sequences)

    @property
    def is_finished(self) -> bool:
        return self._num_open == 0

    @property
    def unfinished(self) -> tuple[SequenceId, ...]:
        return tuple(seq for seq, out in self._outputs.items() if out.finish_reason is None)

    def tokens_of(self, sequence: SequenceId) -> Sequence[int]:
        """A sequence's output so far, which grows."""
        return self._outputs[sequence].tokens

    @property
    def has_waiting_output(self) -> bool:
        """Whether there is output that its reader, who once began to read, does not take."""
        return self._is_due and self.num_taken > 0 and self._reader is None and self._num_open > 0

    @property
    def _is_due(self) -> bool:
        if self._error is not None or self._num_open == 0:
            return True
        return self._has_news and self.params.output_kind != "final"

    def _output(self) -> RequestOutput:
        is_delta = self.params.output_kind == "delta"
        self._has_news = self._has_end = False
        shown = [out for out in self._outputs.values() if not is_delta or out.has_news]
        prompt_logprobs = None
        if self.params.prompt_logprobs is not None:
            prompt_logprobs = tuple(self._prompt_logprobs)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=tuple([output.take(is_delta=is_delta) for output in shown]),
            finished=self.is_finished,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self._num_cached,
        )

    # --- the delivery actor's side -----------------------------------------------------------

    def push(self, advance: Advance) -> bool:
        """Take in what happened to a sequence; True if it reached a stop string just now.

        Nothing more may be pushed for a sequence that has ended. Nobody hears of it before `tell`.
        """
        output = self._outputs[advance.sequence]
        has_stopped = output.push(advance)
        if output.finish_reason is not None:
            self._num_open -= 1
            self._has_end = True
        if advance.first is not None and advance.sequence == self.sequences[0]:
            # The others found what this one computed: for the request that is not saved.
            self._num_cached = advance.first.cached_tokens
        self._has_news = True
        return has_stopped

    def tell(self) -> None:
        """After pushing: let whoever waits for an output have it.

        Outputs that only go on are sent to the shortcut, if it is open.
        """
        if self._reader is None or self._reader.done() or not self._is_due:
            return
        shortcut = self.shortcut
        if shortcut is None or self._has_end or self._error is not None or not shortcut.is_open():
            self._reader.set_result(None)
        else:
            self.num_taken += 1
            shortcut.send(self._output())

    def push_prompt(self, entry: PromptLogprobs) -> None:
        """Take in logprobs of prompt tokens; those of the first sequence stand for all."""
        known = len(self._prompt_logprobs) - entry.first
        if entry.sequence == self.sequences[0] and known >= 0:
            # A prompt computed again after a preemption may be cut into other chunks.
            new = entry.tokens[known:]
            self._prompt_logprobs += [logprobs_of(token, self._token_text) for token in new]

    def fail(self, error: PieError) -> None:
        """End the stream with an error, unless all its outputs are complete."""
        if not self.is_finished:
            self._error = error
        self.tell()


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def names_of(streams: Iterable[RequestStream]) -> dict[SequenceId, str]:
    """What callers call the requests that sequences belong to."""
    return {sequence: stream.request_id for stream in streams for sequence in stream.sequences}
