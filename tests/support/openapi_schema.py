"""Checks JSON values against the component schemas of an OpenAPI 3.1 document.

Knows the keywords that OpenAI's response schemas use, and reports keys that a schema lacks, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


class SchemaBook:
    """The schemas of one document, by name."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._schemas = document["components"]["schemas"]

    def errors(self, name: str, value: Any) -> list[str]:
        """What is wrong with the value, one line per place; empty if it conforms."""
        return list(self._check(self._schemas[name], value, "$"))

    def _check(self, schema: dict[str, Any], value: Any, at: str) -> Iterator[str]:
        is_nullable = schema.get("nullable", False)
        while "$ref" in schema:
            schema = self._schemas[schema["$ref"].rsplit("/", 1)[1]]
            is_nullable = is_nullable or schema.get("nullable", False)
        if value is None and is_nullable:
            return
        if options := schema.get("anyOf") or schema.get("oneOf"):
            failures = [list(self._check(option, value, at)) for option in options]
            if all(failures):
                # those of the option that was meant: right at the top, wrong further in
                meant = [found for found in failures if not found[0].startswith(f"{at}: ")]
                yield from min(meant or failures, key=len)
            return
        for part in schema.get("allOf", ()):
            yield from self._check(part, value, at)
        yield from self._check_plain(schema, value, at)

    def _check_plain(self, schema: dict[str, Any], value: Any, at: str) -> Iterator[str]:
        allowed = _TYPES.get(schema.get("type", ""))
        is_wrong_bool = isinstance(value, bool) and schema.get("type") != "boolean"
        if allowed is not None and (not isinstance(value, allowed) or is_wrong_bool):
            yield f"{at}: {value!r} is not of type {schema['type']}"
            return
        if "enum" in schema and value not in schema["enum"]:
            yield f"{at}: {value!r} is not one of {schema['enum']}"
        if isinstance(value, dict):
            yield from self._check_object(schema, value, at)
        if isinstance(value, list) and "items" in schema:
            for index, item in enumerate(value):
                yield from self._check(schema["items"], item, f"{at}[{index}]")

    def _check_object(
        self, schema: dict[str, Any], value: dict[str, Any], at: str
    ) -> Iterator[str]:
        properties = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{at}: {name} is missing"
        for name, item in value.items():
            if name in properties:
                yield from self._check(properties[name], item, f"{at}.{name}")
            elif properties:
                yield f"{at}: {name} is not in the schema"
