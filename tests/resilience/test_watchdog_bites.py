"""A device that hangs: an embedded engine stops, an engine of its own process is replaced."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from pie_async import Engine, EngineConfig, SamplingParams
from pie_async.errors import EngineStuck
from pie_async.resilience import process
from pie_async.resilience.engine import ResilientEngine
from pie_async.resilience.policy import RestartPolicy
from pie_async.runtime import supervisor
from pie_async.runtime.faults import EventNeverFires, FaultPlan

pytestmark = pytest.mark.realtime

CONFIG = EngineConfig(cpu_threads=1, device_kv_bytes=40 * 2**20, host_pool_bytes=0, watchdog_s=1.0)
PROMPT = list(range(10, 60))
LONG = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, output_kind="delta")


async def test_an_embedded_engine_stops_with_a_typed_error_and_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "DRAIN_S", 0.2)
    may_go_on = threading.Event()
    engine = Engine(CONFIG, report_dir=str(tmp_path))
    await engine.start()
    stream = await engine.submit(PROMPT, LONG)
    await anext(stream)
    engine._parts.device.compute.put(may_go_on.wait)
    began_s = time.monotonic()
    with pytest.raises(EngineStuck, match="compute stream stood still for 1 s: iteration"):
        async for _ in stream:
            pass
    assert 1.0 <= time.monotonic() - began_s < 3.0
    assert not engine.is_running
    with pytest.raises(EngineStuck):
        await engine.submit(PROMPT, LONG)
    (report,) = tmp_path.iterdir()
    text = report.read_text()
    for part in ("pie-compute", "scheduler", "watchdog_s: 1.0", "RunIteration", "iterations: "):
        assert part in text, part
    async with asyncio.timeout(5.0):
        await engine.aclose()
    may_go_on.set()


async def test_an_event_that_never_fires_is_found_and_the_report_tells_the_plan(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(supervisor, "DRAIN_S", 0.2)
    plan = FaultPlan(faults=(EventNeverFires(at=(30,), streams=("compute",)),))
    engine = Engine(CONFIG, faults=plan, report_dir=str(tmp_path))
    await engine.start()
    with pytest.raises(EngineStuck, match="stood still for 1 s"):
        async for _ in engine.generate(PROMPT, LONG):
            pass
    (report,) = tmp_path.iterdir()
    text = report.read_text()
    assert "EventNeverFires(at=(30,)" in text
    assert "bites: {'event_never_fires': 1}" in text
    async with asyncio.timeout(5.0):
        await engine.aclose()


async def test_an_application_that_blocks_its_own_loop_gets_a_report_and_keeps_its_engine(tmp_path):
    async with Engine(CONFIG, watchdog_s=0.3, report_dir=str(tmp_path)) as engine:
        stream = await engine.submit(PROMPT, LONG)
        await anext(stream)
        time.sleep(1.0)  # noqa: ASYNC251 - what applications do
        outputs = [output async for output in stream]
        assert outputs[-1].outputs[0].finish_reason == "length"
        (report,) = tmp_path.iterdir()
        assert report.read_text().startswith("the event loop stood still for 0.3 s")


HANGS_ONCE = """
import pathlib, threading
from pie_async.device.cpu import CpuDevice
run_layers, calls = CpuDevice.run_layers, []
def hang(device, *args, **kwargs):
    calls.append(1)
    if len(calls) == 20 and not pathlib.Path(MARK).exists():
        pathlib.Path(MARK).touch()
        device.compute.put(threading.Event().wait)
    run_layers(device, *args, **kwargs)
CpuDevice.run_layers = hang
"""


async def test_a_process_whose_device_hangs_is_ended_and_its_streams_go_on(
    tmp_path, monkeypatch, caplog
):
    patched = f"MARK = {str(tmp_path / 'mark')!r}\n{HANGS_ONCE}"
    *flags, code = process.WORKER
    at = code.index("from pie_async.resilience")
    monkeypatch.setattr(process, "WORKER", (*flags, code[:at] + patched + code[at:]))
    reports = tmp_path / "reports"
    policy = RestartPolicy(first_pause_s=0.01)
    async with ResilientEngine(CONFIG, policy=policy, report_dir=str(reports)) as engine:
        tokens = []
        async for output in engine.generate(PROMPT, LONG):
            tokens += output.outputs[0].token_ids
        again = []
        async for output in engine.generate(PROMPT, LONG):
            again += output.outputs[0].token_ids
        assert tokens == again
        assert engine.restarts == 1
    assert "it stood still and its watchdog ended it" in caplog.text
    (report,) = reports.iterdir()
    assert "and not completed" in report.read_text().splitlines()[0]
