"""scripts/gpu_test runs every test that needs a GPU, and nothing that it is not asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOAK = "tests/gpu/test_cuda_soak.py"


def collected(*arguments: str) -> set[Path]:
    """Files that pytest looks into, whether their tests need a GPU or not."""
    done = subprocess.run(
        [TESTS.parent / "scripts" / "gpu_test", "--collect-only", "-q", "-m", "", *arguments],
        env={**os.environ, "PIE_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    names = (line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line)
    return {TESTS.parent / name for name in names}


def test_options_leave_every_file_with_such_tests_and_no_folder_without():
    """A machine with a GPU may lack what the others import. An option's path names no tests."""
    files = collected("--deselect", SOAK)
    marked = {path for path in TESTS.rglob("test_*.py") if "mark.gpu" in path.read_text()}
    assert marked - files == {TESTS.parent / SOAK, Path(__file__)}
    assert {path.parent for path in files} == {path.parent for path in files & marked}


@pytest.mark.parametrize("named", [SOAK, f"{SOAK}::test_random_loads_leave_nothing_behind"])
def test_what_is_named_is_run_alone(named):
    assert collected(named) == {TESTS.parent / SOAK}
