"""Requests of /v1/responses, read as the chat requests that they amount to.

A stateless subset: nothing is kept, so what refers to kept things is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import msgspec

from pie_async.errors import InvalidRequest
from pie_async.openai.conversation import (
    MAX_MESSAGES,
    CalledFunction,
    ContentPart,
    Message,
    ToolCall,
    read_turn,
)
from pie_async.openai.requests import ChatRequest, Int32, Int64
from pie_async.openai.structure import JsonSchemaFormat, ResponseFormat, Schema
from pie_async.openai.tools import Function, NamedChoice, NamedFunction, Tool, ToolChoice

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")


class InputItem(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A message, a call of a tool, its outcome, or a thought."""

    type: str = "message"
    role: str | None = None
    content: str | list[ContentPart] | None = None
    id: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None


class FlatTool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that may be called."""

    type: Annotated[str, msgspec.Meta(extra_json_schema={"const": "function"})]
    name: str = ""
    description: str | None = None
    parameters: Schema = msgspec.field(default_factory=lambda: msgspec.Raw(b"null"))
    strict: bool | None = None


class FlatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The function that must be called."""

    type: Annotated[str, msgspec.Meta(extra_json_schema={"const": "function"})]
    name: str


class TextFormat(msgspec.Struct, frozen=True, kw_only=True):
    """As `ResponseFormat`, all in one object."""

    type: Annotated[
        str, msgspec.Meta(extra_json_schema={"enum": ["text", "json_object", "json_schema"]})
    ]
    name: str | None = None
    schema: Schema = msgspec.field(default_factory=msgspec.Raw)
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True, kw_only=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(msgspec.Struct, frozen=True, kw_only=True):
    effort: Annotated[str, msgspec.Meta(extra_json_schema={"enum": list(_EFFORTS)})] | None = None
    summary: str | None = None


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /v1/responses. None everywhere means: not given, or null."""

    input: str | list[InputItem]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[Int32, msgspec.Meta(extra_json_schema={"minimum": 1})] | None = (
        None
    )
    temperature: (
        Annotated[float, msgspec.Meta(extra_json_schema={"minimum": 0, "maximum": 2})] | None
    ) = None
    top_p: (
        Annotated[float, msgspec.Meta(extra_json_schema={"exclusiveMinimum": 0, "maximum": 1})]
        | None
    ) = None
    stream: bool | None = None
    store: bool | None = None
    """Nothing is kept, whatever is asked for."""
    tools: list[FlatTool] | None = None
    tool_choice: (
        Annotated[str, msgspec.Meta(extra_json_schema={"enum": ["none", "auto", "required"]})]
        | FlatChoice
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, str] | None = None
    # ours, as in chat
    seed: Int64 | None = None
    priority: Int32 | None = None
    cache_salt: str | None = None

    @property
    def is_streamed(self) -> bool:
        return bool(self.stream)

    @property
    def has_default_limit(self) -> bool:
        """Whether the limit on the output is ours and not the client's."""
        return False

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            InvalidRequest: naming the field.
        """
        if not isinstance(self.input, str) and not 0 < len(self.input) <= MAX_MESSAGES:
            raise InvalidRequest(
                f"input must have 1 to {MAX_MESSAGES} items, not {len(self.input)}", param="input"
            )

    def chat(self) -> ChatRequest:
        """All but the conversation, as a chat request."""
        return ChatRequest(
            messages=[],
            model=self.model,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
            seed=self.seed,
            tools=None if self.tools is None else [_nested(tool) for tool in self.tools],
            tool_choice=self._choice(),
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self._format(),
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
        )

    def _choice(self) -> ToolChoice | None:
        choice = self.tool_choice
        if not isinstance(choice, FlatChoice):
            return choice
        return NamedChoice(type=choice.type, function=NamedFunction(name=choice.name))

    def _format(self) -> ResponseFormat | None:
        given = None if self.text is None else self.text.format
        if given is None:
            return None
        schema = JsonSchemaFormat(name=given.name, schema=given.schema, strict=given.strict)
        return ResponseFormat(
            type=given.type, json_schema=schema if given.type == "json_schema" else None
        )

    def prompts(self) -> list[list[Mapping[str, Any]]]:
        """The conversation, as the only prompt.

        Raises:
            InvalidRequest: naming the item.
        """
        turns: list[dict[str, Any]] = []
        if self.instructions is not None:
            turns.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [[*turns, {"role": "user", "content": self.input}]]
        for index, item in enumerate(self.input):
            _add_item(turns, item, f"input[{index}]")
        if not turns:
            raise InvalidRequest("input holds nothing to answer", param="input")
        return [list(turns)]


def _add_item(turns: list[dict[str, Any]], item: InputItem, where: str) -> None:
    match item.type:
        case "message":
            if item.role is None:
                raise InvalidRequest(f"{where}.role is required", param=f"{where}.role")
            turns.append(read_turn(Message(role=item.role, content=item.content), where))
        case "function_call":
            _add_call(turns, item, where)
        case "function_call_output":
            if item.output is None:
                raise InvalidRequest(f"{where}.output is required", param=f"{where}.output")
            outcome = Message(role="tool", content=item.output, tool_call_id=item.call_id)
            with _respelled({".tool_call_id": ".call_id", ".content": ".output"}):
                turns.append(read_turn(outcome, where))
        case "reasoning":
            pass  # clients send back what they were sent; templates leave old thoughts out
        case other:
            raise InvalidRequest(
                f"{where}.type is {other[:40]!r}; it must be message, function_call, "
                "function_call_output or reasoning",
                param=f"{where}.type",
            )


def _add_call(turns: list[dict[str, Any]], item: InputItem, where: str) -> None:
    """Calls belong to what the assistant said before them."""
    for name in ("call_id", "name"):
        if getattr(item, name) is None:
            raise InvalidRequest(f"{where}.{name} is required", param=f"{where}.{name}")
    function = CalledFunction(name=item.name or "", arguments=item.arguments or "")
    call = ToolCall(id=item.call_id or "", function=function)
    with _respelled({".tool_calls[0].function": ""}):
        turn = read_turn(Message(role="assistant", tool_calls=[call]), where)
    if turns and turns[-1]["role"] == "assistant":
        turns[-1].setdefault("tool_calls", []).extend(turn["tool_calls"])
    else:
        turns.append(turn)


def _nested(tool: FlatTool) -> Tool:
    function = Function(
        name=tool.name,
        description=tool.description,
        parameters=tool.parameters,
        strict=tool.strict,
    )
    return Tool(type=tool.type, function=function)


FIELD_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "].function.": "].",
    "tool_choice.function.name": "tool_choice.name",
    "messages": "input",
}
"""What fields of chat requests are called here."""


@contextmanager
def as_responses_say() -> Iterator[None]:
    """Within it, an `InvalidRequest` names the fields of /v1/responses."""
    with _respelled(FIELD_NAMES):
        yield


@contextmanager
def _respelled(names: Mapping[str, str]) -> Iterator[None]:
    try:
        yield
    except InvalidRequest as error:
        param, text = error.param, str(error)
        if param is not None:
            for before, after in names.items():
                param, text = param.replace(before, after), text.replace(before, after)
            error.param, error.args = param, (text,)
        raise


def tools_sent(tools: Sequence[FlatTool] | None) -> list[dict[str, Any]]:
    """As they are told back to the client."""
    return [
        {
            "type": "function",
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
            "strict": bool(tool.strict),
        }
        for tool in tools or ()
    ]
