"""What an answer must look like, in the spellings of OpenAI and of vLLM."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec

from pie_async.errors import InvalidRequest
from pie_async.structured import StructuredOutputs

MAX_SCHEMA_BYTES = 256 * 1024

Schema = Annotated[
    msgspec.Raw, msgspec.Meta(description="A JSON schema.", extra_json_schema={"type": "object"})
]
"""Kept raw: llguidance reads it."""
_ABSENT = (b"", b"null")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class JsonSchemaFormat(msgspec.Struct, frozen=True, kw_only=True):
    """`json_schema` of a response format. Every schema is followed strictly."""

    name: str | None = None
    schema: Schema = msgspec.field(default_factory=msgspec.Raw)
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's field of the same name."""

    type: Annotated[
        str, msgspec.Meta(extra_json_schema={"enum": ["text", "json_object", "json_schema"]})
    ]
    json_schema: JsonSchemaFormat | None = None

    def guide(self) -> StructuredOutputs | None:
        """None: anything will do."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutputs(json_object=True)
        if self.type != "json_schema":
            raise _refusal(
                "response_format.type",
                f"is {self.type[:40]!r}; it must be text, json_object or json_schema",
            )
        if self.json_schema is None:
            raise _refusal("response_format.json_schema", "is required")
        name = self.json_schema.name
        if name is not None and not _NAME.fullmatch(name):
            raise _refusal(
                "response_format.json_schema.name", "must be 1 to 64 letters, digits, '_' or '-'"
            )
        schema = _text_of(self.json_schema.schema)
        if schema is None:
            raise _refusal(SCHEMA_FIELD, "is required")
        return StructuredOutputs(json=schema)


SCHEMA_FIELD = "response_format.json_schema.schema"


class StructuredOutputsField(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's field `structured_outputs`."""

    json: Schema = msgspec.field(default_factory=msgspec.Raw)
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: Annotated[Any, msgspec.Meta(description="Not supported.")] = None

    def guide(self) -> StructuredOutputs | None:
        """None: nothing is given."""
        if self.structural_tag is not None:
            raise _refusal("structured_outputs.structural_tag", "is not supported; leave it out")
        given: dict[str, Any] = {
            "json": _schema_of(self.json),
            "json_object": self.json_object,
            "regex": self.regex,
            "choice": None if self.choice is None else tuple(self.choice),
            "grammar": self.grammar,
        }
        if all(value is None for value in given.values()):
            return None
        return StructuredOutputs(**given)


class StructureFields(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a request that say what its answers must look like; one may be given."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsField | None = None
    """vLLM"""
    guided_json: Schema = msgspec.field(default_factory=msgspec.Raw)
    """vLLM, older, as those that follow."""
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def guide(self) -> tuple[StructuredOutputs, dict[str | None, str]] | None:
        """What guides the outputs, and how the client spelled its fields; None: nothing does.

        Raises:
            InvalidRequest: naming the field.
        """
        given = list(self._given())
        if len(given) > 1:
            (_, first), (_, second) = given[:2]
            raise InvalidRequest(
                f"{second} cannot be given together with {first}; each says what the output must "
                "look like",
                param=second,
            )
        if not given:
            return None
        guide, name = given[0]
        return guide, {f"structured_outputs.{guide.kind}": _spelled(name, guide)}

    def _given(self) -> Iterator[tuple[StructuredOutputs, str]]:
        for name in ("response_format", "structured_outputs"):
            field = getattr(self, name)
            if field is not None and (guide := field.guide()) is not None:
                yield guide, name
        older: dict[str, Any] = {
            "json": _schema_of(self.guided_json),
            "regex": self.guided_regex,
            "choice": self.guided_choice,
            "grammar": self.guided_grammar,
        }
        for kind, value in older.items():
            if value is not None:
                try:
                    yield StructuredOutputs(**{kind: value}), f"guided_{kind}"
                except InvalidRequest as error:
                    own = f"structured_outputs.{kind}"
                    text = str(error).replace(own, f"guided_{kind}", 1)
                    raise InvalidRequest(text, param=f"guided_{kind}") from None


def _spelled(name: str, guide: StructuredOutputs) -> str:
    if name == "response_format":
        return SCHEMA_FIELD if guide.kind == "json" else name
    return f"{name}.{guide.kind}" if name == "structured_outputs" else name


def _text_of(raw: msgspec.Raw) -> str | None:
    text = bytes(raw)
    return None if text in _ABSENT else text.decode()


def _schema_of(raw: msgspec.Raw) -> str | None:
    """A schema given as JSON, or as a text that holds JSON."""
    text = _text_of(raw)
    if text is None or not text.startswith('"'):
        return text
    return msgspec.json.decode(text, type=str)


def _refusal(param: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{param} {what}", param=param)
