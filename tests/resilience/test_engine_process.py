"""What the front makes of the last words of an engine's process."""

from __future__ import annotations

import asyncio
import socket

import pytest

from pie_async import errors
from pie_async.errors import ConfigError, EngineStopped, ModelError, PieError
from pie_async.resilience.process import EngineProcess
from pie_async.resilience.wire import Failed, FromEngine, ToEngine, Wire

pytestmark = pytest.mark.realtime

TREE = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, PieError) and kind is not PieError
]


async def refusal(failed: Failed) -> PieError | None:
    """The error that a process ends with which says this."""
    sockets = socket.socketpair()
    (reader, writer), (_, theirs) = [await asyncio.open_connection(sock=each) for each in sockets]
    engine: Wire[ToEngine] = Wire(reader, theirs, ToEngine)
    process = EngineProcess(None, Wire(reader, writer, FromEngine))
    engine.post(failed)
    assert await process.receive() == failed
    for each in (writer, theirs):
        each.close()
    return process.refusal()


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
async def test_an_error_of_the_tree_comes_as_itself_or_what_it_is_a_kind_of(kind):
    error = await refusal(Failed(kind=kind.__name__, message="why"))
    assert str(error) == "why"
    if issubclass(kind, ConfigError | ModelError | EngineStopped | errors.DeviceFault):
        assert issubclass(kind, type(error))
    else:  # it is about requests: no engine ends with it
        assert type(error) is EngineStopped


@pytest.mark.parametrize(
    "name", ["", "Exception", "annotations", "__builtins__", "__loader__", "SystemExit"]
)
async def test_another_name_is_a_stopped_engine_whatever_it_names(name):
    error = await refusal(Failed(kind=name, message="why"))
    assert type(error) is EngineStopped


async def test_the_option_comes_with_it():
    error = await refusal(Failed(kind="ConfigError", message="why", option="dtype"))
    assert error.option == "dtype"
