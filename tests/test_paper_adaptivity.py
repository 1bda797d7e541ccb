"""The governor against fixed settings while the load changes, on the simulated device."""

from __future__ import annotations

import json

import pytest

from scripts.paper import adaptivity

LOAD = [
    "--device", "sim", "--model", "llama-3.1-8b", "--link", "nvlink", "--kv", "256MiB",
    "--host-pool", "1GiB", "--context", "512", "--rates", "10", "150", "40",
    "--settling", "10", "--steps", "1", "--most", "60",
]  # fmt: skip


def rows_of(tmp_path, monkeypatch, *arguments):
    options = [*LOAD, *arguments, "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["adaptivity", *options])
    adaptivity.main()
    return json.loads((tmp_path / "adaptivity.json").read_text())["rows"]


def test_the_governor_stands_beside_the_best_fixed_setting_of_each_phase(tmp_path, monkeypatch):
    rows = rows_of(tmp_path, monkeypatch, "--seconds", "0.6")
    phases = ["warm-up", "rate up", "long prompts", "back down"]
    assert [row["phase"] for row in rows] == 3 * phases
    for phase in phases:
        *fixed, governor = [row for row in rows if row["phase"] == phase]
        assert [row["setting_blocks"] for row in fixed] == [0, 60]
        best = max(fixed, key=lambda row: row["tokens_per_s"])
        assert governor["is_governor"] and governor["oracle_blocks"] == best["setting_blocks"]
        if best["tokens_per_s"]:
            ratio = governor["tokens_per_s"] / best["tokens_per_s"]
            assert governor["ratio"] == pytest.approx(ratio)
        assert all(row["mean_streamed_blocks"] <= row["setting_blocks"] + 1 for row in fixed)
    up = [row for row in rows if row["phase"] == "rate up"]
    assert up[0]["mean_streamed_blocks"] == 0 < up[1]["mean_streamed_blocks"]
    assert up[2]["gain"] > 1.2, "the governor let nothing run that did not fit"
    warm_up = [row for row in rows if row["phase"] == "warm-up"]
    assert warm_up[2]["tokens_per_s"] > 0
    assert warm_up[2]["ratio"] == pytest.approx(1, abs=0.02)
    assert warm_up[2]["mean_streamed_blocks"] == 0


def test_a_phase_too_short_to_settle_is_refused(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=r"'warm-up' had .* give more --seconds"):
        rows_of(tmp_path, monkeypatch, "--seconds", "0.05")
