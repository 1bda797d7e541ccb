"""A batch: a file of prompts in, a file of answers out, and a bar that says how far it is.

    printf '%s\\n' '{"id": 1, "prompt": "ROMEO:"}' '{"id": 2, "prompt": "JULIET:"}' > prompts.jsonl
    python examples/batch/batch_job.py prompts.jsonl answers.jsonl --max-tokens 50

A line that fails says so in its answer; the others go on. Answers come in the order in which they
are done. What is in the file already is not asked again: an interrupted job goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pie_async import Engine, PieError, SamplingParams

AT_ONCE = 256
"""Requests that are open at the same time; the engine decides how many of them run."""


def read_jobs(source: Path, done: Path) -> list[dict]:
    """The lines that have no answer yet."""
    answered = {answer["id"] for answer in _lines(done)} if done.exists() else set()
    return [job for job in _lines(source) if job["id"] not in answered]


def _lines(path: Path) -> Iterator[dict]:
    with path.open() as lines:
        yield from map(json.loads, filter(str.strip, lines))


async def answer(engine: Engine, job: dict, params: SamplingParams) -> dict:
    """The line to write for a job."""
    try:
        async for output in engine.generate(job["prompt"], params):
            text = output.outputs[0].text
    except PieError as error:
        return {"id": job["id"], "error": str(error)}
    return {"id": job["id"], "text": text, "finish_reason": output.outputs[0].finish_reason}


async def run(source: Path, target: Path, params: SamplingParams, **options: object) -> int:
    """Answer every line; how many were."""
    jobs = iter(read_jobs(source, target))
    total = len(read_jobs(source, target))
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, target.open("a") as answers:
        bar = progress.add_task("answers", total=total)
        async with Engine(**options) as engine:

            async def work() -> None:
                for job in jobs:  # shared: each job is taken by whoever is free
                    answers.write(json.dumps(await answer(engine, job, params)) + "\n")
                    answers.flush()
                    progress.advance(bar)

            async with asyncio.TaskGroup() as workers:
                for _ in range(min(AT_ONCE, total)):
                    workers.create_task(work())
    return total


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "sim"])
    chosen = parser.parse_args()
    params = SamplingParams(max_tokens=chosen.max_tokens, output_kind="final")
    asyncio.run(run(chosen.source, chosen.target, params, device=chosen.device))


if __name__ == "__main__":
    main()
