"""Other engines and kernels on the same card, each in a process of its own.

Their scripts print lines that begin with RESULT and go on with JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pie_async.config import GIB
from pie_async.errors import ConfigError
from pie_async.model.named_shapes import NAMED_SHAPES
from pie_async.workload import WorkItem

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "opt": "OPTForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
Result = dict[str, Any]


class PeerFailed(Exception):
    """A peer's script ended without a result; says how."""


def results_of(
    script: Path, arguments: Sequence[str], *, packages: Path | None, seconds: float
) -> list[Result]:
    """Run a peer's script and read its results.

    Args:
        packages: put in front of its PYTHONPATH.

    Raises:
        PeerFailed: it failed, took too long or printed no result.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = str(packages) if packages else ""
    try:
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            env=environment, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise PeerFailed(f"took longer than {seconds:.0f} s") from None
    lines = done.stdout.splitlines()
    found = [json.loads(line.removeprefix("RESULT ")) for line in lines if line[:7] == "RESULT "]
    if not found:
        last = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise PeerFailed(f"ended with status {done.returncode}: {' | '.join(last)[-300:]}")
    return found


class Vllm(NamedTuple):
    """vLLM with random weights of a named shape, through its benchmark script."""

    packages: Path
    script: Path
    model: str
    kv_bytes: int
    more: Sequence[str]
    """Further arguments for the script."""
    scratch: Path
    seconds: float

    def saturated(self, items: Sequence[WorkItem], *, rounds: int) -> list[Result]:
        """All requests at once."""
        how = ["--mode", "offline", "--repeat", str(rounds)]
        return self._run([*how, *self._trace(items, "saturated")])

    def at_rate(self, items: Sequence[WorkItem]) -> Result:
        """At their arrival times."""
        return self._run(["--mode", "online", *self._trace(items, "rate")])[0]

    def _run(self, arguments: Sequence[str]) -> list[Result]:
        common = ["--kv-cache-gib", str(self.kv_bytes / GIB), *self._model(), *self.more]
        return results_of(
            self.script, [*common, *arguments], packages=self.packages, seconds=self.seconds
        )

    def _model(self) -> list[str]:
        if self.model not in NAMED_SHAPES:
            raise ConfigError(f"vLLM can be given named shapes only, not {self.model}")
        config = dict(NAMED_SHAPES[self.model])
        config["architectures"] = [_ARCHITECTURES[config["model_type"]]]
        path = self.scratch / f"{self.model}.json"
        path.write_text(json.dumps(config))
        return ["--config-json", str(path)]

    def _trace(self, items: Sequence[WorkItem], name: str) -> list[str]:
        path = self.scratch / f"{name}.json"
        listed = [
            {
                "prompt_len": item.prompt_tokens,
                "output_len": item.output_tokens,
                "arrival_s": item.arrival_s,
            }
            for item in items
        ]
        path.write_text(json.dumps(listed))
        return ["--trace", str(path)]


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
