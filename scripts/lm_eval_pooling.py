"""lm-eval's scores with pooling off and on must be the same. Needs an environment with lm-eval.

    python -m venv EVAL && EVAL/bin/pip install 'lm-eval[api]' transformers
    python scripts/lm_eval_pooling.py --python EVAL/bin/python --text PLAYS.txt

A local task of multiple choices: after 60 lines of a play, which of four lines comes next? The
model is the built-in one, spoken to as `local-completions` does (prompts of token ids, `echo`,
logprobs). Once everything is resident; once the arena is smaller than a single request, so that
its first blocks are streamed for each of its later chunks. Scores must be equal, and so must
log-likelihoods but for rounding: what is computed together decides how a product is summed up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TASK = "next_line"
LINES = 60
ROUNDING = 1e-3
"""Of a log-likelihood, a sum over some ten tokens."""
RUNS = {
    "off": ("--device-kv", "64MiB", "--host-pool", "0"),
    "on": ("--device-kv", "2MiB", "--host-pool", "64MiB"),
}
YAML = f"""
task: {TASK}
dataset_path: json
dataset_kwargs: {{data_files: {{test: DATA}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def write_task(place: Path, text: str, count: int) -> None:
    """The questions, drawn with a fixed seed, and lm-eval's description of them."""
    dice = random.Random(5)
    lines = [line for line in text.splitlines(keepends=True) if line.strip()]
    with (place / "questions.jsonl").open("w") as questions:
        for _ in range(count):
            at = dice.randrange(LINES, len(lines) - 1)
            choices = [lines[at], *dice.sample(lines, 3)]
            order = dice.sample(range(4), 4)
            question = {
                "context": "".join(lines[at - LINES : at]),
                "choices": [choices[index] for index in order],
                "label": order.index(0),
            }
            questions.write(json.dumps(question) + "\n")
    data = json.dumps(str(place / "questions.jsonl"))
    (place / f"{TASK}.yaml").write_text(YAML.replace("DATA", data))


@contextmanager
def server(flags: tuple[str, ...], port: int) -> Iterator[str]:
    """`pie-async serve` with the built-in model; its URL."""
    command = [sys.executable, "-m", "pie_async", "serve", "--port", str(port), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            while not _is_ready(url):
                if process.poll() is not None:
                    raise SystemExit(f"the server ended with status {process.returncode}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready"):  # an address of our own
            return True
    except OSError:
        return False


def metric(url: str, name: str) -> float:
    """A sample of /metrics, its labels left out."""
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def evaluate(
    python: str, url: str, place: Path, target: Path
) -> tuple[dict[str, float], list[Any]]:
    """Run lm-eval: scores, and the log-likelihoods of all choices in order."""
    arguments = {
        "model": "pie-shakespeare",
        "base_url": f"{url}/v1/completions",
        "tokenizer": str(ROOT / "pie_async" / "model" / "builtin"),
        "tokenizer_backend": "huggingface",
        "tokenized_requests": "True",
        "num_concurrent": "8",
        "max_length": "1024",
    }
    command = [python, "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", TASK]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--include_path", str(place), "--output_path", str(target), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(place / "cache")}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    results = json.loads(next(target.rglob("results_*.json")).read_text())["results"][TASK]
    scores = {name: results[f"{name},none"] for name in ("acc", "acc_norm")}
    samples = next(target.rglob("samples_*.jsonl")).read_text().splitlines()
    ordered = sorted(map(json.loads, samples), key=lambda sample: int(sample["doc_id"]))
    return scores, [sample["filtered_resps"] for sample in ordered]


def main() -> int:
    """1 if any number differs, or nothing was streamed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", required=True, help="of an environment with lm-eval")
    parser.add_argument("--text", type=Path, required=True, help="plays, as plain text")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--port", type=int, default=8181)
    chosen = parser.parse_args()
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_task(place, chosen.text.read_text(), chosen.questions)
        for name, flags in RUNS.items():
            with server(flags, chosen.port) as url:
                scores, likelihoods = evaluate(chosen.python, url, place, place / name)
                streamed = metric(url, 'pie:link_bytes_total{direction="h2d"}') / 2**20
            outcomes[name] = (scores, likelihoods)
            print(f"pooling {name}: {scores}, {streamed:.0f} MiB streamed", flush=True)
    (off, likelihoods_off), (on, likelihoods_on) = outcomes["off"], outcomes["on"]
    pairs = list(zip(flat(likelihoods_off), flat(likelihoods_on), strict=True))
    farthest = max(abs(one - other) for one, other in pairs)
    print(f"{len(pairs)} log-likelihoods, {farthest:.2g} apart at most")
    is_same = off == on and farthest < ROUNDING
    print("the same" if is_same else "THEY DIFFER")
    return 0 if is_same and streamed > 0 else 1


def flat(responses: list[Any]) -> list[float]:
    """All log-likelihoods, in order."""
    return [float(choice[0]) for question in responses for choice in question]


if __name__ == "__main__":
    sys.exit(main())
