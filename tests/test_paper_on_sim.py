"""The experiments with a load, on the simulated device: what they say must be so."""

from __future__ import annotations

import csv
import json

import pytest

from pie_async.workload import LENGTH_MODELS, sample_lengths
from scripts.paper import ablations, gpus, iterations, long_context, rates, throughput

# Seconds long in virtual time; some of them need not fit, or nothing would be streamed.
SMALL = ["--device", "sim", "--model", "llama-3.1-8b", "--host-pool", "4GiB"]
SHORT = ["--context", "512"]
"""Of loads; requests of one size have no such option."""

pytestmark = pytest.mark.realtime  # each command brings its own loop


def run(script, folder, monkeypatch, *arguments):
    """The rows that a command leaves, the same in both files."""
    name = script.__name__.rpartition(".")[2]
    context = [] if script is long_context else SHORT
    monkeypatch.setattr("sys.argv", [name, *SMALL, *context, *arguments, "--results", str(folder)])
    script.main()
    found = json.loads((folder / f"{name}.json").read_text())
    with (folder / f"{name}.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert [row["mode"] for row in listed] == [row["mode"] for row in found["rows"]]
    assert found["experiment"] == name and found["seed"] == 0
    return found["rows"]


def test_rates_are_shares_of_what_saturates_and_overload_is_summed_up(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(rates, "FEWEST_REQUESTS", 12)
    rows = run(
        rates, tmp_path, monkeypatch, "--kv", "64MiB", "--modes", "off", "pie", "--shares", "1",
        "--own", "1", "3", "--seconds", "0.3", "--saturating-requests", "30", "--workload",
        "alpaca-like", "--saturating-seconds", "0.6", "--set", 'sim_link="nvlink"',
    )  # fmt: skip
    assert [row["mode"] for row in rows] == ["off"] * 3 + ["pie"] * 4, "an engine for each mode"
    at_once = [row for row in rows if not row["requests_per_s"]]
    timed = [row for row in rows if row["requests_per_s"]]
    assert at_once == [rows[0], rows[3]], "what saturates comes first"
    assert at_once[1]["steady_tokens_per_s"] > at_once[0]["steady_tokens_per_s"]
    assert [row["mode"] for row in timed] == ["off"] * 2 + ["pie"] * 3
    assert all(row["requests"] == row["sent"] >= 12 for row in timed)
    off, pie = timed[0]["requests_per_s"], timed[3]["requests_per_s"]
    assert timed[1]["requests_per_s"] == pytest.approx(3 * off)
    assert timed[2]["requests_per_s"] == pytest.approx(off)
    assert pie > off and timed[4]["requests_per_s"] == pytest.approx(3 * pie)
    assert timed[0]["ttft_max_s"] >= timed[0]["ttft_p99_s"] >= timed[0]["ttft_p50_s"] > 0
    assert all(row["longest_gap_s"] >= row["tpot_p50_s"] for row in timed)
    told = capsys.readouterr().out
    assert "pie where off saturates: normalised latency p50" in told
    assert "off at 3.0 of its saturating rate: throughput" in told


def test_a_load_is_cut_off_once_enough_of_its_output_is_there(tmp_path, monkeypatch):
    (row,) = run(
        throughput, tmp_path, monkeypatch, "--kv", "64MiB", "--modes", "off", "--workload",
        "alpaca-like", "--requests", "40", "--until", "0.8",
    )  # fmt: skip
    asked = sum(
        item.output_tokens
        for item in sample_lengths(
            LENGTH_MODELS["alpaca-like"], num_requests=40, context_tokens=512, seed=0
        )
    )
    assert 0 < row["requests"] < row["sent"] == 40
    put_out = row["output_tokens_per_s"] * row["duration_s"]
    assert 0.8 * asked <= put_out < 0.9 * asked
    assert row["steady_tokens_per_s"] > 0


def test_rates_summary_compares_with_the_right_points():
    def point(mode, share, own, **fields):
        made = dict.fromkeys(rates.Point.__struct_fields__, 1.0)
        made |= {"workload": "w", "mode": mode, "off_share": share, "own_share": own}
        return rates.Point(**{**made, "requests": 9, "sent": 10, **fields})

    lines = list(
        rates.summary(
            [
                point("off", 0, 0, requests_per_s=0, normalized_p50_s=7.0),
                point("off", 1, 1, normalized_p50_s=4.0, normalized_p99_s=8.0),
                point("pie", 1, 0.5, normalized_p50_s=1.0, normalized_p99_s=4.0),
                point("pie", 2, 1, steady_tokens_per_s=200.0, tpot_p99_s=0.02),
                point("pie", 6, 3, steady_tokens_per_s=150.0, tpot_p99_s=0.03, longest_gap_s=5.0),
            ]
        )
    )
    assert lines == [
        "w, pie where off saturates: normalised latency p50 0.25, p99 0.50 of off's",
        "w, pie at 3.0 of its saturating rate: throughput 0.750 of its peak, TPOT p99 1.50 of "
        "that at saturation, longest gap 5.00 s, answered 9 of 10",
    ]


def test_ablations_change_one_thing_at_a_time(tmp_path, monkeypatch):
    rows = run(
        ablations, tmp_path, monkeypatch, "--kv", "64MiB", "--requests", "20", "--seconds", "0.7",
        "--ring", "4", "--group", "16", "--static", "0", "40",
    )  # fmt: skip
    made = {row["mode"]: row for row in rows}
    names = [
        "base", "ring 4", "group 16", "prefetch off", "exchange ring 2", "exchange ring 4",
        "static 0", "static 40",
    ]  # fmt: skip
    assert list(made) == names  # no graphs: those are the CUDA device's
    assert made["base"]["of_base"] == 1
    base, static = made["base"], made["static 0"]
    # What runs alone may stream nevertheless.
    assert static["mean_streamed_blocks"] < 1 < 20 < base["mean_streamed_blocks"]
    assert made["static 40"]["mean_streamed_blocks"] <= 40
    # Nothing is staged before the iteration before has ended: its first groups are waited for.
    assert made["prefetch off"]["stall_share"] > 2 * base["stall_share"]
    assert made["prefetch off"]["of_base"] < 1
    assert base["streamed_bytes"] > 2 * base["demoted_bytes"] > 0
    exchange = made["exchange ring 4"]
    assert exchange["demoted_bytes"] > 0.9 * exchange["streamed_bytes"] > 0
    assert exchange["of_base"] < 1


@pytest.mark.parametrize("link", ["pcie5", "nvlink"])
def test_long_context_runs_what_the_device_cannot_hold_no_faster_than_the_bound(
    tmp_path, monkeypatch, link
):
    rows = run(
        long_context, tmp_path, monkeypatch, "--kv", "256MiB", "--requests", "1", "3",
        "--output", "16", "--set", f'sim_link="{link}"', "--set", "token_budget=2048",
    )  # fmt: skip
    assert [row["mode"] for row in rows] == ["resident", "pooled"] * 2
    assert [row["requests"] for row in rows] == [1, 1, 3, 3]
    assert {row["context_tokens"] for row in rows} == {8192}
    resident, pooled = rows[:2]
    assert pooled["kv_factor"] == 4 and resident["kv_factor"] < 1
    assert resident["streamed_bytes"] == 0 < pooled["streamed_bytes"]
    assert resident["prompt_tokens_computed"] == pooled["prompt_tokens_computed"] == 8192 - 16
    assert pooled["tpot_p50_s"] >= 0.98 * pooled["decode_bound_s"]
    assert pooled["tpot_p50_s"] > resident["tpot_p50_s"]
    assert pooled["preemptions_recomputed"] == rows[3]["preemptions_recomputed"] == 0


def test_gpus_stream_more_over_a_faster_link(tmp_path, monkeypatch):
    rows = run(
        gpus, tmp_path, monkeypatch, "--cards", "h100", "gh200", "--kv", "1GiB", "--modes", "off",
        "pie", "--requests", "60", "--seconds", "2",
    )  # fmt: skip
    assert [(row["card"], row["mode"]) for row in rows] == [
        ("h100", "off"), ("h100", "pie"), ("gh200", "off"), ("gh200", "pie"),
    ]  # fmt: skip
    assert {row["model"] for row in rows} == {"qwen2.5-32b"}  # the cards', whatever --model says
    assert [row["gain"] for row in rows[::2]] == [1, 1]
    _, h100, _, gh200 = rows
    assert gh200["link"] == "nvlink-c2c" and gh200["gain"] > 1 and h100["gain"] > 1
    assert gh200["mean_streamed_blocks"] > h100["mean_streamed_blocks"]
    assert gh200["gain_bound"] > h100["gain_bound"] > 1
    # Kernels that reach less of the memory's rate leave a link more time.
    assert gh200["engine_bound"] > gh200["gain_bound"]


@pytest.mark.parametrize("name", list(gpus.CARDS))
def test_a_card_holds_the_weights_and_the_kv_that_it_is_given(name):
    assert gpus.fits(gpus.CARDS[name])


def test_a_setting_that_is_no_json_says_how_to_write_it(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"--set sim_link=nvlink: the value must be JSON, as in"):
        run(ablations, tmp_path, monkeypatch, "--set", "sim_link=nvlink")
    assert not list(tmp_path.iterdir())


def test_rates_that_cannot_be_known_are_refused(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="off put out next to nothing: raise --saturating-seconds"):
        run(rates, tmp_path, monkeypatch, "--kv", "64MiB", "--saturating-seconds", "0.001")
    assert not list(tmp_path.iterdir())


def test_iterations_show_what_was_allowed_and_streamed(tmp_path, monkeypatch, capsys):
    name = ["iterations", *SMALL, "--kv", "32MiB", "--requests", "30", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*name, "--set", 'sim_link="nvlink"'])
    iterations.main()
    found = json.loads((tmp_path / "iterations.json").read_text())
    rows, load = found["rows"], found["load"]
    assert len(rows) == pytest.approx(load["iterations"], abs=2)
    assert sum(row["staged_bytes"] for row in rows) <= load["streamed_bytes"]
    assert any(0 < row["streamed_blocks"] <= row["limit_blocks"] for row in rows)
    assert [row["at_s"] for row in rows] == sorted(row["at_s"] for row in rows)
    told = capsys.readouterr().out
    assert "decoding alone, staged: " in told and "limit cut for stall" in told
