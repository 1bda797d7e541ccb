"""The door: what a prompt becomes, and whether a request can run at all."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

import msgspec

from pie_async.assembly import ChatMessage, Tokenizer
from pie_async.chat_options import ChatOptions
from pie_async.errors import ContextTooLong, InvalidRequest
from pie_async.model_info import ModelInfo
from pie_async.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pie_async.model.guides import GuideCompiler

Prompt = str | Sequence[int] | Sequence[ChatMessage]
"""A text, token ids, or a conversation of {"role": ..., "content": ...} messages."""

INLINE_CHARS = 2048
"""Longer texts are tokenised in a thread, so that the loop never waits for them."""
MOST_CHARS_PER_TOKEN = 16
"""A prompt longer than this times the context cannot fit and is not even tokenised."""
MAX_CACHE_SALT_CHARS = 256


class Intake(msgspec.Struct, frozen=True):
    """Turns prompts into tokens and refuses what one model cannot run."""

    tokenizer: Tokenizer
    model: ModelInfo
    compiler: GuideCompiler

    async def tokenize(self, prompt: Prompt, chat: ChatOptions | None = None) -> list[int]:
        """The token ids that a prompt becomes; conversations and long texts in a thread.

        Raises:
            InvalidRequest, ContextTooLong: it is not a prompt, or could never fit.
        """
        if isinstance(prompt, str):
            if len(prompt) <= INLINE_CHARS:
                return self._encode(prompt)
            return await asyncio.to_thread(self._encode, prompt)
        _check_is_list(prompt)
        if not prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if isinstance(prompt[0], Mapping):
            return await asyncio.to_thread(self._encode_chat, prompt, chat)
        self._check_count(len(prompt))
        return list(prompt)  # type: ignore[arg-type]  # `check` looks at what is in it

    async def check_guide(self, params: SamplingParams) -> None:
        """Compile what guides the outputs, in a thread, to see that it can be.

        Raises:
            InvalidRequest: it is not valid; `param` names the field.
        """
        guide = params.structured_outputs
        if guide is None:
            return
        if self.compiler.is_inline:
            self.compiler.check(guide)
        else:
            await asyncio.to_thread(self.compiler.check, guide)

    def _encode(self, text: str) -> list[int]:
        self._check_chars(len(text))
        return self.tokenizer.encode(text, most_tokens=self.model.max_model_len)

    def _encode_chat(self, conversation: Sequence[object], chat: ChatOptions | None) -> list[int]:
        messages = _checked_messages(conversation)
        tools = msgspec.json.encode(chat.tools) if chat is not None and chat.tools else b""
        self._check_chars(len(tools) + sum(len(message["content"]) for message in messages))
        return self.tokenizer.encode_chat(
            messages, most_tokens=self.model.max_model_len, options=chat
        )

    def _check_chars(self, num_chars: int) -> None:
        most_chars = self.model.max_model_len * MOST_CHARS_PER_TOKEN
        if num_chars > most_chars:
            raise ContextTooLong(
                f"the prompt has {num_chars} characters; a context of "
                f"{self.model.max_model_len} tokens cannot hold more than {most_chars}",
                param="prompt",
            )

    def _check_count(self, num_tokens: int) -> None:
        longest = self.model.max_model_len
        if num_tokens >= longest:
            raise ContextTooLong(
                f"the prompt has {num_tokens} tokens; this model and memory hold {longest} "
                "with at least one of output",
                param="prompt",
            )

    def check(self, tokens: Sequence[int], params: SamplingParams) -> int:
        """Refuse what could not run; the most output tokens this request may have.

        Raises:
            InvalidRequest, ContextTooLong: naming the parameter.
        """
        vocab_size, longest = self.model.vocab_size, self.model.max_model_len
        if not tokens:
            raise InvalidRequest("the prompt is empty", param="prompt")
        self._check_count(len(tokens))
        room = longest - len(tokens)
        if not (_are_integers(tokens) and min(tokens) >= 0 and max(tokens) < vocab_size):
            _refuse_first_wrong(tokens, vocab_size)
        params.check_vocabulary(vocab_size)
        if params.max_tokens is not None and params.max_tokens > room:
            raise ContextTooLong(
                f"{len(tokens)} prompt tokens and max_tokens {params.max_tokens} exceed the "
                f"context of {longest} tokens; lower max_tokens to {room} or shorten the prompt",
                param="max_tokens",
            )
        return min(room, params.max_tokens) if params.max_tokens is not None else room


def check_cache_salt(salt: str | None) -> None:
    """Refuse what is no tenant's salt.

    Raises:
        InvalidRequest: naming `cache_salt`.
    """
    if salt is None:
        return
    if not isinstance(salt, str):
        raise InvalidRequest(f"cache_salt is {salt!r}, not a text", param="cache_salt")
    if not 0 < len(salt) <= MAX_CACHE_SALT_CHARS:
        raise InvalidRequest(
            f"cache_salt must have 1 to {MAX_CACHE_SALT_CHARS} characters, not {len(salt)}",
            param="cache_salt",
        )
    if not salt.isprintable():  # which also keeps out halves of characters, that have no bytes
        raise InvalidRequest("cache_salt must be printable characters", param="cache_salt")


def _are_integers(prompt: Sequence[object]) -> TypeGuard[Sequence[int]]:
    """Of this very type: at 100,000 items 3 ms, where `isinstance` for each would take 30."""
    return set(map(type, prompt)) == {int}


def _refuse_first_wrong(tokens: Sequence[int], vocab_size: int) -> None:
    for token in tokens:
        if not (isinstance(token, int) and 0 <= token < vocab_size):
            raise InvalidRequest(
                f"prompt has token id {str(token)[:40]}; valid ids are 0 to {vocab_size - 1}",
                param="prompt",
            )


def _check_is_list(prompt: object) -> None:
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Sequence):
        raise InvalidRequest(
            "a prompt is a text, a list of token ids or a list of messages, not "
            f"{type(prompt).__name__}",
            param="prompt",
        )


def _checked_messages(messages: Sequence[object]) -> list[ChatMessage]:
    checked: list[ChatMessage] = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidRequest("a prompt is all messages or all token ids", param="prompt")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise InvalidRequest(
                    f"message {index} needs a text as its {key!r}", param=f"messages[{index}]"
                )
        checked.append(message)
    return checked
