"""`pie-async plan` and what `doctor` measures for it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from pie_async import Engine, EngineConfig
from pie_async import model as model_room
from pie_async.__main__ import main
from pie_async.cli.measure import measure
from pie_async.cli.prediction import HOW_FAR_OFF, Prediction, steady_tokens_per_s
from pie_async.config import GIB
from pie_async.device.cost_model import GPUS, LINKS, USUAL_LINKS, Machine
from pie_async.measurements import RequestTimes

FEW = ["-n", "40", "--max-running", "64"]


def planned(tmp_path, *arguments: str) -> list[Prediction]:
    path = tmp_path / "plan.json"
    assert main(["plan", *FEW, *arguments, "--json", str(path)]) == 0
    return msgspec.json.decode(path.read_bytes(), type=list[Prediction])


@pytest.fixture(scope="module")
def scarce(tmp_path_factory) -> tuple[list[Prediction], str]:
    """A 32B model with 2 GiB of KV, on two ways to the pool; and what was printed."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plot = path.with_suffix(".svg")
    trace = path.with_name("trace.jsonl")
    line = '{"timestamp": 0, "input_length": 1500, "output_length": 120, "hash_ids": []}\n'
    trace.write_text(24 * line)  # few and long: a sixth of them fits
    memory = ["--model", "qwen2.5-32b", "--gpu-memory", "67GiB", "--host-pool", "16GiB"]
    memory += ["--workload", str(trace)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        flags = [*FEW, *memory, "--compare", "h200,gh200", "--plot", str(plot)]
        assert main(["plan", *flags, "--json", str(path)]) == 0
    return msgspec.json.decode(path.read_bytes(), type=list[Prediction]), plot.read_text()


def test_where_memory_is_scarce_pooling_pays_and_more_so_behind_a_fast_link(scarce) -> None:
    far, near = scarce[0]
    assert (far.place.link, near.place.link) == ("pcie5", "nvlink-c2c")
    assert 1.05 < far.gain < near.gain
    assert "the link" in far.limit and "--max-streamed" in near.limit
    for each in (far, near):
        assert each.off.kv_bytes > each.pooled.kv_bytes, "the staging ring takes from the arena"
        assert each.gain == pytest.approx(
            each.pooled.steady_tokens_per_s / each.off.steady_tokens_per_s
        )
        assert each.pooled.pooled_peak_bytes <= each.best_pool_bytes <= 16 * GIB
        assert each.gain < 1.35 * each.gain_bound
        assert each.off.latency is not None and each.pooled.latency is not None


def test_the_plot_shows_every_gpu(scarce) -> None:
    assert "<svg" in scarce[1]


def test_where_all_fits_pooling_would_not_pay(tmp_path, capsys) -> None:
    (found,) = planned(tmp_path, "--gpu", "h200", "--model", "llama-3.1-8b", "--workload",
                       "alpaca-like")  # fmt: skip
    assert found.best_pool_bytes == 0
    assert found.gain == pytest.approx(1, abs=0.02)
    said = " ".join(capsys.readouterr().out.split())
    assert "h200: pooling would not pay" in said
    assert "Simulated, not measured" in said


def test_what_it_says_of_its_error_is_what_the_documents_say() -> None:
    docs = Path(__file__).parents[2] / "docs"
    rows = re.findall(r"^\| [^|]*pool[^|]* \|( [-\d, ]+ % \|)( [-\d, ]+ % \|)?",
                      (docs / "deciding.md").read_text(), re.MULTILINE)  # fmt: skip
    assert len(rows) == 3
    for column in filter(None, (column for row in rows for column in row)):
        shares = [int(share) for share in re.findall(r"-?\d+", column)]
        assert f"{min(shares)} to {max(shares)} %" in HOW_FAR_OFF
    assert "error-against-the-h200" in (docs / "deciding.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "h300"], "--gpu: there is no GPU named 'h300'; known are h200"),
        (["--compare", "h200,x"], "'x'"),
        (["--link", "token-ring"], "known are pcie3"),
        (["--model", "gpt-5"], "known are tiny"),
        (["--workload", "x"], "'x' is none of sharegpt-like, alpaca-like"),
        (["--workload", "missing.csv"], "missing.csv"),
        (["--machine", "missing.json"], "--machine: cannot read missing.json"),
        (["--machine", "machine.txt"], "no .json file"),
        (["-n", "2"], "at least 8"),
        (["--gpu-memory", "60GiB", "--model", "qwen2.5-32b"], "--gpu-memory"),
    ],
)
def test_what_cannot_be_planned_is_one_line_with_status_2(arguments, says, capsys) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.strip().count("\n") == 0


def test_a_measured_machine_and_a_models_directory_can_be_planned_for(tmp_path) -> None:
    model = str(Path(model_room.__file__).parent / "builtin")
    machine = tmp_path / "machine.json"
    slow = Machine(
        gpu=msgspec.structs.replace(GPUS["rtx4090"], name="mine"),
        link=msgspec.structs.replace(LINKS["pcie3"], name="measured"),
    )
    machine.write_bytes(msgspec.json.encode(slow))
    (found,) = planned(
        tmp_path, "--machine", str(machine), "--model", model, "--workload", "alpaca-like"
    )
    assert found.place.name == "mine" and found.place.link == str(machine)
    assert found.model == model


def test_every_named_gpu_has_a_usual_link() -> None:
    assert USUAL_LINKS.keys() == GPUS.keys()
    assert set(USUAL_LINKS.values()) <= LINKS.keys()


def test_doctor_writes_a_machine_that_an_engine_can_simulate(tmp_path, capsys) -> None:
    path = tmp_path / "machine.json"
    assert main(["doctor", "--machine", str(path), "--device-kv", "2MiB"]) == 0
    assert "GB/s read and written" in capsys.readouterr().out
    machine = Machine.read(path, option="machine")
    assert machine.gpu.hbm_bytes_per_s > 1e8
    assert machine.gpu.flops_per_s[4] > 1e8
    assert machine.link.run_s >= 0
    Engine(EngineConfig(device="sim", sim_gpu=str(path), sim_link=str(path)))
    path.write_text(json.dumps({"gpu": {}}))
    assert main(["bench", "--device", "sim", "--sim-gpu", str(path)]) == 2
    assert "doctor --machine FILE" in capsys.readouterr().err


def test_what_a_processor_cannot_do_is_not_measured() -> None:
    found = measure(gpu=False)
    assert found.pin_bytes_per_s is found.both_bytes_per_s is None
    assert found.h2d_bytes_per_s == found.machine.link.bytes_per_s


def test_steady_throughput_leaves_out_how_it_begins_and_ends() -> None:
    slow = [float(t) for t in range(25)]
    fast = [25 + t / 10 for t in range(50)]
    tail = [31.0 + t for t in range(25)]
    times = RequestTimes(submitted_s=0, prompt_tokens=1, token_s=[*slow, *fast, *tail])
    assert steady_tokens_per_s([times]) == pytest.approx(10, rel=0.02)
    assert steady_tokens_per_s([RequestTimes(submitted_s=0, prompt_tokens=1)]) == 0
