"""Fields that would change what is asked for and are not supported: refused by name.

Anything else that is unknown is ignored, as OpenAI-compatible servers do, so that clients
which send hints (`user`, `metadata`, `service_tier`, ...) work unchanged.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pie_async.errors import InvalidRequest

_NEUTRAL_FOR_BOTH: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
_NEUTRAL_FOR_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    **_NEUTRAL_FOR_BOTH,
    "add_special_tokens": (True,),
    "prompt_embeds": (),
    "suffix": ("",),
}
_NEUTRAL_FOR_CHAT: dict[str, tuple[Any, ...]] = {
    **_NEUTRAL_FOR_BOTH,
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}


class RefusedFields:
    """Finds fields of one endpoint that this server cannot honour.

    A field passes when it is absent, null, or one of the values given here, which ask for
    nothing beyond what the server does anyway.
    """

    def __init__(self, neutral: dict[str, tuple[Any, ...]]) -> None:
        self._neutral = neutral
        fields: list[tuple[str, Any, Any]] = [(name, Any, None) for name in neutral]
        self._decoder = msgspec.json.Decoder(msgspec.defstruct("Refused", fields, kw_only=True))

    def check(self, body: bytes) -> None:
        """Look through a body that is known to be a JSON object.

        Raises:
            InvalidRequest: naming the field.
        """
        sent = self._decoder.decode(body)
        for name, neutral in self._neutral.items():
            value = getattr(sent, name)
            if value is not None and value not in neutral:
                raise InvalidRequest(
                    f"{name} is not supported by this server; leave it out",
                    param=name,
                    code="unsupported_parameter",
                )


REFUSED_FOR_CHAT = RefusedFields(_NEUTRAL_FOR_CHAT)
REFUSED_FOR_COMPLETIONS = RefusedFields(_NEUTRAL_FOR_COMPLETIONS)
