#!/usr/bin/env python3
"""Output tokens per second of pie_async against transformers, same model, same run.

    python scripts/bench_vs_transformers.py [MODEL] --json result.json

Both run on this machine's CPU in float32, greedily, on 16 requests of mixed length (prompts of
16 to 256 tokens, outputs of 32 to 256, seeded), with the same number of torch threads. Every
request must get exactly its number of output tokens.

transformers is taken at its best of several, each warmed up, with sdpa attention: `generate` in
inference mode on one left-padded batch, with a dynamic and with a static cache (with --compile
also a compiled one), and continuous batching where it runs on a CPU. `generate` gives every row
of a batch as many tokens as the longest needs; only those asked for are counted, for that is
what the caller gets.

Rounds alternate between the contestants, so that a slow minute of the machine hits all alike;
the median round counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from pie_async import LLM, SamplingParams
from pie_async.config import BUILTIN_MODEL, parse_size
from pie_async.hardware import read_hardware
from pie_async.model.checkpoint import resolve_model

FIRST_TOKEN = 16
"""Prompts keep clear of special tokens."""


@dataclass(frozen=True)
class Request:
    """One request: random prompt tokens and how many tokens must come out."""

    prompt: list[int]
    output_tokens: int


@dataclass
class Contestant:
    """Runs all requests and returns the output token ids of each."""

    name: str
    run: Callable[[Sequence[Request]], list[list[int]]]
    seconds: list[float]
    refusal: str | None = None


def make_requests(num_requests: int, vocab_size: int, seed: int) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            prompt=rng.choices(range(FIRST_TOKEN, vocab_size), k=rng.randint(16, 256)),
            output_tokens=rng.randint(32, 256),
        )
        for _ in range(num_requests)
    ]


class Peer:
    """transformers, set up as its documentation advises for a CPU."""

    def __init__(self, path: Path, *, is_compiled: bool = False) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self._manager: Any = None
        if is_compiled:
            self._model.forward = torch.compile(self._model.forward)
        self.vocab_size = int(self._model.config.vocab_size)

    def generate(self, cache: str | None) -> Callable[[Sequence[Request]], list[list[int]]]:
        def run(requests: Sequence[Request]) -> list[list[int]]:
            longest = max(len(request.prompt) for request in requests)
            padding = [longest - len(request.prompt) for request in requests]
            ids = torch.tensor(
                [[0] * pad + r.prompt for pad, r in zip(padding, requests, strict=True)]
            )
            mask = torch.tensor(
                [[0] * pad + [1] * len(r.prompt) for pad, r in zip(padding, requests, strict=True)]
            )
            most = max(request.output_tokens for request in requests)
            options: dict[str, Any] = {} if cache is None else {"cache_implementation": cache}
            with torch.inference_mode():
                out = self._model.generate(
                    ids,
                    attention_mask=mask,
                    generation_config=self._greedy(most),
                    **options,
                )
            rows = out[:, longest:].tolist()
            return [row[: r.output_tokens] for row, r in zip(rows, requests, strict=True)]

        return run

    def run_continuously(self, requests: Sequence[Request]) -> list[list[int]]:
        """Continuous batching, each request with its own output length."""
        manager = self._continuous_manager(requests)
        names = [
            manager.add_request(r.prompt, max_new_tokens=r.output_tokens, eos_token_id=-1)
            for r in requests
        ]
        answers: dict[str, list[int]] = {}
        while len(answers) < len(requests):
            result = manager.get_result(timeout=1.0)
            if result is not None and result.error is not None:
                raise RuntimeError(result.error)
            if result is not None and result.is_finished():
                answers[result.request_id] = list(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("its generation thread ended")
        return [answers[name] for name in names]

    def _continuous_manager(self, requests: Sequence[Request]) -> Any:
        """Set up once; its own default takes most of the memory, and half a minute for that."""
        if self._manager is None:
            page_tokens = 256
            longest = max(len(r.prompt) + r.output_tokens for r in requests)
            self._manager = self._model.init_continuous_batching(
                generation_config=self._greedy(longest),
                continuous_batching_config=transformers.ContinuousBatchingConfig(
                    page_size=page_tokens,
                    num_blocks=len(requests) * (longest // page_tokens + 2),
                    max_batch_tokens=512,
                    max_requests_per_batch=len(requests),
                    allow_block_sharing=False,
                ),
            )
            self._manager.start()
        return self._manager

    def close(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True)

    def _greedy(self, output_tokens: int) -> transformers.GenerationConfig:
        return transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            pad_token_id=0,
            eos_token_id=None,
            use_cache=True,
        )


def pie_runner(llm: LLM) -> Callable[[Sequence[Request]], list[list[int]]]:
    def run(requests: Sequence[Request]) -> list[list[int]]:
        params = [
            SamplingParams(temperature=0.0, max_tokens=r.output_tokens, ignore_eos=True)
            for r in requests
        ]
        outputs = llm.generate([r.prompt for r in requests], params, progress=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return run


def race(contestants: Sequence[Contestant], requests: Sequence[Request], rounds: int) -> None:
    """A warm-up each, then timed rounds in turn. A contestant that fails is out, with a reason."""
    for number in range(rounds + 1):
        for contestant in contestants:
            if contestant.refusal is None:
                _one_round(contestant, requests, is_timed=number > 0)


def _one_round(contestant: Contestant, requests: Sequence[Request], *, is_timed: bool) -> None:
    began_s = time.perf_counter()
    try:
        outputs = contestant.run(requests)
    except Exception as error:  # whatever a peer's experimental path raises
        contestant.refusal = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        return
    elapsed_s = time.perf_counter() - began_s
    for output, request in zip(outputs, requests, strict=True):
        if len(output) != request.output_tokens:
            contestant.refusal = f"{len(output)} tokens where {request.output_tokens} were asked"
            return
    if is_timed:
        contestant.seconds.append(elapsed_s)
        print(f"{contestant.name}: {elapsed_s:.2f} s", file=sys.stderr, flush=True)


def agreement(a: list[list[int]], b: list[list[int]]) -> float:
    """Share of requests with the same tokens; near-ties may differ between padded batches."""
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def report(
    contestants: Sequence[Contestant], requests: Sequence[Request], same: float
) -> dict[str, Any]:
    output_tokens = sum(request.output_tokens for request in requests)
    rates = {
        c.name: output_tokens / statistics.median(c.seconds)
        for c in contestants
        if c.refusal is None
    }
    ours = rates.get("pie_async")
    peers = {name: rate for name, rate in rates.items() if name != "pie_async"}
    hardware = read_hardware()
    return {
        "machine": f"{hardware.processor}, {hardware.cores} cores",
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "torch_threads": torch.get_num_threads(),
        "requests": len(requests),
        "prompt_tokens": sum(len(request.prompt) for request in requests),
        "output_tokens": output_tokens,
        "output_tokens_per_s": rates,
        "seconds": {c.name: c.seconds for c in contestants},
        "refused": {c.name: c.refusal for c in contestants if c.refusal is not None},
        "same_outputs": same,
        "ratio_to_best_peer": ours / max(peers.values()) if ours and peers else None,
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"{result['requests']} requests, {result['prompt_tokens']:,} prompt tokens, "
          f"{result['output_tokens']:,} output tokens, float32, greedy, "
          f"{result['torch_threads']} torch threads; {result['machine']}")  # fmt: skip
    rates = result["output_tokens_per_s"]
    print(f"\n| {'':40} | output tokens/s | pie_async is |\n|{'-' * 42}|{'-' * 17}|{'-' * 14}|")
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
        ratio = f"{rates['pie_async'] / rate:.2f}x" if "pie_async" in rates else "-"
        print(f"| {name:40} | {rate:15,.1f} | {ratio:>12} |")
    for name, reason in result["refused"].items():
        print(f"| {name:40} | did not run: {reason}")
    print(f"\nsame tokens in {result['same_outputs']:.0%} of the requests")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=BUILTIN_MODEL)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device-kv", default="256MiB", help="pie_async's arena")
    parser.add_argument(
        "--compile", action="store_true", help="also a static cache with torch.compile (minutes)"
    )
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()

    peer = Peer(resolve_model(options.model))
    requests = make_requests(options.requests, peer.vocab_size, options.seed)
    arena_bytes = parse_size(options.device_kv, option="device-kv")
    with LLM(model=options.model, dtype="float32", device_kv_bytes=arena_bytes,
             cpu_threads=options.threads) as llm:  # fmt: skip
        contestants = [
            Contestant("pie_async", pie_runner(llm), []),
            Contestant("transformers generate, dynamic cache", peer.generate(None), []),
            Contestant("transformers generate, static cache", peer.generate("static"), []),
            Contestant("transformers continuous batching", peer.run_continuously, []),
        ]
        if options.compile:
            compiled = Peer(resolve_model(options.model), is_compiled=True).generate("static")
            contestants.append(Contestant("transformers generate, static, compiled", compiled, []))
        race(contestants, requests, options.rounds)
        same = agreement(contestants[0].run(requests), contestants[1].run(requests))
        peer.close()
    result = report(contestants, requests, same)
    print_table(result)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
