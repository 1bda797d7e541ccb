"""scripts/bench_kernels: its arithmetic, and what it says without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts._bench_kernels.__main__ import main
from scripts._bench_kernels.counts import decode_bytes, linear_bytes, linear_flops, prefill_flops
from scripts._bench_kernels.timing import Case, difference, measure, num_copies, show, write

ROOT = Path(__file__).parent.parent


def test_decode_reads_keys_and_values_of_every_context_once():
    assert decode_bytes([1024] * 64, kv_heads=8, head_dim=128, itemsize=2) == 64 * 1024 * 4096
    assert decode_bytes([1, 9], kv_heads=1, head_dim=4, itemsize=2) == 10 * 2 * 4 * 2


@pytest.mark.parametrize("rows", [[(3, 0)], [(2, 5)], [(3, 0), (4, 7)]])
def test_prefill_multiplies_what_each_token_sees(rows):
    seen = sum(start + token + 1 for num, start in rows for token in range(num))
    assert prefill_flops(rows, heads=2, head_dim=8) == seen * 2 * (2 * 2 * 8)


def test_linear_reads_both_operands_and_writes_their_product():
    assert linear_bytes(2, 3, 5, itemsize=2) == 2 * (10 + 15 + 6)
    assert linear_flops(2, 3, 5) == 2 * 30


def test_copies_exceed_the_cache_and_stay_few():
    assert num_copies(1) == num_copies(1000) > 1
    assert num_copies(100 * 10**6) * 100 * 10**6 >= 400 * 10**6
    assert num_copies(10**10) == 1


def test_difference_is_relative_and_counts_integers():
    ones = torch.ones(4)
    assert difference(ones * 1.5, ones) == pytest.approx(0.5)
    assert difference(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25
    assert difference(torch.tensor([torch.nan]), torch.ones(1)) != 0


@pytest.mark.parametrize("error", [0.5, torch.nan])
def test_a_wrong_result_is_told_and_not_timed(error):
    row = measure(Case("x", "1", "a", [lambda: None], lambda: error), replays=1)
    assert row.is_wrong and row.us is None and row.note.startswith("WRONG")


def test_a_configuration_that_cannot_run_costs_its_row_alone(tmp_path, capsys):
    def fail() -> float:
        raise RuntimeError("out of shared memory")

    row = measure(Case("x", "1", "a", [lambda: None], fail), replays=1)
    assert not row.is_wrong and "out of shared memory" in row.note
    write(tmp_path / "new" / "out.json", [row], machine="m")
    written = json.loads((tmp_path / "new" / "out.json").read_text())
    assert written["machine"] == "m" and written["rows"][0]["us"] is None
    show([row], title="m")
    assert "out of shared memory" in capsys.readouterr().out


def test_only_attention_is_swept(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["linear", "--sweep"])
    assert "--sweep is for attention" in capsys.readouterr().err


def test_without_a_gpu_it_ends_with_one_line():
    env = os.environ | {"PIE_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [ROOT / "scripts" / "bench_kernels", "--quick"], env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and "device cuda cannot be used" in ended.stderr
