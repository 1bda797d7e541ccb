"""What a conversation's chat template is told beside the messages, as plain data."""

from __future__ import annotations

from typing import Any

import msgspec

TEMPLATE_VARIABLES: dict[str, type] = {"enable_thinking": bool}
"""What a request may set for the template: nothing that could change more than the text. (Of vLLM's
templates one argument made the tokenizer run where it blocked everything, CVE-2025-62426.)"""


class ChatOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `Engine.submit` takes with a conversation."""

    tools: tuple[dict[str, Any], ...] = ()
    """Tools that the model may call, as OpenAI spells them: `{"type": "function", "function":
    {"name": ..., "description": ..., "parameters": JSON schema}}`. Templates that know no tools
    leave them out."""
    variables: dict[str, bool] = {}
    """Of `TEMPLATE_VARIABLES`."""
