"""What vLLM does with the same requests, as plain numbers under the rows' names."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts._bench_gpu import loads
from scripts._bench_gpu.options import AT_SHARE, PEER_ROWS, Options
from scripts._bench_gpu.peers import PeerFailed, Vllm

Peers = dict[str, dict[str, Any]]

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
    if options.vllm_script is None:
        raise SystemExit(f"there is no bench_vllm.py in {options.vllm}; give --vllm-script")
    with tempfile.TemporaryDirectory() as scratch:
        vllm = Vllm(
            packages=options.vllm,
            script=options.vllm_script,
            model=options.engine.model,
            kv_bytes=options.engine.device_kv_bytes or 0,
            more=options.vllm_arguments,
            scratch=Path(scratch),
            seconds=options.peer_seconds,
        )
        for name in PEER_ROWS:
            if name in options.rows:
                print(f"vLLM: {name}", flush=True)
                try:
                    found[name] = _measure(options, vllm, name, found)
                except PeerFailed as failure:
                    print(f"vLLM: {name}: {failure}", flush=True)
                    found[name] = {"failure": str(failure)}
                save(found)
    return found


def _measure(options: Options, vllm: Vllm, name: str, found: Peers) -> dict[str, Any]:
    if name == "rate":
        rate = saturating_rate(found)
        if rate is None:
            raise PeerFailed("its saturating rate is not known; run row azure too")
        items = loads.at_rate(options, AT_SHARE * rate)
        return {**vllm.at_rate(items), "requests_per_s": AT_SHARE * rate}
    if name == "azure":
        results = vllm.saturated(loads.at_once(options), rounds=1)
    else:
        items = loads.equal(options, *_EQUAL[name])
        results = vllm.saturated(items, rounds=options.rounds)
    rate = statistics.median(float(each["out_tok_per_s"]) for each in results)
    requests = statistics.median(float(each["req_per_s"]) for each in results)
    return {"output_tokens_per_s": rate, "requests_per_s": requests, "runs": results}


def saturating_rate(peers: Peers) -> float | None:
    """Requests per second of the trace submitted at once."""
    found = peers.get("azure", {}).get("requests_per_s")
    return None if found is None else float(found)
