"""The experiments run on the CPU with the built-in model, and leave what they promise."""

from __future__ import annotations

import csv
import json

import pytest

from pie_async.config import MIB
from scripts.paper import throughput, transparency

BUILTIN = ["--device", "cpu", "--model", "builtin", "--load-format", "checkpoint"]

pytestmark = pytest.mark.realtime


def rows_of(folder, name):
    found = json.loads((folder / f"{name}.json").read_text())
    with (folder / f"{name}.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(found["rows"])
    assert found["experiment"] == name and found["machine"] and found["date"]
    return found["rows"]


def test_transparency_compares_each_share_with_nothing_streamed(tmp_path, monkeypatch, capsys):
    arguments = [
        *BUILTIN, "--batch", "3", "--context", "96", "--iterations", "6", "--shares", "0.5", "1.5",
        "--kv", "64MiB", "--host-pool", "32MiB", "--results", str(tmp_path),
        "--set", "link_bytes_per_s=2e8", "--set", "cpu_threads=1", "--set", "max_model_len=1500",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["transparency", *arguments])
    transparency.main()
    few, many = rows_of(tmp_path, "transparency")
    assert 0 < few["streamed_bytes"] < many["streamed_bytes"]
    assert few["streamed_bytes"] % (96 * 1024) == 0
    assert 0 < few["link_share"] < many["link_share"]
    assert many["ratio"] > 1 and many["bound_ratio"] > 1
    assert "streamed_bytes" in capsys.readouterr().out


def test_throughput_runs_one_load_in_every_mode(tmp_path, monkeypatch):
    arguments = [
        *BUILTIN, "--kv", "2MiB", "--host-pool", "32MiB", "--requests", "6", "--context", "128",
        "--results", str(tmp_path), "--set", "cpu_threads=1",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["throughput", *arguments])
    throughput.main()
    rows = {row["mode"]: row for row in rows_of(tmp_path, "throughput")}
    assert list(rows) == ["off", "parking", "pie"]
    assert {row["requests"] for row in rows.values()} == {6}
    assert {row["kv_bytes"] for row in rows.values()} == {2 * MIB}
    assert rows["off"]["streamed_bytes"] == 0
    assert rows["parking"]["mean_streamed_blocks"] == 0
    assert all(row["output_tokens_per_s"] > 0 for row in rows.values())
