"""Everything that reads bytes which others wrote, each as a function that fails only on a bug.

`scripts/fuzz` feeds them for as long as it is told, `tests/test_fuzz.py` for a moment in every run.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import typer

from pie_async import config
from pie_async.api.client import CompletionsClient, ServerError
from pie_async.api.hosts import AllowedHosts
from pie_async.cli import options
from pie_async.errors import ConfigError, InvalidRequest, ModelError
from pie_async.messages import decode
from pie_async.model.config import read_config
from pie_async.model.safetensors_file import read_header
from pie_async.openai.reading import CHAT_READER, COMPLETION_READER
from pie_async.resilience.wire import FromEngine, ToEngine, Wire, WireError
from pie_async.runtime.faults import FaultPlan, Faults
from pie_async.workload import read_trace

CORPUS = Path(__file__).parents[1] / "fuzz_corpus"


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="pie-fuzz-"))


def message(data: bytes) -> None:
    """A message between actors."""
    with contextlib.suppress(msgspec.DecodeError):
        decode(data)


def frames(data: bytes) -> None:
    """What an engine's process and its front say to each other."""

    async def read(kind: Any) -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        wire: Wire[Any] = Wire(reader, None, kind)  # type: ignore[arg-type]  # nothing is sent
        with contextlib.suppress(WireError):
            while await wire.receive() is not None:
                pass

    for kind in (ToEngine, FromEngine):
        _loop().run_until_complete(read(kind))


class _Answer:
    """What a server sends, as the client sees it."""

    status = 200

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def __aenter__(self) -> _Answer:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        pass

    async def json(self) -> Any:
        return msgspec.json.decode(self._data)

    @property
    async def content(self) -> AsyncIterator[bytes]:
        for line in self._data.splitlines(keepends=True):
            yield line


class _Session:
    def __init__(self, data: bytes) -> None:
        self._answer = _Answer(data)

    def get(self, _url: str) -> _Answer:
        return self._answer

    def post(self, _url: str, *, json: object) -> _Answer:
        del json
        return self._answer


def sse(data: bytes) -> None:
    """A stream of completions, read by the client that measures servers."""

    async def read() -> None:
        client = CompletionsClient("http://127.0.0.1:1", model="m")
        client._session = _Session(data)  # type: ignore[assignment]
        with contextlib.suppress(ServerError):
            await client._find_model()
        with contextlib.suppress(ServerError):
            async for count in client.stream([1], output_tokens=1):
                assert count > 0

    _loop().run_until_complete(read())


def flags(data: bytes) -> None:
    """What people write on the command line."""
    text = data.decode(errors="replace")
    for parse in (
        options.size,
        options.count,
        options.rate,
        options.seconds,
        options.gpu_memory,
        options.pool,
        options.load_format,
    ):
        with contextlib.suppress(typer.BadParameter):
            parse(text)
    with contextlib.suppress(ConfigError):
        config.parse_size(text, option="x")
    with contextlib.suppress(ConfigError):
        AllowedHosts([text])


def configuration(data: bytes) -> None:
    """An engine's configuration."""
    try:
        fields = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    known = {field.name for field in msgspec.structs.fields(config.EngineConfig)}
    with contextlib.suppress(ConfigError):
        config.EngineConfig(**{name: fields[name] for name in known & fields.keys()})


def _file(name: str, data: bytes) -> Path:
    path = _folder() / name
    path.write_bytes(data)
    return path


def fault_plan_toml(data: bytes) -> None:
    _run_plan(_file("plan.toml", data))


def fault_plan_json(data: bytes) -> None:
    _run_plan(_file("plan.json", data))


def _run_plan(path: Path) -> None:
    """What is read as a plan can be written again, and asked."""
    try:
        plan = FaultPlan.read(path)
    except ConfigError:
        return
    assert FaultPlan.of(msgspec.to_builtins(plan)) == plan
    faults = Faults(plan)
    for fault in plan.faults:
        faults.at(type(fault))


def azure_trace(data: bytes) -> None:
    with contextlib.suppress(ConfigError):
        read_trace(_file("trace.csv", data))


def mooncake_trace(data: bytes) -> None:
    with contextlib.suppress(ConfigError):
        read_trace(_file("trace.jsonl", data))


def safetensors(data: bytes) -> None:
    """A weights file's header."""
    with contextlib.suppress(ModelError):
        read_header(_file("model.safetensors", data))


def model_config(data: bytes) -> None:
    """A model's config.json."""
    path = _file("config.json", data)
    with contextlib.suppress(ModelError):
        read_config(path.parent)


def chat_body(data: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        request, _ = CHAT_READER.read_now(data)
        request.sampling_params()


def completion_body(data: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        request, _ = COMPLETION_READER.read_now(data)
        request.sampling_params()


def host(data: bytes) -> None:
    """Host and Origin headers, one a line."""
    name, _, origin = data.decode(errors="replace").partition("\n")
    with contextlib.suppress(InvalidRequest):
        AllowedHosts(["gpu-box", ".example.com"]).check(name, origin or None)


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function
    for function in (
        message,
        frames,
        sse,
        flags,
        configuration,
        fault_plan_toml,
        fault_plan_json,
        azure_trace,
        mooncake_trace,
        safetensors,
        model_config,
        chat_body,
        completion_body,
        host,
    )
}


def corpus(target: str) -> list[bytes]:
    """The inputs kept for a target: well-formed ones, and those that once found something."""
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]
