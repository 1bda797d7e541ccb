"""Tools that a chat request offers, and what its `tool_choice` asks for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from pie_async.errors import InvalidRequest
from pie_async.openai.structure import Schema
from pie_async.parsing.events import ArgumentsParser, Parser
from pie_async.parsing.tool_calls import ArrayParser, ToolFormat, tool_parser
from pie_async.structured import StructuredOutputs

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 256 * 1024
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}


class Function(msgspec.Struct, frozen=True, kw_only=True):
    """What can be called."""

    name: str
    description: str | None = None
    parameters: Schema = msgspec.field(default_factory=lambda: msgspec.Raw(b"null"))
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """One of the tools offered."""

    type: Annotated[str, msgspec.Meta(extra_json_schema={"const": "function"})]
    function: Function | None = None


class NamedFunction(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class NamedChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The tool that must be called."""

    type: Annotated[str, msgspec.Meta(extra_json_schema={"const": "function"})]
    function: NamedFunction


ToolChoice = (
    Annotated[str, msgspec.Meta(extra_json_schema={"enum": ["none", "auto", "required"]})]
    | NamedChoice
)


class Toolbox(NamedTuple):
    """What a request's answers may and must call."""

    tools: tuple[dict[str, Any], ...] = ()
    """As templates read them."""
    mode: Literal["none", "auto", "required", "named"] = "none"
    name: str = ""
    """Of the tool that must be called."""
    one_only: bool = False
    """At most one call of an answer is passed on."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool["function"]["name"] for tool in self.tools)

    def guide(self) -> StructuredOutputs | None:
        """What makes the model call, if it must."""
        if self.mode == "named":
            schemas = {tool["function"]["name"]: _parameters(tool) for tool in self.tools}
            return StructuredOutputs(json=schemas[self.name])
        if self.mode == "required":
            return StructuredOutputs(json=_calls_schema(self.tools, one_only=self.one_only))
        return None

    def parser(self, tool_format: ToolFormat) -> Parser | None:
        """What finds the calls in one output; None if there can be none."""
        match self.mode:
            case "none":
                return None
            case "named":
                return ArgumentsParser(self.name)
            case "required":
                return ArrayParser()
            case "auto":
                return tool_parser(tool_format, self.names)


def read_toolbox(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None
) -> Toolbox:
    """What these fields of a request ask for.

    Raises:
        InvalidRequest: naming the field, e.g. `tools[2].function.name`.
    """
    tools = tools or ()
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(
            f"tools has {len(tools)} tools; at most {MAX_TOOLS} are allowed", param="tools"
        )
    read = tuple(_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools))
    names = [tool["function"]["name"] for tool in read]
    if len(set(names)) < len(names):
        raise InvalidRequest("tools has several tools of the same name", param="tools")
    one_only = parallel is False
    if choice is None or choice in ("none", "auto"):
        if choice == "none" or not read:  # what may not be called is not shown either
            return Toolbox()
        return Toolbox(read, "auto", one_only=one_only)
    if isinstance(choice, str) and choice != "required":
        raise InvalidRequest(
            f"tool_choice is {choice[:40]!r}; it must be none, auto, required or name a function",
            param="tool_choice",
        )
    if not read:
        raise InvalidRequest("tool_choice asks for a call, but there are no tools", param="tools")
    if isinstance(choice, str):
        return Toolbox(read, "required", one_only=one_only)
    if choice.function.name not in names:
        raise InvalidRequest(
            f"tool_choice.function.name is {choice.function.name[:64]!r}, which is not in tools",
            param="tool_choice.function.name",
        )
    return Toolbox(read, "named", choice.function.name, one_only=True)


def _read_tool(tool: Tool, where: str) -> dict[str, Any]:
    if tool.type != "function":
        raise InvalidRequest(
            f"{where}.type is {tool.type[:40]!r}; only functions can be called",
            param=f"{where}.type",
        )
    function = tool.function
    if function is None:
        raise InvalidRequest(f"{where}.function is required", param=f"{where}.function")
    if not _NAME.fullmatch(function.name):
        raise InvalidRequest(
            f"{where}.function.name must be 1 to 64 letters, digits, '_', '-', '.' or ':'",
            param=f"{where}.function.name",
        )
    described: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        described["description"] = function.description
    parameters = msgspec.json.decode(function.parameters)
    if parameters is not None:
        if not isinstance(parameters, dict):
            raise InvalidRequest(
                f"{where}.function.parameters must be a JSON schema: an object",
                param=f"{where}.function.parameters",
            )
        described["parameters"] = parameters
    return {"type": "function", "function": described}


def _parameters(tool: dict[str, Any]) -> dict[str, Any]:
    parameters: dict[str, Any] = tool["function"].get("parameters") or _ANY_ARGUMENTS
    return parameters


def _calls_schema(tools: Sequence[dict[str, Any]], *, one_only: bool) -> dict[str, Any]:
    """Of an array of calls. Each tool's schema becomes a definition, its references with it."""
    definitions = {
        f"tool{number}": _rebased(_parameters(tool), f"#/$defs/tool{number}")
        for number, tool in enumerate(tools)
    }
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": {"$ref": f"#/$defs/tool{number}"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for number, tool in enumerate(tools)
    ]
    return {
        "type": "array",
        "minItems": 1,
        **({"maxItems": 1} if one_only else {}),
        "items": {"anyOf": calls},
        "$defs": definitions,
    }


def _rebased(schema: Any, root: str) -> Any:
    """The schema with its references, which count from its own root, counted from another one."""
    if isinstance(schema, list):
        return [_rebased(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _rebased(value, root)
        for key, value in schema.items()
    }
