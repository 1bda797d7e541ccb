"""Requests of the two generating endpoints: what they may hold.

Names and meanings are OpenAI's; fields marked "vLLM" are vLLM's additions. Whatever is wrong
with a request raises `InvalidRequest` whose `param` names the field as the client spelled it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from pie_async.chat_options import TEMPLATE_VARIABLES
from pie_async.errors import InvalidRequest
from pie_async.openai.conversation import MAX_MESSAGES, Message, read_conversation
from pie_async.openai.json_errors import respelled
from pie_async.openai.prompts import PromptField, read_prompts
from pie_async.openai.structure import StructureFields
from pie_async.openai.tools import MAX_TOOLS, Tool, Toolbox, ToolChoice, read_toolbox
from pie_async.sampling_params import (
    MAX_SEQUENCES_PER_REQUEST,
    MAX_STOP_STRINGS,
    MAX_TOP_LOGPROBS,
    SamplingParams,
    check_counts,
)

DEFAULT_COMPLETION_TOKENS = 16

Int32 = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


def _documented(**limits: float) -> msgspec.Meta:
    """Limits as the OpenAPI document tells them; `SamplingParams` checks them, in its own words."""
    return msgspec.Meta(extra_json_schema=dict(limits))


Share = Annotated[float, _documented(minimum=0, maximum=1)]
Penalty = Annotated[float, _documented(minimum=-2, maximum=2)]
TopLogprobs = Annotated[Int32, _documented(minimum=0, maximum=MAX_TOP_LOGPROBS)]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream carries beside the text."""

    include_usage: bool | None = None


class GenerationRequest(StructureFields, frozen=True, kw_only=True):
    """What both endpoints take. None everywhere means: not given, or null."""

    model: str | None = None
    n: Annotated[Int32, _documented(minimum=1, maximum=MAX_SEQUENCES_PER_REQUEST)] | None = None
    temperature: Annotated[float, _documented(minimum=0, maximum=2)] | None = None
    top_p: Annotated[float, _documented(exclusiveMinimum=0, maximum=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, float] | None = None
    seed: Int64 | None = None
    stop: str | Annotated[list[str], _documented(maxItems=MAX_STOP_STRINGS)] | None = None
    max_tokens: Annotated[Int32, _documented(minimum=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # vLLM
    top_k: Annotated[Int32, _documented(minimum=-1)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, _documented(exclusiveMinimum=0)] | None = None
    min_tokens: Annotated[Int32, _documented(minimum=0)] | None = None
    stop_token_ids: list[Int32] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: Int32 | None = None
    cache_salt: str | None = None

    @property
    def is_streamed(self) -> bool:
        return bool(self.stream)

    @property
    def has_default_limit(self) -> bool:
        """Whether the limit on the output is ours and not the client's."""
        return False

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def check(self) -> None:
        """Refuse lists that are too long, and combinations of fields that make no sense.

        Raises:
            InvalidRequest: naming the field.
        """
        check_counts(self)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options may only be given with stream: true", param="stream_options"
            )

    def shared_params(self) -> SamplingParams:
        """The sampling parameters that both endpoints spell the same way.

        Raises:
            InvalidRequest: a value is out of range; `param` names it.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        given = {name: getattr(self, name) for name in _SAME_NAME}
        return SamplingParams(
            **{name: value for name, value in given.items() if value is not None},
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=_token_biases(self.logit_bias),
            max_tokens=None,  # each endpoint has its own default
            output_kind="delta" if self.stream else "final",
        )


_SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], _documented(minItems=1, maxItems=MAX_MESSAGES)]
    max_completion_tokens: Annotated[Int32, _documented(minimum=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Annotated[list[Tool], _documented(maxItems=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    """"none": the model is told not to think, if it can be."""
    # vLLM
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        for name, value in (self.chat_template_kwargs or {}).items():
            if type(value) is not TEMPLATE_VARIABLES.get(name):
                allowed = ", ".join(f"{each} (true or false)" for each in TEMPLATE_VARIABLES)
                raise InvalidRequest(
                    f"chat_template_kwargs may hold {allowed} and nothing else",
                    param="chat_template_kwargs",
                )
        if self.top_logprobs is None:
            return
        if not self.logprobs:
            raise InvalidRequest(
                "top_logprobs may only be given with logprobs: true", param="top_logprobs"
            )
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidRequest(
                f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}, not {self.top_logprobs}",
                param="top_logprobs",
            )

    @property
    def limit_field(self) -> str:
        """Which of its two spellings limits the output; the newer one wins."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def sampling_params(self) -> SamplingParams:
        """Raises InvalidRequest naming the field."""
        params = self.shared_params()
        with respelled({"max_tokens": self.limit_field}):
            return msgspec.structs.replace(
                params,
                max_tokens=getattr(self, self.limit_field),
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            )

    def toolbox(self) -> Toolbox:
        """What may and must be called. Raises: see `read_toolbox`."""
        return read_toolbox(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def template_variables(self) -> dict[str, bool]:
        """What the chat template is told besides."""
        given = {"enable_thinking": False} if self.reasoning_effort == "none" else {}
        return {**given, **(self.chat_template_kwargs or {})}

    def prompts(self) -> list[list[Mapping[str, Any]]]:
        """The conversation, as the only prompt. Raises: see `read_conversation`."""
        return [read_conversation(self.messages)]


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: PromptField
    best_of: Int32 | None = None
    echo: bool | None = None
    logprobs: TopLogprobs | None = None

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest(
                "best_of is not supported; leave it out and ask for n choices", param="best_of"
            )

    @property
    def has_default_limit(self) -> bool:
        return self.max_tokens is None

    @property
    def is_scoring(self) -> bool:
        """Nothing is to be generated."""
        return bool(self.echo) and self.max_tokens == 0

    def sampling_params(self) -> SamplingParams:
        """Raises InvalidRequest naming the field."""
        max_tokens = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return msgspec.structs.replace(
            self.shared_params(),
            max_tokens=1 if self.is_scoring else max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
        )

    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt: texts or token ids. Raises: see `read_prompts`."""
        return read_prompts(self.prompt, n=self.n or 1)


def _token_biases(biases: Mapping[str, float] | None) -> dict[int, float] | None:
    if not biases:
        return None
    for key in biases:
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and str(int(key)) == key):
            raise InvalidRequest(
                f'logit_bias has the key {key[:40]!r}; keys are token ids such as "42"',
                param="logit_bias",
            )
    return {int(key): bias for key, bias in biases.items()}
