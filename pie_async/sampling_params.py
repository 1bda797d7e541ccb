"""What a caller may ask of sampling, checked at the door."""

from __future__ import annotations

import functools
import math
from collections.abc import Sized
from typing import Any, Literal, NoReturn

import msgspec

from pie_async.errors import InvalidRequest
from pie_async.structured import StructuredOutputs

MAX_SEQUENCES_PER_REQUEST = 128
MAX_STOP_STRINGS = 16
"""OpenAI takes 4, vLLM any number. Each is looked for in every character of the output."""
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
"""As vLLM (v1/worker/gpu/sample/logit_bias.py)."""
MAX_LOGIT_BIASES = 1024
"""As vLLM, in the same file. Every lane of the device is given room for the most that came."""
MAX_TOP_LOGPROBS = 20

_LONGEST = {
    "stop": (MAX_STOP_STRINGS, "stop strings"),
    "stop_token_ids": (MAX_STOP_TOKEN_IDS, "token ids"),
    "logit_bias": (MAX_LOGIT_BIASES, "entries"),
}

OutputKind = Literal["cumulative", "delta", "final"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one request's tokens are chosen and when they end.

    Names and meanings follow vLLM's class of the same name, so that callers can switch.
    Lists do for tuples, one string for `stop`, and None for no stops. Construction raises
    `InvalidRequest`, whose `param` names the field.
    """

    n: int = 1
    """Output sequences to generate for the prompt, 1..128."""
    temperature: float = 1.0
    """0 is greedy; otherwise logits are divided by it."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 and -1 keep all."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities reach this sum, in (0, 1]."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one, in [0, 1]."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token already in the output, -2..2."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the output, -2..2."""
    repetition_penalty: float = 1.0
    """Divides (or multiplies, if negative) logits of tokens in prompt or output, > 0."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these token ids, -100..100."""
    seed: int | None = None
    """Same seed, same prompt: same tokens, whatever else runs. None draws one."""
    max_tokens: int | None = 16
    """Most output tokens; None means up to the context's end."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens are masked until this many output tokens exist."""
    stop: tuple[str, ...] = ()
    """Strings that end the output; they are not part of the text unless asked for."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output, in addition to the model's own."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence token."""
    logprobs: int | None = None
    """Log-probabilities of the chosen and of this many likeliest tokens, 0..20."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, 0..20."""
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None
    """What every output must look like; it then ends as soon as nothing may follow."""
    output_kind: OutputKind = "cumulative"
    """What each output of a stream holds: all so far, what is new, or one final output."""

    def __post_init__(self) -> None:
        check_counts(self)
        self._check_types()
        self._check_choice()
        self._check_penalties()
        self._check_end()
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                _check_range(name, count, 0, MAX_TOP_LOGPROBS)

    def _check_types(self) -> None:
        # Past this point a wrong type would surface in an actor and end the engine.
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            if getattr(self, name) is None:  # the default in vLLM
                msgspec.structs.force_setattr(self, name, ())
        for name, kind in _types():
            value = getattr(self, name)
            try:
                converted = msgspec.convert(value, kind)
            except msgspec.ValidationError as error:
                _refuse(name, f"{name} is {value!r}: {error}")
            if converted is not value:
                msgspec.structs.force_setattr(self, name, converted)

    def _check_choice(self) -> None:
        _check_range("n", self.n, 1, MAX_SEQUENCES_PER_REQUEST)
        _check_range("temperature", self.temperature, 0.0, 2.0)
        if self.top_k < -1:
            _refuse("top_k", f"top_k must be -1 or 0 (keep all) or positive, not {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            _refuse("top_p", f"top_p must be above 0 and at most 1, not {self.top_p}")
        _check_range("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _check_range("seed", self.seed, -(2**63), 2**63 - 1)

    def _check_penalties(self) -> None:
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0.0):
            _refuse(
                "repetition_penalty",
                f"repetition_penalty must be above 0, not {self.repetition_penalty}",
            )
        for bias in (self.logit_bias or {}).values():
            _check_range("logit_bias", bias, -100.0, 100.0)

    def _check_end(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            _refuse("max_tokens", f"max_tokens must be at least 1, not {self.max_tokens}")
        if self.min_tokens < 0:
            _refuse("min_tokens", f"min_tokens must not be negative, not {self.min_tokens}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse(
                "min_tokens",
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})",
            )
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_STRING_CHARS:
                _refuse(
                    "stop",
                    f"stop: a stop string must have 1 to {MAX_STOP_STRING_CHARS} characters, "
                    f"not {len(text)}",
                )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def counts_tokens(self) -> bool:
        """Whether sampling depends on which tokens came before (the penalties)."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that this model does not have.

        Raises:
            InvalidRequest: naming the field.
        """
        for name, ids in (
            ("logit_bias", self.logit_bias or {}),
            ("stop_token_ids", self.stop_token_ids),
        ):
            for token in ids:
                if not 0 <= token < vocab_size:
                    last = vocab_size - 1
                    _refuse(name, f"{name} has token id {token}; valid ids are 0 to {last}")


def check_counts(fields: object) -> None:
    """Refuse lists that are too long, before anything looks at what is in them.

    Args:
        fields: has the attributes `stop`, `stop_token_ids` and `logit_bias`, of any type.

    Raises:
        InvalidRequest: naming the field, its length and the limit.
    """
    for name, (most, things) in _LONGEST.items():
        value = getattr(fields, name)
        if isinstance(value, Sized) and not isinstance(value, str) and len(value) > most:
            _refuse(name, f"{name} has {len(value)} {things}; at most {most} are allowed")


@functools.cache
def _types() -> tuple[tuple[str, Any], ...]:
    """The fields and their types; resolving the annotations takes a while."""
    return tuple((field.name, field.type) for field in msgspec.structs.fields(SamplingParams))


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        _refuse(name, f"{name} must be between {low} and {high}, not {value}")


def _refuse(param: str, message: str) -> NoReturn:
    raise InvalidRequest(message, param=param) from None
