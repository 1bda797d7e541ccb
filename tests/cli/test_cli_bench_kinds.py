"""`pie-async bench latency|throughput|serve`, and `--compare`."""

from __future__ import annotations

import json

import pytest

from pie_async.__main__ import main
from pie_async.cli.bench import with_kind

SIM = ["tiny", "--device", "sim", "--device-kv", "64MiB", "--host-pool", "64MiB"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("bench", "bench throughput"),
        ("bench tiny --rate 5", "bench throughput tiny --rate 5"),
        ("bench --device sim tiny", "bench throughput --device sim tiny"),
        ("bench latency tiny", "bench latency tiny"),
        ("bench --help", "bench --help"),
        ("serve bench-model", "serve bench-model"),
    ],
)
def test_the_kind_may_be_left_out(given, meant) -> None:
    assert with_kind(given.split()) == meant.split()


def measured(tmp_path, name: str, *arguments: str) -> dict:
    path = tmp_path / name
    assert main(["bench", *arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_latency_sends_one_request_after_the_other(tmp_path) -> None:
    lengths = ["--prompt-tokens", "50", "--output-tokens", "10"]
    found = measured(tmp_path, "a.json", "latency", *SIM, *lengths)
    assert found["summary"]["requests"] == 10
    assert found["workload"]["concurrency"] == 1
    assert found["pool"]["iterations"] == 10 * 10  # none is shared
    spread = found["summary"]["e2e_s"]
    assert spread["p99"] < 1.5 * spread["p50"]


def test_two_results_are_compared_and_what_differs_is_told(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lengths = ["--workload", "fixed", "--prompt-tokens", "50", "--output-tokens", "10", "-n", "6"]
    measured(tmp_path, "fast.json", *SIM, *lengths)
    measured(tmp_path, "slow.json", *SIM, *lengths, "--sim-gpu", "rtx4090", "--concurrency", "1")
    capsys.readouterr()
    files = [str(tmp_path / name) for name in ("fast.json", "slow.json")]
    assert main(["bench", "--compare", *files]) == 0
    told = capsys.readouterr()
    rows = {line.split("  ")[0]: line.split() for line in told.out.splitlines()}
    assert rows["output tokens/s"][-1] == rows["TPOT p50, ms"][-1] == "worse"
    ratio = float(rows["output tokens/s"][-2])
    fast, slow = (json.loads((tmp_path / name).read_text())["summary"]["output_tokens_per_s"]
                  for name in ("fast.json", "slow.json"))  # fmt: skip
    assert ratio == pytest.approx(slow / fast, abs=1e-3) and ratio < 1
    assert "workload differs" in told.err and "concurrency 1" in told.err
    assert main(["bench", "--compare", files[0], files[0]]) == 0
    told = capsys.readouterr()
    assert "worse" not in told.out and "better" not in told.out and told.err == ""


@pytest.mark.parametrize("text", [None, "{", "[]", '{"summary": 3}'])
def test_what_is_no_result_cannot_be_compared(tmp_path, capsys, text) -> None:
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    assert main(["bench", "--compare", str(path), str(path)]) == 2
    error = capsys.readouterr().err
    assert "x.json" in error and error.strip().count("\n") == 0


def test_serve_asks_the_usual_server_unless_told(capsys) -> None:
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9", "-n", "1"]) == 1
    assert "cannot talk to http://127.0.0.1:9" in capsys.readouterr().err
