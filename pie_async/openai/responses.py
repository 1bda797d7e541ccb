"""What the endpoints answer with: OpenAI's response objects and stream chunks."""

from __future__ import annotations

from typing import Literal

import msgspec

ChoiceEnd = Literal["stop", "length", "tool_calls"]


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything sent."""


# --- usage --------------------------------------------------------------------------------


class PromptDetails(Response, frozen=True, kw_only=True):
    """Prompt tokens whose KV was found instead of computed."""

    cached_tokens: int


class Usage(Response, frozen=True, kw_only=True):
    """Tokens of a whole request: each prompt once, the outputs of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


UsageField = Usage | msgspec.UnsetType | None
"""Absent from chunks unless asked for; then null in all but the last."""

# --- chat ---------------------------------------------------------------------------------


class TopLogprob(Response, frozen=True, kw_only=True):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TopLogprob, frozen=True, kw_only=True):
    """The token at a place and the likeliest ones there."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Response, frozen=True, kw_only=True):
    """Of one choice."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class FunctionCall(Response, frozen=True, kw_only=True):
    """What is called, with the text of a JSON object (or of what the model took for one)."""

    name: str
    arguments: str


class ToolCall(Response, frozen=True, kw_only=True):
    """A tool that the model wants called."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Response, frozen=True, kw_only=True):
    """What the model said."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    """What it wrote for itself, as vLLM and DeepSeek spell it."""
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(Response, frozen=True, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChoiceEnd


class ChatResponse(Response, frozen=True, kw_only=True):
    """Body of a chat completion that is not streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(Response, frozen=True, kw_only=True, omit_defaults=True):
    """What is new in a call: its name comes once, the arguments piece by piece."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Response, frozen=True, kw_only=True, omit_defaults=True):
    """A call that began, or a piece of its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(Response, frozen=True, kw_only=True, omit_defaults=True):
    """What is new in a choice. The role comes in the first chunk and never again."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Response, frozen=True, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChoiceEnd | None = None


class ChatChunk(Response, frozen=True, kw_only=True):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageField = msgspec.UNSET


# --- completions --------------------------------------------------------------------------


class CompletionLogprobs(Response, frozen=True, kw_only=True):
    """Of one choice, one entry per token in each list."""

    text_offset: list[int]
    """Where the token's text starts: characters since the start of the choice's text, counted
    over the tokens' own texts."""
    token_logprobs: list[float | None]
    """None for the first token of an echoed prompt, which nothing precedes."""
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Response, frozen=True, kw_only=True):
    """One choice, whole or, in a stream, what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: ChoiceEnd | None = None


class CompletionResponse(Response, frozen=True, kw_only=True):
    """Body of a completion, and of one event of a streamed completion."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageField = msgspec.UNSET


# --- models -------------------------------------------------------------------------------


class ModelCard(Response, frozen=True, kw_only=True):
    """One served model. `max_model_len` is vLLM's addition."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pie_async"
    max_model_len: int


class ModelList(Response, frozen=True, kw_only=True):
    """Body of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


# --- tokens -------------------------------------------------------------------------------


class Tokens(Response, frozen=True, kw_only=True):
    """Body of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]


class Text(Response, frozen=True, kw_only=True):
    """Body of POST /detokenize."""

    prompt: str


# --- server -------------------------------------------------------------------------------


class Health(Response, frozen=True, kw_only=True):
    """Body of GET /health while the server is alive."""

    status: Literal["ok"] = "ok"


class Readiness(Response, frozen=True, kw_only=True):
    """Body of GET /ready while requests are admitted."""

    status: Literal["ready"] = "ready"


class Version(Response, frozen=True, kw_only=True):
    """Body of GET /version."""

    version: str
