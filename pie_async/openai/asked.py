"""What a request asks for, put together from its fields."""

from __future__ import annotations

from typing import NamedTuple, Self

import msgspec

from pie_async.chat_options import ChatOptions
from pie_async.errors import InvalidRequest
from pie_async.openai.requests import ChatRequest, GenerationRequest
from pie_async.openai.tools import Toolbox
from pie_async.parsing.events import MakeParser, Parser, PlainParser
from pie_async.parsing.tool_calls import ToolFormat
from pie_async.sampling_params import SamplingParams

LAST_TOKENS = 8
"""Of a prompt, in which to look whether the model already thinks."""

Spelling = dict[str | None, str]


def guided(request: GenerationRequest, params: SamplingParams) -> tuple[SamplingParams, Spelling]:
    """The parameters with what the output must look like, and how the client spelled that.

    Raises:
        InvalidRequest: naming the field.
    """
    found = request.guide()
    if found is None:
        return params, {}
    guide, spelling = found
    return msgspec.structs.replace(params, structured_outputs=guide), spelling


class ChatAsked(NamedTuple):
    """A chat request, ready to be submitted."""

    params: SamplingParams
    toolbox: Toolbox
    options: ChatOptions | None
    """None: nothing but the messages matters."""
    spelling: Spelling
    """The client's names for fields that the engine names otherwise."""

    @classmethod
    def of(cls, request: ChatRequest, *, thinks: bool) -> Self:
        """What the request says.

        Args:
            thinks: the model may think before it answers.

        Raises:
            InvalidRequest: naming the field.
        """
        toolbox = request.toolbox()
        params, spelling = guided(request, request.sampling_params())
        if params.structured_outputs is not None and toolbox.mode != "none":
            raise InvalidRequest(
                "tools cannot be offered together with a format of the answer, which leaves no "
                "room for calls; set tool_choice to none, or leave the format out",
                param="tools",
            )
        if (guide := toolbox.guide()) is not None:
            params = msgspec.structs.replace(params, structured_outputs=guide)
            spelling = {"structured_outputs.json": "tools"}
        elif toolbox.mode == "auto":
            # Llama's <|python_tag|> is a special token; what ends an output is no text anyway.
            params = msgspec.structs.replace(params, skip_special_tokens=False)
        variables = request.template_variables
        if thinks and params.structured_outputs is not None:
            # What is guided is so from its first character: there are no thoughts before it.
            variables.setdefault("enable_thinking", False)
        is_plain = not (toolbox.tools or variables)
        return cls(
            params=params,
            toolbox=toolbox,
            options=None if is_plain else ChatOptions(tools=toolbox.tools, variables=variables),
            spelling={
                None: "messages",
                "prompt": "messages",
                "max_tokens": request.limit_field,
                **spelling,
            },
        )

    def tool_parser(self, tool_format: ToolFormat) -> MakeParser:
        """What finds calls in an output; everything is content if there can be none."""

        def make() -> Parser:
            return self.toolbox.parser(tool_format) or PlainParser()

        return make
