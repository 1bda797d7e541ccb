"""What vLLM does with the same requests, as plain numbers under the rows' names."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts._bench_gpu import loads
from scripts._bench_gpu.options import AT_SHARE, PEER_ROWS, Options
from scripts._bench_gpu.peers import PeerFailed, PeerLoad, Result, Vllm

Peers = dict[str, dict[str, Any]]

CONTEXT_SPARE_TOKENS = 16
_EQUAL = {"throughput-64": (64, 1024, 128), "throughput-256": (256, 512, 128)}


def measured_peers(options: Options, save: Callable[[Peers], None]) -> Peers:
    """vLLM's results, from an earlier run or measured now; empty without either.

    Args:
        save: given what there is after each of its runs.
    """
    found: Peers = {}
    if options.peers_from is not None:
        found = json.loads(options.peers_from.read_text()).get("peers", {})
    if options.vllm is None:
        return found
    with tempfile.TemporaryDirectory() as scratch:
        vllm = Vllm(
            packages=options.vllm,
            model=options.engine.model,
            kv_bytes=options.engine.device_kv_bytes or 0,
            context_tokens=options.context_tokens + CONTEXT_SPARE_TOKENS,
            scratch=Path(scratch),
            seconds=options.peer_seconds,
        )
        print("vLLM runs its rows", flush=True)
        try:
            found = by_row(vllm.results(list(_loads(options))))
        except PeerFailed as failure:
            print(f"vLLM: {failure}", flush=True)
            found = {name: {"failure": str(failure)} for name in PEER_ROWS if name in options.rows}
        save(found)
    return found


def _loads(options: Options) -> Iterator[PeerLoad]:
    for name, sizes in _EQUAL.items():
        if name in options.rows:
            yield PeerLoad(name, loads.equal(options, *sizes), rounds=options.rounds)
    if {"azure", "rate"} & set(options.rows):
        yield PeerLoad("azure", loads.at_once(options))
    if "rate" in options.rows:
        yield PeerLoad(
            "rate", loads.at_rate(options, 1.0, count=options.requests), share_of="azure",
            share=AT_SHARE, seconds=options.seconds,
        )  # fmt: skip


def by_row(results: Sequence[Result]) -> Peers:
    """Medians over a row's rounds."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(str(result["name"]), []).append(result)
    return {
        name: {
            **rounds[-1],
            "output_tokens_per_s": statistics.median(each["out_tok_per_s"] for each in rounds),
            "requests_per_s": rounds[-1].get(
                "requests_per_s", statistics.median(each["req_per_s"] for each in rounds)
            ),
            "rounds": rounds,
        }
        for name, rounds in rows.items()
    }


def saturating_rate(peers: Peers) -> float | None:
    """Requests per second of the trace submitted at once."""
    found = peers.get("azure", {}).get("requests_per_s")
    return None if found is None else float(found)
