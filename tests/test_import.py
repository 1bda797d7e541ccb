"""Importing the package is quick: what is heavy is loaded when it is first used."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "aiohttp", "transformers", "tokenizers", "numpy", "rich", "typer")


def loaded_by(code: str) -> set[str]:
    """Which of the heavy modules a fresh interpreter has after running the code."""
    script = f"{code}\nimport sys\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(ran.stdout.split())


def test_importing_the_package_loads_neither_torch_nor_aiohttp():
    assert loaded_by("import pie_async") == set()


@pytest.mark.parametrize("name", ["EngineConfig", "SamplingParams", "PieError", "RequestOutput"])
def test_plain_data_loads_nothing_heavy(name: str):
    assert loaded_by(f"from pie_async import {name}") == set()


def test_the_engine_loads_neither_torch_nor_aiohttp_until_it_starts():
    assert loaded_by("from pie_async import Engine").isdisjoint({"torch", "aiohttp"})


def test_the_simulated_device_runs_without_torch():
    code = """
import asyncio
from pie_async import Engine
async def main():
    async with Engine(device="sim") as engine:
        async for output in engine.generate([1, 2, 3]):
            pass
asyncio.run(main())
"""
    assert "torch" not in loaded_by(code)


def test_a_server_reads_its_model_without_torch_or_numpy():
    code = """
from pie_async.assembly.loading import read_files
from pie_async.cli.plan import memory_plan
from pie_async.config import EngineConfig
memory_plan(EngineConfig())
read_files(EngineConfig())
"""
    assert loaded_by(code).isdisjoint({"torch", "numpy", "transformers", "aiohttp"})


def test_every_public_name_is_there_and_others_are_not():
    import pie_async

    assert all(hasattr(pie_async, name) for name in pie_async.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Enigne'"):
        _ = pie_async.Enigne


def test_what_starts_an_engines_process_loads_none_of_what_that_process_needs():
    """It is to be started at once: numpy alone takes a fifth of a second."""
    code = "import pie_async.resilience.engine, pie_async.watching"
    assert loaded_by(code).isdisjoint({"torch", "numpy", "transformers", "aiohttp"})
