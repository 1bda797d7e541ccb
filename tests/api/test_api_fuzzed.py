"""schemathesis against the project's own OpenAPI document, with the engine on the simulated device.

Requests that fit the document, and requests that don't: no status of 500 and above, every status,
type and body as documented, whatever is wrong refused. `PIE_FUZZ_EXAMPLES` asks for more of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import schemathesis
import uvloop
from aiohttp import web
from hypothesis import HealthCheck, Phase, settings
from hypothesis import given as given_data
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pie_async.api import create_app
from pie_async.engine import Engine
from pie_async.errors import InvalidRequest
from pie_async.openai.openapi import OPERATIONS, openapi_document
from pie_async.openai.reading import CHAT_READER, COMPLETION_READER
from pie_async.openai.responses import ChatResponse
from tests.support.fake_engine import FakeEngine
from tests.support.openapi_schema import SchemaBook

SPEC = Path(__file__).parents[3] / "shared/data/openai_chat_completions_models.openapi.json"
EXAMPLES = int(os.environ.get("PIE_FUZZ_EXAMPLES", "15"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
FATEFUL = {
    "best_of", "cache_salt", "logit_bias", "max_tokens", "max_completion_tokens", "min_tokens",
    "model", "stop", "stop_token_ids", "stream", "stream_options", "top_logprobs",
}  # fmt: skip
"""Fields that make nearly every generated request one to refuse, or to stream."""
POSTED = [each for each in OPERATIONS if each.body is not None]
PUBLISHED = [each for each in POSTED if each.path.endswith("completions")]
"""Those whose answers the published subset of OpenAI's document describes."""


def test_the_document_describes_every_route_and_no_other() -> None:
    async def routes() -> set[tuple[str, str]]:
        app = create_app(FakeEngine())
        return {
            (route.method.lower(), route.resource.canonical)
            for route in app.router.routes()
            if route.method != "HEAD"
        }

    assert asyncio.run(routes()) == {(each.method, each.path) for each in OPERATIONS}


def test_every_field_of_a_request_is_described() -> None:
    schemas = json.loads(openapi_document("1"))["components"]["schemas"]
    for each in POSTED:
        assert schemas[each.body.__name__]["properties"].keys() == set(each.body.__struct_fields__)


@pytest.mark.parametrize("reader", [CHAT_READER, COMPLETION_READER])
def test_documented_limits_are_those_that_hold(reader) -> None:
    kind = "ChatRequest" if reader is CHAT_READER else "CompletionRequest"
    body = {"messages": [{"role": "user", "content": "a"}]} if reader is CHAT_READER else {}
    body = {"prompt": "a", "logprobs": True, **body} if body else {"prompt": "a"}
    fields = json.loads(openapi_document("1"))["components"]["schemas"][kind]["properties"]

    def is_taken(**given) -> bool:
        try:
            request, _ = reader.read_now(json.dumps({**body, **given}).encode())
            request.sampling_params()
        except InvalidRequest:
            return False
        return True

    tried = 0
    for name, described in fields.items():
        numbers = [kind for kind in described.get("anyOf", ()) if "maximum" in kind]
        for limits in numbers if name not in ("max_tokens", "min_tokens") else ():
            for key, beyond in (("minimum", -1), ("maximum", 1)):
                if key in limits and abs(limits[key]) < 2**31 - 1:
                    assert is_taken(**{name: limits[key]}), (name, key)
                    assert not is_taken(**{name: limits[key] + beyond}), (name, key)
                    tried += 1
    assert tried >= 8


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server with the real engine, on a loop in a thread."""
    ready: list[str] = []
    is_ready, is_over = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with Engine(device="sim", max_model_len=48) as engine:
            runner = web.AppRunner(create_app(engine), handler_cancellation=True)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            ready.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
            is_ready.set()
            await is_over.wait()
            await runner.cleanup()
            assert engine.stats().running == 0

    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert is_ready.wait(20)
    yield ready[0]
    loop.call_soon_threadsafe(is_over.set)
    thread.join(20)
    assert not thread.is_alive()
    loop.close()


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize(
    "operation", [each for each in OPERATIONS if not each.is_endless], ids=lambda each: each.path
)
def test_nothing_that_is_asked_breaks_the_server_or_its_promises(url, operation, mode) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    described = schema[operation.path][operation.method]
    if mode is GenerationMode.NEGATIVE and operation.body is None:
        return  # nothing to get wrong

    @settings(
        max_examples=EXAMPLES if operation.body is not None else 5,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given_data(case=described.as_strategy(generation_mode=mode))
    def holds(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS, timeout=20)

    holds()
    alive = requests.post(f"{url}/v1/completions", json={"prompt": "p"}, timeout=20)
    assert alive.status_code == 200


@pytest.mark.parametrize("operation", PUBLISHED, ids=lambda each: each.path)
def test_answers_to_generated_requests_fit_openais_schemas(url, operation) -> None:
    if not SPEC.is_file():
        pytest.skip(f"needs {SPEC.name} in ../shared/data")
    book = SchemaBook(json.loads(SPEC.read_text()))
    name = {ChatResponse: "CreateChatCompletionResponse"}.get(
        operation.answer, "CreateCompletionResponse"
    )
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    answers = []

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given_data(case=schema[operation.path]["post"].as_strategy())
    def fits(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            case.body = {name: case.body[name] for name in case.body.keys() - FATEFUL}
            if "prompt" in case.body:
                case.body["prompt"] = [1, 2, 3]
            else:
                case.body["messages"] = [{"role": "user", "content": "Hi"}]
        answer = case.call(timeout=20)
        answers.append(answer.status_code)
        kind = name if answer.status_code == 200 else "ErrorResponse"
        assert book.errors(kind, answer.json()) == []

    fits()
    assert answers.count(200) >= EXAMPLES // 10  # else it was the refusals alone that were tried
