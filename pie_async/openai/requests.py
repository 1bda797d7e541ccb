"""Requests of the two generating endpoints: what they may hold, read from JSON.

Names and meanings are OpenAI's; fields marked "vLLM" are vLLM's additions. Whatever is wrong
with a request raises `InvalidRequest` whose `param` names the field as the client spelled it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Generic, TypeVar

import msgspec

from pie_async.errors import InvalidRequest
from pie_async.openai.refused import REFUSED_FOR_CHAT, REFUSED_FOR_COMPLETIONS, RefusedFields
from pie_async.sampling_params import MAX_TOP_LOGPROBS, SamplingParams, check_counts

DEFAULT_COMPLETION_TOKENS = 16
MAX_CHOICES = 2048
"""Most prompts times `n` of one completions request."""

Int32 = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream carries beside the text."""

    include_usage: bool | None = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints take. None everywhere means: not given, or null."""

    model: str | None = None
    n: Int32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    max_tokens: Int32 | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # vLLM
    top_k: Int32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Int32 | None = None
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


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a message's content; only text can be answered."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: list[msgspec.Raw] | None = None


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: Int32 | None = None
    logprobs: bool | None = None
    top_logprobs: Int32 | None = None

    def check(self) -> None:
        super().check()
        if not self.messages:
            raise InvalidRequest("messages must hold at least one message", param="messages")
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

    def prompt(self) -> list[Mapping[str, str]]:
        """The conversation as the chat template takes it: a role and a text per message.

        Raises:
            InvalidRequest: a role or a content that cannot be rendered, e.g.
                `messages[2].content[0].type`.
        """
        return [_chat_message(message, index) for index, message in enumerate(self.messages)]


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[int | str | list[int]]
    best_of: Int32 | None = None
    echo: bool | None = None
    logprobs: Int32 | None = None

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest(
                "best_of is not supported; leave it out and ask for n choices", param="best_of"
            )

    def sampling_params(self) -> SamplingParams:
        """Raises InvalidRequest naming the field."""
        max_tokens = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return msgspec.structs.replace(
            self.shared_params(),
            max_tokens=max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
        )

    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt: texts or token ids.

        Raises:
            InvalidRequest: empty, mixed, or more than `MAX_CHOICES` choices in all.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        prompts = _several_prompts(self.prompt)
        if len(prompts) * (self.n or 1) > MAX_CHOICES:
            raise InvalidRequest(
                f"{len(prompts)} prompts with n={self.n or 1} are more than {MAX_CHOICES} choices; "
                "send several requests",
                param="prompt",
            )
        return prompts


RequestT = TypeVar("RequestT", ChatRequest, CompletionRequest)


class RequestReader(Generic[RequestT]):
    """Reads one endpoint's bodies."""

    def __init__(self, kind: type[RequestT], refused: RefusedFields) -> None:
        self._decoder: msgspec.json.Decoder[RequestT] = msgspec.json.Decoder(kind)
        self._refused = refused

    def read(self, body: bytes) -> RequestT:
        """The request that the body spells.

        Raises:
            InvalidRequest: not JSON, a wrong type, or a field that is not supported.
        """
        if not body.strip():
            raise InvalidRequest("the body is empty; send a JSON object")
        try:
            request = self._decoder.decode(body)
            self._refused.check(body)
        except msgspec.ValidationError as error:
            raise _wrong_type(str(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"the body is not JSON: {error}") from error
        except RecursionError as error:
            raise InvalidRequest("the body's JSON is nested too deeply") from error
        request.check()
        return request


CHAT_READER = RequestReader(ChatRequest, REFUSED_FOR_CHAT)
COMPLETION_READER = RequestReader(CompletionRequest, REFUSED_FOR_COMPLETIONS)


@contextmanager
def respelled(spelling: Mapping[str | None, str]) -> Iterator[None]:
    """Within it, an `InvalidRequest` names the client's field instead of ours."""
    try:
        yield
    except InvalidRequest as error:
        named = spelling.get(error.param)
        if named is not None and named != error.param:
            if error.param is not None and (text := str(error)).startswith(f"{error.param} "):
                error.args = (named + text.removeprefix(error.param),)
            error.param = named
        raise


_AT_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>\w+)`")


def _wrong_type(text: str) -> InvalidRequest:
    match = _AT_PATH.match(text)
    what, path = (match["what"], match["path"]) if match else (text, None)
    if missing := _MISSING.fullmatch(what):
        param = f"{path}.{missing['name']}" if path else missing["name"]
        return InvalidRequest(f"{param} is required", param=param)
    if path is None:
        return InvalidRequest(f"the body must be a JSON object: {what}")
    return InvalidRequest(f"{path}: {what}", param=path)


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


def _several_prompts(items: list[int | str | list[int]]) -> list[str] | list[list[int]]:
    texts = [item for item in items if isinstance(item, str)]
    tokens = [item for item in items if isinstance(item, int)]
    token_lists = [item for item in items if isinstance(item, list)]
    if not items or not all(token_lists):
        raise InvalidRequest("prompt must not be an empty list", param="prompt")
    if len(texts) == len(items):
        return texts
    if len(tokens) == len(items):
        return [tokens]
    if len(token_lists) == len(items):
        return token_lists
    raise InvalidRequest(
        "prompt must be a text, a list of texts, a list of token ids or a list of lists of "
        "token ids, not a mixture",
        param="prompt",
    )


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""OpenAI's "developer" takes the place of "system"; templates know only the latter."""


def _chat_message(message: Message, index: int) -> dict[str, str]:
    where = f"messages[{index}]"
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidRequest(
            f"{where}.role is {message.role[:40]!r}; it must be one of {', '.join(_ROLES)}",
            param=f"{where}.role",
        )
    if message.tool_calls:
        raise InvalidRequest(
            f"{where}.tool_calls is not supported by this server; leave it out",
            param=f"{where}.tool_calls",
        )
    if message.content is None:
        raise InvalidRequest(f"{where}.content is required", param=f"{where}.content")
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    texts = [
        _part_text(part, f"{where}.content[{number}]")
        for number, part in enumerate(message.content)
    ]
    return {"role": role, "content": "\n".join(texts)}  # joined as vLLM joins them


def _part_text(part: ContentPart, where: str) -> str:
    if part.type != "text":
        raise InvalidRequest(
            f"{where}.type is {part.type[:40]!r}; only text content is supported",
            param=f"{where}.type",
        )
    if part.text is None:
        raise InvalidRequest(f"{where}.text is required", param=f"{where}.text")
    return part.text
