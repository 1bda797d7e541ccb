"""Processes that die as planned: the engine's is followed by another one, and no token is wrong."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pie_async import SamplingParams
from pie_async.__main__ import main
from pie_async.errors import ConfigError
from pie_async.resilience.engine import ResilientEngine
from pie_async.resilience.policy import RestartPolicy
from pie_async.runtime.faults import (
    ActorRaises,
    CopyFailed,
    EngineKilled,
    Fault,
    FaultPlan,
    LostContext,
    PoolRefused,
    SlowReader,
)

pytestmark = pytest.mark.realtime

BLOCK_BYTES = 32 * 1024
SIM = {
    "device": "sim",
    "model": "tiny",
    "device_kv_bytes": 10 * BLOCK_BYTES,
    "host_pool_bytes": 60 * BLOCK_BYTES,
    "streamed_blocks": 5,
}
POLICY = RestartPolicy(first_pause_s=0.01)
GREEDY = SamplingParams(temperature=0.0, max_tokens=60, seed=1, ignore_eos=True)


async def outputs(*faults: Fault, lives: int = 1) -> tuple[list[tuple[int, ...]], int]:
    """Token ids of four requests, and how often the engine was started again."""
    plan = FaultPlan(faults=faults, lives=lives) if faults else None

    async def ask(number: int) -> tuple[int, ...]:
        prompt = [(100 * number + 7 * i) % 1000 for i in range(40 + 17 * number)]
        async for output in engine.generate(prompt, GREEDY):
            last = output
        return last.outputs[0].token_ids

    async with ResilientEngine(policy=POLICY, faults=plan, **SIM) as engine:
        async with asyncio.timeout(60):
            found = await asyncio.gather(*map(ask, range(4)))
        return found, engine.restarts


@pytest.fixture(scope="module")
def right() -> list[tuple[int, ...]]:
    found, restarts = asyncio.run(outputs())
    assert restarts == 0
    return found


@pytest.mark.parametrize(
    ("fault", "lives"),
    [
        (EngineKilled(at=(80,)), 2),
        (LostContext(at=(12,)), 1),
        (ActorRaises(at=(30,), actors=("scheduler",)), 1),
        (CopyFailed(probability=1.0, copies=("demote",)), 1),
    ],
    ids=lambda value: getattr(value, "point", ""),
)
async def test_an_engine_that_dies_as_planned_is_followed_by_another_and_no_token_is_wrong(
    fault: Fault, lives: int, right: list[tuple[int, ...]]
):
    assert await outputs(fault, lives=lives) == (right, lives)


async def test_a_pool_refused_to_the_first_engine_is_what_start_raises():
    with pytest.raises(ConfigError, match="no memory for the pool") as caught:
        async with ResilientEngine(faults=FaultPlan(faults=(PoolRefused(at=(1,)),)), **SIM):
            pass
    assert caught.value.option == "host_pool_bytes"


def test_a_clients_fault_is_refused_by_the_front():
    with pytest.raises(ConfigError, match=r"slow_reader cannot happen here: .*pie_async\.testing"):
        ResilientEngine(faults=FaultPlan(faults=(SlowReader(at=(1,), seconds=1.0),)), **SIM)


# --- the command --------------------------------------------------------------------------------


def plan_file(tmp_path: Path, *faults: dict) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"faults": faults}))
    return path


def test_serve_refuses_a_plan_that_is_not_meant_with_one_line_and_status_2(tmp_path, capsys):
    path = plan_file(tmp_path, {"point": "api_killed", "at": [1]})
    assert main(["serve", "--device", "sim", "--faults", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pie-async: --faults: ")
    assert "--allow-faults" in line


def test_serve_refuses_a_point_that_there_is_not_and_lists_those_there_are(tmp_path, capsys):
    path = plan_file(tmp_path, {"point": "api_klled", "at": [1]})
    assert main(["serve", "--device", "sim", "--faults", str(path), "--allow-faults"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "faults[0]: there is no fault point 'api_klled'; there are copy_slow, " in line


def test_a_server_that_is_killed_takes_its_engine_with_it(tmp_path):
    path = plan_file(tmp_path, {"point": "api_killed", "at": [3]})
    command = [sys.executable, "-m", "pie_async", "serve", "--port", "0", "--device", "sim"]
    command += ["--faults", str(path), "--allow-faults"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with server:
        line = server.stdout.readline()
        assert "http://" in line, server.stderr.read()
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        url = line.split(" at ")[1].split(" ")[0] + "/completions"
        body = json.dumps({"prompt": "To be", "max_tokens": 50}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            urllib.request.urlopen(request, timeout=30)
        assert server.wait(10) == -9
    deadline_s = time.monotonic() + 15
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline_s, "the engine outlived the server"
        time.sleep(0.05)
    assert children
