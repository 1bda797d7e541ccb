"""Other people's clients against a server with a simulated engine. Needs a package index.

    python scripts/conformance.py          # openai for Python 2.x and 3.x, openai-node, ai-sdk
    python scripts/conformance.py node

What they need is installed once into a folder outside the repository ($PIE_CONFORMANCE, by default
in the user's cache), never into the environment that runs this. Without node, `node` says so and
fails; nothing is skipped silently. Not part of `scripts/check`: it downloads.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
PLACE = Path(
    os.environ.get("PIE_CONFORMANCE") or Path.home() / ".cache" / "pie_async" / "conformance"
)
OPENAI_VERSIONS = {"openai2": "openai>=2,<3", "openai3": "openai>=3,<4"}


@contextmanager
def server(port: int = 8179) -> Iterator[str]:
    """`pie-async serve` with a simulated engine; its URL."""
    flags = ["--port", str(port), "--device", "sim"]
    command = [sys.executable, "-m", "pie_async", "serve", "tiny", *flags]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, env=environment) as process:
        try:
            _await(f"{url}/ready", process)
            yield url
        finally:
            process.terminate()


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"the server ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(url):  # an address of our own
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not become ready within a minute")


def python_client(name: str, url: str) -> bool:
    """One version of OpenAI's Python client, in an environment of its own."""
    place = PLACE / name
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", OPENAI_VERSIONS[name]], check=True)
    return subprocess.run([python, HERE / "_conformance" / "python_client.py", url]).returncode == 0


def node(url: str) -> bool:
    """openai-node and the ai-sdk."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        print("FAILED  node: node and npm are not installed; install Node.js 20 or newer")
        return False
    place = PLACE / "node"
    place.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "clients.mjs"):
        shutil.copy(HERE / "_conformance" / name, place / name)
    if not (place / "node_modules").exists():
        subprocess.run(["npm", "install", "--no-audit", "--no-fund"], cwd=place, check=True)
    return subprocess.run(["node", "clients.mjs", url], cwd=place).returncode == 0


def main() -> int:
    """1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = [*OPENAI_VERSIONS, "node"]
    # Not as choices: to Python 3.11 no clients at all are none of them.
    parser.add_argument("clients", nargs="*", help=f"of {', '.join(known)}; all without any")
    chosen = parser.parse_args().clients or known
    if unknown := set(chosen) - set(known):
        parser.error(f"no such client: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    with server() as url:
        passed = [node(url) if each == "node" else python_client(each, url) for each in chosen]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
