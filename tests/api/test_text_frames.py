"""Events that are put together instead of encoded."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from pie_async.openai.chat import ChatWriter
from pie_async.openai.completion import CompletionWriter
from pie_async.outputs import CompletionOutput, RequestOutput

TEXTS = ["word", " ", '"', '""', "\\", "\n\t\x00", "ä€😀", "\u2028", "</script>", '{"text":""}']
MODELS = ["m", "", '""', 'a "quoted" name', "ä"]


def chat(model: str, has_usage: bool) -> ChatWriter:
    return ChatWriter(
        response_id="chatcmpl-1", created=7, model=model, choices=3, top_logprobs=None,
        has_usage=has_usage,
    )  # fmt: skip


def completion(model: str, has_usage: bool) -> CompletionWriter:
    return CompletionWriter(
        response_id="cmpl-1", created=7, model=model, prompts=2, n=3, echoes=None,
        top_logprobs=None, token_text=chr, has_usage=has_usage,
    )  # fmt: skip


def output(*choices: CompletionOutput) -> RequestOutput:
    return RequestOutput(
        request_id="r", prompt=None, prompt_token_ids=(1,), outputs=choices, finished=False
    )


def events_of(written: bytes) -> list[dict]:
    events = written.decode().removesuffix("\n\n").split("\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("has_usage", [False, True])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("make", [chat, completion])
def test_a_text_comes_through_whatever_is_in_it_and_around_it(
    make: Callable[[str, bool], ChatWriter | CompletionWriter], model: str, has_usage: bool
) -> None:
    writer = make(model, has_usage)
    for text in TEXTS:
        (event,) = events_of(
            writer.events(1, output(CompletionOutput(index=2, text=text, token_ids=(5,))))
        )
        (choice,) = event.pop("choices")
        said = choice.pop("delta")["content"] if make is chat else choice.pop("text")
        assert said == text
        assert choice == {
            "index": 2 if make is chat else 5, "logprobs": None, "finish_reason": None
        }  # fmt: skip
        assert event == {
            "id": f"{'chatcmpl' if make is chat else 'cmpl'}-1",
            "object": "chat.completion.chunk" if make is chat else "text_completion",
            "created": 7,
            "model": model,
            **({"usage": None} if has_usage else {}),
        }


@pytest.mark.parametrize("make", [chat, completion])
def test_each_choice_of_an_output_is_an_event_in_order(
    make: Callable[[str, bool], ChatWriter | CompletionWriter],
) -> None:
    choices = [
        CompletionOutput(index=0, text="a", token_ids=(1,)),
        CompletionOutput(index=1, text="", token_ids=(2,)),  # half a character
        CompletionOutput(index=2, text="c", token_ids=(3,), finish_reason="length"),
    ]
    events = events_of(make("m", False).events(0, output(*choices)))
    shown = [event["choices"][0] for event in events]
    assert [choice["index"] for choice in shown][:2] == [0, 2]
    assert shown[-1]["index"] == 2
    assert shown[-1]["finish_reason"] == "length"
