"""A body's outline: what can be refused before anything in it is built.

Building Python objects from 4 MiB of JSON can take a second, in which nothing else of the
process runs; skipping them takes 10 ms. So its strings are counted, in 3 ms, and then a first pass
looks at raw fields: those that would change what is asked for and are not supported, and those
that are longer than any that passes.

Anything else that is unknown is ignored, as OpenAI-compatible servers do, so that clients
which send hints (`user`, `metadata`, `service_tier`, ...) work unchanged.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pie_async.config import KIB
from pie_async.errors import InvalidRequest
from pie_async.openai.conversation import MAX_MESSAGES
from pie_async.openai.prompts import MAX_TOKEN_IDS, least_strings
from pie_async.openai.structure import MAX_SCHEMA_BYTES
from pie_async.openai.tools import MAX_TOOLS_BYTES
from pie_async.sampling_params import (
    MAX_LOGIT_BIASES,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)

_ABSENT = msgspec.Raw()

_NEUTRAL_FOR_BOTH: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
_NEUTRAL_FOR_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    **_NEUTRAL_FOR_BOTH,
    "add_special_tokens": (True,),
    "max_completion_tokens": (),
    "prompt_embeds": (),
    "suffix": ("",),
}
_NEUTRAL_FOR_CHAT: dict[str, tuple[Any, ...]] = {
    **_NEUTRAL_FOR_BOTH,
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "web_search_options": (),
}


_LONGEST = {
    "stop": 2 * 6 * MAX_STOP_STRINGS * MAX_STOP_STRING_CHARS,  # of escaped pairs of surrogates
    "stop_token_ids": 64 * MAX_STOP_TOKEN_IDS,
    "logit_bias": 64 * MAX_LOGIT_BIASES,
    "stream_options": 64 * KIB,
    "chat_template_kwargs": 4 * KIB,
    "tokens": 16 * MAX_TOKEN_IDS,
    "metadata": 32 * KIB,
    "text": 2 * MAX_SCHEMA_BYTES,
    "tool_choice": 4 * KIB,
    "tools": MAX_TOOLS_BYTES,
    **dict.fromkeys(
        (
            "response_format",
            "structured_outputs",
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
        ),
        2 * MAX_SCHEMA_BYTES,  # a schema that is a text within JSON is longer than the schema
    ),
}
"""Bytes of JSON that these fields may have. Less than fits means more items than are allowed, or
much white space."""
_MOST_BYTES_OF_NEUTRAL = 64
_MOST_STRINGS = 16 * MAX_MESSAGES
"""Names of fields counted in. A call of a tool, of which there may be as many as messages, has ten;
a message of text four."""


class Outline:
    """Checks the bodies of one endpoint.

    A field that is not supported passes when it is absent, null, or one of the values given
    here, which ask for nothing beyond what the server does anyway.
    """

    def __init__(self, neutral: dict[str, tuple[Any, ...]]) -> None:
        self._neutral = neutral
        names = dict.fromkeys((*neutral, *_LONGEST))
        fields: list[tuple[str, Any, Any]] = [(name, msgspec.Raw, _ABSENT) for name in names]
        self._decoder = msgspec.json.Decoder(msgspec.defstruct("Outline", fields, kw_only=True))

    def check(self, body: bytes) -> None:
        """Look through a body.

        Raises:
            InvalidRequest: naming the field.
            msgspec.DecodeError: the body is no JSON object.
        """
        _check_strings(body)
        sent = self._decoder.decode(body)
        for name, most in _LONGEST.items():
            if (size := len(getattr(sent, name))) > most:
                raise InvalidRequest(
                    f"{name} has {size} bytes of JSON; at most {most} are read", param=name
                )
        for name, neutral in self._neutral.items():
            if not _is_neutral(getattr(sent, name), neutral):
                raise InvalidRequest(
                    f"{name} is not supported by this server; leave it out",
                    param=name,
                    code="unsupported_parameter",
                )


def _check_strings(body: bytes) -> None:
    if len(body) <= 2 * _MOST_STRINGS:
        return
    strings = least_strings(body)
    if strings > _MOST_STRINGS:
        raise InvalidRequest(
            f"the body has {strings} names and texts; at most {_MOST_STRINGS} are read"
        )


def _is_neutral(raw: msgspec.Raw, neutral: tuple[Any, ...]) -> bool:
    if len(raw) > _MOST_BYTES_OF_NEUTRAL:
        return False
    value = msgspec.json.decode(raw) if len(raw) else None
    return value is None or value in neutral


_NEUTRAL_FOR_RESPONSES: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}

OUTLINE_OF_TOKENS = Outline({"add_special_tokens": (True,), "chat_template": ()})
OUTLINE_OF_RESPONSES = Outline(_NEUTRAL_FOR_RESPONSES)
OUTLINE_OF_CHAT = Outline(_NEUTRAL_FOR_CHAT)
OUTLINE_OF_COMPLETIONS = Outline(_NEUTRAL_FOR_COMPLETIONS)
