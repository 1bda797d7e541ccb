"""Feed everything that reads others' bytes with damaged and invented ones, guided by coverage.

Each target (`tests/support/fuzz_targets.py`) gets a process and an equal share of the time. Without
atheris (extra `fuzz`) inputs are the corpus mutated at random. What fails is written to --found
and named at the end, with exit status 1; inputs that are worth keeping go to tests/fuzz_corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
MOST_BYTES = 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=3600.0, help="time for all targets")
    parser.add_argument("--target", action="append", help="only this one; may be repeated")
    parser.add_argument("--found", type=Path, default=Path("fuzz_found"), help="where crashes go")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--one", metavar="TARGET", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.one:
        return fuzz(args.one, args.seconds, args.found, args.seed)
    from tests.support.fuzz_targets import TARGETS

    names = args.target or list(TARGETS)
    if unknown := set(names) - TARGETS.keys():
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    args.found.mkdir(parents=True, exist_ok=True)
    failed = [name for name in names if not run_apart(name, args.seconds / len(names), args)]
    print(f"{len(names)} targets; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def run_apart(name: str, seconds: float, args: argparse.Namespace) -> bool:
    """One target in a process of its own: what it crashes is that alone."""
    log = args.found / f"{name}.log"
    with log.open("w") as output:
        status = subprocess.run(
            [
                sys.executable, __file__, "--one", name, "--seconds", str(seconds),
                "--found", str(args.found), "--seed", str(args.seed),
            ],
            stdout=output, stderr=subprocess.STDOUT, check=False,
        ).returncode  # fmt: skip
    lines = log.read_text(errors="replace").splitlines()
    told = [line for line in lines if line.startswith(("Done", "stat::number", "inputs"))]
    print(f"{name}: {'ok' if status == 0 else f'FAILED, see {log}'}; {'; '.join(told)}", flush=True)
    return status == 0


def fuzz(name: str, seconds: float, found: Path, seed: int) -> int:
    try:
        import atheris
    except ImportError:
        return mutate_at_random(name, seconds, found, seed)
    with atheris.instrument_imports(include=["pie_async", "tests.support.fuzz_targets"]):
        from tests.support.fuzz_targets import CORPUS, TARGETS
    kept = tempfile.mkdtemp(prefix=f"pie-fuzz-{name}-")
    options = [
        f"-max_total_time={max(1, int(seconds))}", f"-max_len={MOST_BYTES}", "-timeout=10",
        "-rss_limit_mb=2048", f"-seed={seed + 1}", "-print_final_stats=1",
        f"-artifact_prefix={found}/{name}-",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, kept, str(CORPUS / name)], TARGETS[name])
    atheris.Fuzz()  # ends the process
    return 0


def mutate_at_random(name: str, seconds: float, found: Path, seed: int) -> int:
    from tests.support.fuzz_targets import TARGETS, corpus

    rng, seeds, count = random.Random(f"{name}/{seed}"), corpus(name), 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        data = mutated(rng, seeds)
        count += 1
        try:
            TARGETS[name](data)
        except BaseException:
            (found / f"{name}-crash-{count}").write_bytes(data)
            raise
    print(f"inputs: {count}, without coverage")
    return 0


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    """One of the seeds with some bytes changed, cut out, doubled or taken from another."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 6)):
        at = rng.randint(0, len(data))
        end = min(len(data), at + rng.randint(0, 8))
        other = rng.choice(seeds)
        piece = other[(start := rng.randint(0, len(other))) : start + rng.randint(0, 16)]
        data[at:end] = rng.choice((b"", piece, rng.randbytes(end - at), bytes(data[at:end]) * 2))
    return bytes(data[:MOST_BYTES])


if __name__ == "__main__":
    with contextlib.suppress(ValueError):
        os.nice(10)
    sys.exit(main())
