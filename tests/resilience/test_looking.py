"""Looking at an engine in a process of its own, also while that dies."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from pie_async import EngineConfig, SamplingParams
from pie_async.errors import EngineStopped
from pie_async.resilience.engine import ResilientEngine
from pie_async.resilience.policy import RestartPolicy

pytestmark = pytest.mark.realtime


async def test_views_and_timelines_cross_the_process_border_and_survive_its_death() -> None:
    config = EngineConfig(device="sim", model="tiny")
    policy = RestartPolicy(first_pause_s=0.5)
    async with ResilientEngine(config, policy=policy) as engine:
        async for _ in engine.generate([1, 2, 3], SamplingParams(max_tokens=20), request_id="a"):
            pass
        view = await engine.look(since_s=0.0)
        assert view.stats.output_tokens == 20
        assert {span.track for span in view.spans} == {"compute"}
        told = await engine.timeline(last_iterations=5)
        assert told.iterations == 5
        assert engine.engine_pid is not None
        os.kill(engine.engine_pid, signal.SIGSTOP)
        asked = asyncio.create_task(engine.look())
        await asyncio.sleep(0.05)
        os.kill(engine.engine_pid, signal.SIGKILL)
        with pytest.raises(EngineStopped, match="died while it was asked"):
            await asked
        with pytest.raises(EngineStopped, match="restarting"):
            await engine.look()
        for _ in range(1000):
            if engine.is_accepting:
                break
            await asyncio.sleep(0.02)
        again = await engine.look()
    assert again.stats.output_tokens == 0
