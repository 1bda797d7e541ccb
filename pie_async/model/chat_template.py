"""Chat templates, rendered as `transformers` renders them but without Jinja2.

Templates are programs that come with a model. They run in minijinja, which cannot reach
Python objects, and with a fuel limit, so that one that loops ends in an error.

Known differences from Jinja2: formatting a string with `%` is refused, and `str.title()` starts
words at white space only. What fuel does not limit, memory and time inside of filters, the process
limits that `ConfinedTemplate` renders in. Templates come from the model's directory, never from a
request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from minijinja import Environment, TemplateError

from pie_async.errors import InvalidRequest, ModelError

ChatMessage = Mapping[str, Any]
"""`role`, `content` and whatever else the model's template reads; strings and plain data."""

FUEL = 5_000_000
"""Instructions that one rendering may take: about a second, or 50,000 messages."""

_GENERATION_TAG = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


class ChatTemplate:
    """Turns messages into the prompt text that a model was tuned on.

    Args:
        source: the template.
        variables: what else the template may read: `bos_token`, `eos_token` and the like.
        path: the file it came from, for error messages.

    Raises:
        ModelError: the template is not well-formed.
    """

    def __init__(self, source: str, variables: Mapping[str, str], *, path: Path) -> None:
        self._variables = dict(variables)
        self._environment = Environment(trim_blocks=True, lstrip_blocks=True, fuel=FUEL)
        self._environment.add_filter("tojson", _tojson)
        self._environment.add_global("raise_exception", _raise_exception)
        self._environment.add_global("strftime_now", _strftime_now)
        try:
            self._environment.add_template("chat", _without_generation_tags(source))
        except TemplateError as error:
            raise ModelError(
                f"the chat template in {path} is not valid: {error.message}"
            ) from error

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, bool] | None = None,
    ) -> str:
        """The prompt text.

        Args:
            tools: what the model may call, if anything.
            options: further variables; those of the model's files win.

        Raises:
            InvalidRequest: the template refuses these messages, or takes too long over them.
        """
        try:
            return self._environment.render_template(
                "chat",
                messages=[dict(message) for message in messages],
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**(options or {}), **self._variables},
            )
        except _TemplateRefusal as refusal:
            reason = str(refusal)
        except TemplateError as error:
            is_endless = error.kind == "OutOfFuel"
            reason = "it takes too long over them" if is_endless else error.message
        raise InvalidRequest(
            f"the model's chat template cannot render these messages: {reason}", param="messages"
        )


class _TemplateRefusal(Exception):
    """What a template's own raise_exception() raises."""


def _without_generation_tags(source: str) -> str:
    """Keep what `{% generation %}` encloses: it marks text for training, and changes none."""
    return _GENERATION_TAG.sub(
        lambda tag: tag[1] + ("endif" if tag[2] else "if true") + tag[3], source
    )


def _raise_exception(message: str) -> None:
    raise _TemplateRefusal(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in `transformers`: plain JSON, without Jinja's escaping of HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
