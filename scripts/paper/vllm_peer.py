"""vLLM as one more mode of the experiments with a load: the same requests, the same measures.

Engine arguments are those of vllm/engine/arg_utils.py, version 0.26: `kv_cache_memory_bytes`
gives it the same KV memory, `kv_offloading_size` (GiB; the connector is chosen in
vllm/config/vllm.py) as much host memory as our pool has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pie_async.cli.load import Prompts
from pie_async.config import EngineConfig
from pie_async.measurements import RequestTimes
from pie_async.workload import WorkItem, clip
from scripts._bench_gpu.peers import VLLM_ENVIRONMENT, PeerFailed, write_model
from scripts.paper.load import FIRST_TOKEN, Row, seen_by_clients

VLLM_MODES = ("vllm", "vllm-offload")
WARM_UP = (600, 16, 64)
"""Prompt tokens, output tokens, requests: it captures and compiles before anything counts."""
MOST_RUNNING = 1024
"""Where the engine has no limit; KV memory is what limits vLLM then too."""
DRIVER = Path(__file__).with_name("vllm_driver.py")


class VllmPeer:
    """A running vLLM; `vllm_running` makes and ends it."""

    def __init__(self, process: subprocess.Popen[str], log: Path, vocab_size: int) -> None:
        self._process = process
        self._log = log
        self.vocab_size = vocab_size

    def ask(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a line, wait for the answer.

        Raises:
            PeerFailed: it ended or took too long.
        """
        late = threading.Timer(seconds, self._process.kill)
        late.start()
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late.cancel()
        if not line:
            last = self._log.read_text(errors="replace").strip().splitlines()[-3:]
            raise PeerFailed(f"vLLM ended or took over {seconds:.0f} s: {' | '.join(last)[-400:]}")
        return dict(json.loads(line))

    def answer(
        self, items: Sequence[WorkItem], *, seed: int, limit_s: float | None, seconds: float
    ) -> tuple[list[RequestTimes], float]:
        """Put a load on it: what clients saw, and how long it took."""
        fill = Prompts(vocab_size=self.vocab_size, first_token=FIRST_TOKEN, seed=seed)
        requests = [
            [list(fill.of(item, number)), item.output_tokens, item.arrival_s]
            for number, item in enumerate(items)
        ]
        found = self.ask({"requests": requests, "limit_s": limit_s}, seconds)
        return [_times(each) for each in found["requests"]], float(found["duration_s"])


def _times(seen: dict[str, Any]) -> RequestTimes:
    times = RequestTimes(submitted_s=seen["submitted_s"], prompt_tokens=0)
    for time_s, count in seen["arrivals"]:
        times.arrived(time_s, count)
    times.finished_s = seen["finished_s"]
    return times


@contextlib.contextmanager
def vllm_running(given: argparse.Namespace, config: EngineConfig, mode: str) -> Iterator[VllmPeer]:
    """vLLM with the shape and the memories of `config`, warmed up.

    Raises:
        PeerFailed: it did not start.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder, log = write_model(config.model, Path(scratch)), Path(scratch) / "log"
        # Kept from run to run: compiling is most of its start.
        cache = Path(tempfile.gettempdir()) / "pie-vllm-cache"
        environment = {
            **os.environ,
            **VLLM_ENVIRONMENT,
            "VLLM_CACHE_ROOT": str(cache),
            "PYTHONPATH": str(given.vllm),
        }
        stand_ins = str(given.vllm.parent / "fallback")
        with log.open("w") as errors:
            process = subprocess.Popen(
                # -P: this folder's modules are not vLLM's to import.
                [sys.executable, "-P", str(DRIVER), stand_ins], env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        shape = json.loads((folder / "config.json").read_text())
        peer = VllmPeer(process, log, shape["vocab_size"])
        try:
            ready = peer.ask(engine_arguments(given, config, mode, folder), given.vllm_start)
            print(f"[{mode}: started in {ready['ready_s']:.1f} s]", flush=True)
            prompt, output, count = WARM_UP
            warm_up = WorkItem(
                prompt_tokens=min(prompt, given.context - output), output_tokens=output
            )
            peer.answer([warm_up] * count, seed=-1, limit_s=None, seconds=given.vllm_start)
            yield peer
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def engine_arguments(
    given: argparse.Namespace, config: EngineConfig, mode: str, folder: Path
) -> dict[str, Any]:
    """What `AsyncEngineArgs` gets: the engine's memories and limits, and vLLM's own defaults.

    Prompts are all different, so that prefix caching cannot share anything between requests;
    with offloading it is on, as its users have it: what a preempted request left on the GPU is
    taken up where it lies and the rest is loaded.
    """
    arguments: dict[str, Any] = {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": given.context,
        "max_num_seqs": config.max_running_sequences or MOST_RUNNING,
        "kv_cache_memory_bytes": config.device_kv_bytes,
        "enable_prefix_caching": mode == "vllm-offload",
    }
    if mode == "vllm-offload":
        arguments["kv_offloading_size"] = config.host_pool_bytes / 2**30
        arguments["kv_offloading_backend"] = "native"
    for setting in given.vllm_set:
        name, _, value = setting.partition("=")
        arguments[name] = json.loads(value)
    return arguments


def measure_vllm(
    peer: VllmPeer,
    given: argparse.Namespace,
    config: EngineConfig,
    items: Sequence[WorkItem],
    *,
    mode: str,
    workload: str,
    requests_per_s: float = 0.0,
    limit_s: float | None = None,
    until: float = 1.0,
) -> Row:
    """As `measure`, with a vLLM that runs; what only our engine says of itself is 0.

    Args:
        until: below 1, the steady throughput is that of a load cut off so; here `limit_s` does it,
            late enough for three quarters of the output.
    """
    fitting = [
        item if item.prompt_tokens + item.output_tokens <= given.context
        else clip(item, given.context)
        for item in items
    ]  # fmt: skip
    asked_tokens = sum(item.output_tokens for item in fitting) if until < 1 else None
    requests, duration_s = peer.answer(
        fitting, seed=given.seed, limit_s=limit_s, seconds=given.vllm_seconds
    )
    nothing = {field.name: 0 for field in msgspec.structs.fields(Row)}
    return Row(
        **{
            **nothing,
            "model": config.model,
            "workload": workload,
            "requests_per_s": requests_per_s,
            "kv_bytes": config.device_kv_bytes,
            "mode": mode,
            **seen_by_clients(requests, duration_s, asked_tokens),
        }
    )


def add_vllm(parser: argparse.ArgumentParser) -> None:
    """The options of the peer."""
    add = parser.add_argument
    add("--vllm", type=Path, metavar="PATH", help="packages of vLLM, for the modes vllm*")
    add("--vllm-set", action="append", default=[], metavar="NAME=JSON", help="vLLM engine option")
    add("--vllm-start", type=float, default=300.0, help="most seconds that its start may take")
    add("--vllm-seconds", type=float, default=400.0, help="most seconds that a row may take")


def check_vllm(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """End with a line where a mode needs vLLM and there is none."""
    if given.plot_only or not set(given.modes) & set(VLLM_MODES):
        return
    if given.vllm is None:
        parser.error("the modes vllm and vllm-offload need --vllm PATH, vLLM's unpacked packages")
    if given.device == "sim":
        parser.error("vLLM cannot be simulated: leave its modes out, or --device sim")
