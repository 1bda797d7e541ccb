"""Options that the experiments have in common, and what they mean."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from pie_async.config import EngineConfig, parse_size
from pie_async.runtime.virtual_time import VirtualTimeLoop
from pie_async.workload import (
    LENGTH_MODELS,
    WorkItem,
    arrive_at_rate,
    clip,
    read_trace,
    sample_lengths,
)
from scripts.paper.results import RESULTS

MODES: Mapping[str, Mapping[str, Any]] = {
    "off": {"host_pool_bytes": 0},
    "parking": {"streamed_blocks": 0},
    "pie": {},
}
"""No pool: preemption recomputes; preempted sequences wait in the pool; the governor decides."""


MOST_QUEUED = 1_000_000
"""Overload is to be seen, not refused."""


def parser_of(description: str | None, *, name: str) -> argparse.ArgumentParser:
    """A parser with the options of every experiment.

    Args:
        description: the script's docstring.
        name: of the files that it writes.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="qwen2.5-32b")
    add("--device", default="cuda")
    add("--load-format", default="random", help="sim: always checkpoint, it has no weights")
    add("--host-pool", default="32GiB")
    add("--set", action="append", default=[], metavar="NAME=JSON", help="any engine option")
    add("--seed", type=int, default=0)
    add("--name", default=name, help="of the files under --results")
    add("--results", type=Path, default=RESULTS)
    add("--plot-only", action="store_true", help="draw what --results holds")
    return parser


def add_context(parser: argparse.ArgumentParser) -> None:
    """The option of `requests_of`."""
    parser.add_argument("--context", type=int, default=2048, help="longer requests are cut to it")


class Budget:
    """Seconds after which no new row is begun; begins to count where it is made."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._began_s = time.monotonic()
        self.left_out: list[str] = []

    def allows(self, row: str) -> bool:
        """Whether this row may begin; if not it is kept for `tell`."""
        is_over = self._seconds is not None and time.monotonic() - self._began_s >= self._seconds
        if is_over:
            self.left_out.append(row)
        return not is_over

    def tell(self) -> None:
        """Name what was left out."""
        if self.left_out:
            print(f"left out, --budget is spent: {'; '.join(self.left_out)}", flush=True)


def add_budget(parser: argparse.ArgumentParser) -> None:
    """The option that `Budget` takes."""
    parser.add_argument("--budget", type=float, help="seconds after which no new row is begun")


def engine_config(given: argparse.Namespace, kv_bytes: int | None, **fields: Any) -> EngineConfig:
    """The engine that the options ask for.

    Args:
        kv_bytes: of the device's memory for KV; None: the engine's default.
        fields: engine options that the experiment sets; they win over --set.
    """
    asked: dict[str, Any] = {
        "model": given.model,
        "device": given.device,
        "load_format": "checkpoint" if given.device == "sim" else given.load_format,
        "device_kv_bytes": kv_bytes,
        "host_pool_bytes": parse_size(given.host_pool, option="--host-pool"),
        "prefix_caching": False,
        "max_queued_requests": MOST_QUEUED,
    }
    asked |= dict(map(setting, given.set))
    return EngineConfig(**{**asked, **fields})


def setting(text: str) -> tuple[str, Any]:
    """A name and its value; SystemExit says what the value must look like."""
    name, _, value = text.partition("=")
    try:
        return name, msgspec.json.decode(value)
    except msgspec.DecodeError:
        raise SystemExit(
            f"--set {text}: the value must be JSON, as in --set ring_depth=3 or "
            "--set 'sim_link=\"nvlink\"'"
        ) from None


def requests_of(
    given: argparse.Namespace,
    workload: str,
    count: int,
    *,
    rate: float | None = None,
    as_traced: bool = False,
) -> list[WorkItem]:
    """Requests of a length model or a trace: all at once, or arriving at a rate.

    Args:
        workload: a name of `LENGTH_MODELS`, or a trace's file.
        rate: requests/s, a Poisson process; None: all at once.
        as_traced: a trace's own arrivals, faster or slower by one factor, instead.
    """
    if workload in LENGTH_MODELS:
        items = sample_lengths(
            LENGTH_MODELS[workload],
            num_requests=count,
            context_tokens=given.context,
            seed=given.seed,
        )
        return arrive_at_rate(items, requests_per_s=rate, seed=given.seed) if rate else items
    items = [clip(item, given.context) for item in read_trace(Path(workload), limit=count)]
    if rate and not as_traced:
        return arrive_at_rate(items, requests_per_s=rate, seed=given.seed)
    speed = rate * items[-1].arrival_s / len(items) if rate else 0.0
    return [
        msgspec.structs.replace(item, arrival_s=item.arrival_s / speed if speed else 0.0)
        for item in items
    ]


def loop_of(given: argparse.Namespace) -> asyncio.Runner:
    """Virtual time for the simulated device, the wall's for others."""
    is_sim = given.device == "sim"
    return asyncio.Runner(loop_factory=VirtualTimeLoop if is_sim else uvloop.new_event_loop)
