"""What a caller gets back. Names follow vLLM's classes of the same names."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

FinishReason = Literal["stop", "length", "abort"]


class Logprob(msgspec.Struct, frozen=True):
    """One token's log-probability (natural logarithm, before penalties and temperature)."""

    logprob: float
    rank: int
    """1 for the likeliest token."""
    decoded_token: str


TokenLogprobs = dict[int, Logprob]
"""By token id: the token itself and, where asked for, the likeliest ones, in rank order."""


class SequenceTimes(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Where a sequence's time went, in seconds; what it was parked or paused counts too."""

    queued_s: float
    """From its arrival at the engine until it ran first."""
    prefill_s: float
    """From then to its first token."""
    decode_s: float
    """From its first token to its end."""

    @property
    def inference_s(self) -> float:
        """From its start to its end."""
        return self.prefill_s + self.decode_s


class CompletionOutput(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One output sequence of a request."""

    index: int
    """0 .. n-1."""
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One entry per token of `token_ids`, when `SamplingParams.logprobs` is set."""
    finish_reason: FinishReason | None = None
    """None while the sequence goes on."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it, None for end-of-sequence and length."""
    times: SequenceTimes | None = None
    """With the finish reason, if there was a token."""


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A request's state, all of it or what is new, as `SamplingParams.output_kind` says."""

    request_id: str
    prompt: str | None
    """The prompt's text; None when token ids were given."""
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """One entry per prompt token, the first None, when asked for."""
    num_cached_tokens: int = 0
    """Prompt tokens whose KV was found instead of computed."""


class OutputShortcut(Protocol):
    """Takes a stream's outputs in the place of whoever waits for the next one."""

    def is_open(self) -> bool:
        """Whether it takes one now."""
        ...

    def send(self, output: RequestOutput) -> None:
        """Never raises."""
        ...
