"""Other engines and kernels on the same card, each in a process of its own.

Their scripts print lines that begin with RESULT and go on with JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pie_async.errors import ConfigError
from pie_async.model.named_shapes import NAMED_SHAPES
from pie_async.workload import WorkItem

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "opt": "OPTForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
VLLM_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
"""Nothing is looked up on the network, nothing is compiled that needs a compiler."""
Result = dict[str, Any]


class PeerFailed(Exception):
    """A peer's script ended without a result; says how."""


def results_of(
    script: Path,
    arguments: Sequence[str],
    *,
    packages: Path | None,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> list[Result]:
    """Run a peer's script and read its results.

    Args:
        packages: put in front of its PYTHONPATH.
        environment: more of it.

    Raises:
        PeerFailed: it failed, took too long or printed no result.
    """
    variables = {**os.environ, **(environment or {})}
    variables["PYTHONPATH"] = str(packages) if packages else ""
    try:
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            env=variables, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        # What it has printed so far counts.
        if found := _found((late.stdout or b"").decode()):
            return found
        raise PeerFailed(f"took longer than {seconds:.0f} s") from None
    found = _found(done.stdout)
    if not found:
        last = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise PeerFailed(f"ended with status {done.returncode}: {' | '.join(last)[-300:]}")
    return found


def _found(printed: str) -> list[Result]:
    lines = printed.splitlines()
    return [json.loads(line.removeprefix("RESULT ")) for line in lines if line[:7] == "RESULT "]


class PeerLoad(NamedTuple):
    """Requests for a peer, and how often they are run."""

    name: str
    items: Sequence[WorkItem]
    rounds: int = 1
    share_of: str | None = None
    """Arrivals, meant for 1 request per second, are sped up to a share of what this load
    reached, and cut after `seconds`."""
    share: float = 1.0
    seconds: float = 0.0


class Vllm(NamedTuple):
    """vLLM with random weights of a named shape, all loads on one engine."""

    packages: Path
    model: str
    kv_bytes: int
    context_tokens: int
    scratch: Path
    seconds: float

    def results(self, loads: Sequence[PeerLoad]) -> list[Result]:
        """One result for every round of every load, as far as it got.

        Raises:
            PeerFailed: it has no result at all.
        """
        engine = {
            "model": str(write_model(self.model, self.scratch)),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "max_model_len": self.context_tokens,
            "kv_cache_memory_bytes": self.kv_bytes,
            "enable_prefix_caching": False,
        }
        plan = self.scratch / "plan.json"
        stand_ins = str(self.packages.parent / "fallback")
        listed = [_plain(load) for load in loads]
        plan.write_text(json.dumps({"engine": engine, "loads": listed, "stand_ins": stand_ins}))
        driver = Path(__file__).with_name("vllm_driver.py")
        return results_of(
            driver,
            [str(plan)],
            packages=self.packages,
            seconds=self.seconds,
            environment={**VLLM_ENVIRONMENT, "VLLM_CACHE_ROOT": str(self.scratch / "cache")},
        )


def write_model(model: str, folder: Path) -> Path:
    """A folder with a named shape's config.json, as vLLM reads it.

    Raises:
        ConfigError: there is no such shape.
    """
    if model not in NAMED_SHAPES:
        raise ConfigError(f"vLLM can be given named shapes only, not {model}")
    config = dict(NAMED_SHAPES[model])
    config["architectures"] = [_ARCHITECTURES[config["model_type"]]]
    config["torch_dtype"] = "bfloat16"
    path = folder / model
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def _plain(load: PeerLoad) -> dict[str, Any]:
    requests = [
        {
            "prompt_len": item.prompt_tokens,
            "output_len": item.output_tokens,
            "arrival_s": item.arrival_s,
        }
        for item in load.items
    ]
    is_read = load.share_of is not None
    return {**load._asdict(), "items": None, "requests": requests, "is_read": is_read}


class FlashInfer(NamedTuple):
    """FlashInfer's attention kernels, through their benchmark script."""

    packages: Path
    script: Path
    seconds: float

    def decode_s(self, batch: int, context: int) -> float:
        """Seconds of its fastest decode kernel, replayed from a graph."""
        found = self._run(["--case", "decode", "--batch", str(batch), "--kv-len", str(context)])
        # Where a graph could not be captured, its time is a text that says why.
        times = [each.get("graph_us") for each in found]
        replayed = [float(us) for us in times if isinstance(us, (int, float))]
        return min(replayed or [float(each["us"]) for each in found if "us" in each]) / 1e6

    def prefill_s(self, batch: int, tokens: int) -> float:
        sizes = ["--batch", str(batch), "--q-len", str(tokens), "--kv-len", str(tokens)]
        found = self._run(["--case", "prefill", *sizes])
        return min(float(each["us"]) for each in found if "us" in each) / 1e6

    def _run(self, arguments: Sequence[str]) -> list[Result]:
        return results_of(self.script, arguments, packages=self.packages, seconds=self.seconds)
