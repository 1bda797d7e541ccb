"""scripts/gpu_test runs every test that needs a GPU, and nothing that it is not asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def passed_on(tmp_path: Path, *arguments: str) -> list[str]:
    """What pytest would be given."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nif [ "$1" = - ]; then cat >/dev/null; else exec {sys.executable} -c '
        "'import sys; print(*sys.argv[1:], sep=chr(10))' \"$@\"; fi\n"
    )
    python.chmod(0o755)
    done = subprocess.run(
        [TESTS.parent / "scripts" / "gpu_test", *arguments],
        env={**os.environ, "PIE_PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[:4] == ["-m", "pytest", "-m", "gpu"]
    return done.stdout.splitlines()[4:]


def test_every_test_that_needs_a_gpu_lies_where_it_looks(tmp_path):
    folders = [TESTS.parent / folder for folder in passed_on(tmp_path)]
    marked = [path for path in TESTS.rglob("*.py") if "mark.gpu" in path.read_text()]
    strays = [path for path in marked if not any(map(path.is_relative_to, folders))]
    assert strays == [Path(__file__)]
    for folder in folders:
        assert any(path.is_relative_to(folder) for path in marked)


@pytest.mark.parametrize(
    "arguments",
    [["tests/gpu", "-q"], ["tests/gpu/test_graphs.py::test_x", "-s"]],
)
def test_what_is_named_is_run_alone(arguments, tmp_path):
    assert passed_on(tmp_path, *arguments) == arguments


def test_options_alone_leave_all_of_them(tmp_path):
    assert passed_on(tmp_path, "-k", "contract") == [*passed_on(tmp_path), "-k", "contract"]
