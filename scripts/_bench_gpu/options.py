"""What the command line asks for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from pie_async.config import EngineConfig, parse_size

ROWS = (
    "start", "decode-1", "decode-64", "decode-256", "prefill", "ttft", "throughput-64",
    "throughput-256", "azure", "rate", "attention",
)  # fmt: skip
PEER_ROWS = ("throughput-64", "throughput-256", "azure", "rate")
"""Those that vLLM is measured on too."""
CONTEXT_TOKENS = 16_384
"""Longer requests of the trace are cut to it, for every engine alike."""
AT_SHARE = 0.7
"""Of the saturating rate: where latencies are measured."""


class Options(NamedTuple):
    """The command line, checked."""

    rows: tuple[str, ...]
    scale: float
    seconds: float
    rounds: int
    iterations: int
    requests: int
    trace: Path | None
    profiles: bool
    read_bytes_per_s: float
    engine: EngineConfig
    vllm: Path | None
    flashinfer: Path | None
    flashinfer_script: Path | None
    peers_from: Path | None
    peer_seconds: float
    out: Path | None

    def scaled(self, number: int) -> int:
        """A batch, length or count, for machines too slow for the whole of it."""
        return max(1, round(number * self.scale))

    @property
    def context_tokens(self) -> int:
        return self.scaled(CONTEXT_TOKENS)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line; ends the process where it makes no sense.

    Raises:
        ConfigError: an engine option that cannot work.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    rows = tuple(given.rows.split(",")) if given.rows else ROWS
    if unknown := set(rows) - set(ROWS):
        parser.error(f"no rows named {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if given.trace is None and not given.rows:
        rows = tuple(row for row in rows if row not in ("azure", "rate"))
    elif given.trace is None and set(rows) & {"azure", "rate"}:
        parser.error("rows azure and rate need --trace FILE (azure_llm_conv_2023.csv)")
    return Options(
        rows=rows,
        scale=given.scale,
        seconds=given.seconds,
        rounds=given.rounds,
        iterations=given.iterations,
        requests=given.requests,
        trace=given.trace,
        profiles=given.profile,
        read_bytes_per_s=given.hbm_rate,
        engine=_engine(given),
        vllm=_packages(given.vllm),
        flashinfer=_packages(given.flashinfer),
        flashinfer_script=given.flashinfer_script
        or _beside(given.flashinfer, "bench_flashinfer.py"),
        peers_from=given.peers_from,
        peer_seconds=given.peer_seconds,
        out=given.out,
    )


def _engine(given: argparse.Namespace) -> EngineConfig:
    fields: dict[str, Any] = {
        "model": given.model,
        "device": given.device,
        "load_format": given.load_format,
        "device_kv_bytes": parse_size(given.kv, option="--kv"),
        "host_pool_bytes": 0,
        "prefix_caching": False,
    }
    for setting in given.set:
        name, _, value = setting.partition("=")
        fields[name] = _value(value)
    return EngineConfig(**fields)


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _packages(directory: Path | None) -> Path | None:
    """What goes on PYTHONPATH: the directory, or `lib` in it."""
    if directory is None:
        return None
    return directory / "lib" if (directory / "lib").is_dir() else directory


def _beside(directory: Path | None, script: str) -> Path | None:
    if directory is None:
        return None
    return next((d / script for d in (directory, directory.parent) if (d / script).is_file()), None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_gpu", description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--rows", default="", help=f"comma-separated, of {', '.join(ROWS)}; all by default")
    add("--model", default="llama-3.1-8b", help="a named shape, or a directory")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--load-format", default="random", choices=("random", "checkpoint"))
    add("--kv", default="40GiB", help="KV memory, the same for every engine")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="of EngineConfig")
    add("--trace", type=Path, help="the Azure conversation trace (CSV)")
    add("--requests", type=int, default=400, help="first requests of the trace")
    add("--seconds", type=float, default=30.0, help="most that a row repeats or lasts")
    add("--rounds", type=int, default=3, help="of throughput and prefill rows; medians count")
    add("--iterations", type=int, default=100, help="measured in a decode row")
    add("--scale", type=float, default=1.0, help="of batches, lengths and counts")
    add("--profile", action="store_true", help="20 decode iterations under torch's profiler")
    add("--hbm-rate", type=float, default=4.2e12, help="bytes/s of the rooflines")
    add("--vllm", type=Path, metavar="DIR", help="an unpacked vLLM")
    add("--flashinfer", type=Path, metavar="DIR", help="an unpacked FlashInfer")
    add("--flashinfer-script", type=Path, help="by default bench_flashinfer.py there")
    add("--peers-from", type=Path, metavar="FILE", help="an earlier --out: its peers' results")
    add("--peer-seconds", type=float, default=240.0, help="most that one run of a peer takes")
    add("--out", type=Path, metavar="FILE", help="write JSON, again after every row")
    return parser
