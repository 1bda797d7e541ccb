"""Text to tokens and back, from the files of a Hugging Face model directory."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pie_async.chat_options import ChatOptions
from pie_async.errors import ContextTooLong, InvalidRequest
from pie_async.model.chat_template import ChatMessage
from pie_async.model.confined_template import ConfinedTemplate
from pie_async.model.control_tokens import ControlTokens, split_marked, unused_characters
from pie_async.model.detokenizer import (
    ByteDetokenizer,
    Detokenizer,
    TokenBytes,
    WindowDetokenizer,
)
from pie_async.model.tokenizer_files import (
    read_backend,
    read_chat_template,
    read_eos_ids,
    read_json,
    special_token_names,
)

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from tokenizers import Tokenizer as Backend

__all__ = ["ChatMessage", "Detokenizer", "Tokenizer"]


_PIECE_CHARS = 32 * 1024


class Tokenizer:
    """A model's tokenizer and chat template.

    Safe to use from several threads. Encoding takes about a second per megabyte of text and
    is not for the event loop; detokenizers are.

    Attributes:
        vocab_size: one more than the largest token id; a model's may be larger (padding).
        eos_ids: tokens that end an output, from generation_config.json (or else config.json)
            and tokenizer_config.json.
        bos_id: the token that begins a text, if there is one.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        eos_ids: tuple[int, ...] = (),
        bos_id: int | None = None,
        chat_template: ConfinedTemplate | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        self._token_bytes = TokenBytes.of(backend)
        self._control = ControlTokens(backend)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos_ids = eos_ids
        self.bos_id = bos_id

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """Read tokenizer.json and, where they exist, the files that say more.

        Raises:
            ModelError: tokenizer.json is missing, or a file is damaged; names the file.
        """
        backend = read_backend(path / "tokenizer.json")
        config = read_json(path / "tokenizer_config.json")
        names = special_token_names(config, read_json(path / "special_tokens_map.json"))
        return cls(
            backend,
            eos_ids=read_eos_ids(path, backend, names),
            bos_id=backend.token_to_id(names["bos_token"]) if "bos_token" in names else None,
            chat_template=read_chat_template(path, config, names),
        )

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(
        self, text: str, *, add_special_tokens: bool = True, most_tokens: int | None = None
    ) -> list[int]:
        """Token ids of a prompt. Control tokens spelled out in it become control tokens.

        Args:
            add_special_tokens: whether what tokenizer.json adds (a begin-of-sequence token,
                usually) is added.
            most_tokens: stop early when it has many more, for then nobody wants them.

        Raises:
            InvalidRequest: the text contains lone surrogates.
            ContextTooLong: it has many more than `most_tokens`.
        """
        _check_unicode(text, "prompt")
        if most_tokens is not None and len(text) > most_tokens:
            self._check_length(text, most_tokens)
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _check_length(self, text: str, most_tokens: int) -> None:
        """Count piece by piece, until it is too much.

        Freeing the tokenizer's result holds the interpreter, 0.2 s for a million tokens, and
        4 MiB take it ten seconds. Where pieces are cut a few tokens too many are counted.
        """
        num_tokens = 0
        for first in range(0, len(text), _PIECE_CHARS):
            piece = text[first : first + _PIECE_CHARS]
            num_tokens += len(self._backend.encode(piece, add_special_tokens=False))
            if num_tokens > most_tokens * 9 // 8 + _PIECE_CHARS // 16:
                raise ContextTooLong(
                    f"the prompt has more than {num_tokens * 8 // 9} tokens, at most {most_tokens} "
                    "fit",
                    param="prompt",
                )

    def render_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        options: ChatOptions | None = None,
    ) -> str:
        """The prompt text of a conversation.

        Raises:
            InvalidRequest: there is no chat template, or it refuses these messages.
        """
        if self._chat_template is None:
            raise InvalidRequest(
                "this model has no chat template; send a plain prompt instead", param="messages"
            )
        for index, message in enumerate(messages):
            for field, value in message.items():
                for text in _strings(value):
                    _check_unicode(text, f"messages[{index}].{field}")
        options = options or ChatOptions()
        for text in _strings(options.tools):
            _check_unicode(text, "tools")
        return self._chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=options.tools,
            options=options.variables,
        )

    def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        most_tokens: int | None = None,
        options: ChatOptions | None = None,
    ) -> list[int]:
        """Token ids of a conversation. Control tokens come from the template alone.

        What spells a control token inside a message or a tool is encoded as the text it is: it is
        put in marks before rendering, and the marked parts of the rendered text are encoded apart.
        Messages without such text, nearly all, are encoded exactly as rendered.

        Raises:
            InvalidRequest: as `render_chat`; or a message spells a control token and the
                template's outcome depends on that, so that it cannot be told apart.
            ContextTooLong: as `encode`.
        """
        options = options or ChatOptions()
        rendered = self.render_chat(
            messages, add_generation_prompt=add_generation_prompt, options=options
        )
        texts = itertools.chain(_strings(messages), _strings(options.tools))
        if not any(map(self._control.is_in, texts)):
            return self.encode(rendered, add_special_tokens=False, most_tokens=most_tokens)
        if most_tokens is not None and len(rendered) > most_tokens:
            self._check_length(rendered, most_tokens)
        marks = unused_characters(rendered)
        if marks is None:
            raise InvalidRequest(
                "a message spells one of the model's control tokens among too many characters for "
                "private use to set it apart; remove it",
                param="messages",
            )

        def mark(text: str) -> str:
            return self._control.mark(text, marks)

        marked = self.render_chat(
            _with_strings(messages, mark),
            add_generation_prompt=add_generation_prompt,
            options=msgspec.structs.replace(
                options, tools=tuple(_with_strings(options.tools, mark))
            ),
        )
        if re.sub(f"[{marks}]", "", marked) != rendered:
            raise InvalidRequest(
                "a message spells one of the model's control tokens, which its chat template "
                "treats specially; remove it",
                param="messages",
            )
        return [
            token
            for part, is_plain in split_marked(marked, marks)
            for token in (self._control if is_plain else self).encode(
                part, add_special_tokens=False
            )
        ]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of these tokens; ids outside the vocabulary have none."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def has_token(self, text: str) -> bool:
        """Whether the vocabulary has a token that spells just this."""
        return self._backend.token_to_id(text) is not None

    def token_text(self, token: int) -> str:
        """One token as text, for display: spaces kept, part of a character replaced."""
        if self._token_bytes is None:
            return self.decode([token], skip_special_tokens=False)
        return self._token_bytes.get(token, skip_special_tokens=False).decode(errors="replace")

    def guide_tokens(self, vocab_size: int, end_ids: Sequence[int]) -> LLTokenizer:
        """See `guides.Spelling`. Takes a second for 100,000 tokens."""
        from llguidance import LLTokenizer

        return LLTokenizer(
            self._backend.to_str(), n_vocab=vocab_size, eos_token=list(end_ids) or None
        )

    def detokenizer(
        self, prompt_tokens: Sequence[int], *, skip_special_tokens: bool = True
    ) -> Detokenizer:
        """Incremental decoding of what follows this prompt."""
        if self._token_bytes is None:
            return WindowDetokenizer(
                self._backend, prompt_tokens, skip_special_tokens=skip_special_tokens
            )
        return ByteDetokenizer(
            self._token_bytes, prompt_tokens, skip_special_tokens=skip_special_tokens
        )


def _strings(value: Any) -> Iterator[str]:
    """Every string in plain data, keys aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _with_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Plain data with every string changed, keys aside."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _with_strings(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_with_strings(item, change) for item in value]
    return value


def _check_unicode(text: str, param: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{param} has half of a surrogate pair at character {error.start}; "
            "send well-formed Unicode",
            param=param,
        ) from None
