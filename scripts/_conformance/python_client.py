"""OpenAI's Python client, whichever version is installed, against a running server.

python python_client.py URL
"""

from __future__ import annotations

import json
import sys
from typing import Any

import openai

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]


def check(client: openai.OpenAI) -> None:
    """Raises AssertionError, or what the client raises."""
    model = client.models.list().data[0].id
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES}
    whole = client.chat.completions.create(**asked, max_tokens=5, n=2, logprobs=True)
    assert [choice.finish_reason for choice in whole.choices] == ["length"] * 2
    chunks = list(
        client.chat.completions.create(
            **asked, max_tokens=5, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5
    called = client.chat.completions.create(
        **asked, tools=TOOLS, tool_choice="required", max_tokens=300
    ).choices[0]
    assert called.finish_reason == "tool_calls"
    for call in called.message.tool_calls or ():
        is_weather(call.function.arguments)
    schema: Any = {"name": "weather", "schema": WEATHER, "strict": True}
    formed = client.chat.completions.create(
        **asked, max_tokens=300, response_format={"type": "json_schema", "json_schema": schema}
    )
    is_weather(formed.choices[0].message.content or "")
    echoed = client.completions.create(
        model=model, prompt=[1, 2, 3], echo=True, logprobs=1, max_tokens=0
    )
    logprobs = echoed.choices[0].logprobs
    assert logprobs is not None and len(logprobs.tokens or ()) == 3
    response = client.responses.create(model=model, input="Hi", max_output_tokens=5)
    assert response.usage is not None and response.usage.output_tokens == 5
    refused = None
    try:
        client.chat.completions.create(**asked, temperature=9)
    except openai.BadRequestError as error:
        refused = error.param
    assert refused == "temperature"


def is_weather(text: str) -> None:
    value = json.loads(text)
    assert value["city"] in ("Oslo", "Rome")
    assert 1 <= value["days"] <= 9


if __name__ == "__main__":
    check(openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0))
    print(f"ok      openai for Python {openai.__version__}")
