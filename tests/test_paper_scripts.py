"""The experiments run on the CPU with the built-in model, and leave what they promise."""

from __future__ import annotations

import csv
import itertools
import json
import textwrap

import numpy as np
import pytest
import torch

from pie_async.config import MIB
from pie_async.errors import ConfigError
from pie_async.measurements import RequestTimes
from scripts.paper import copy_cost, flexgen, rates, throughput, transparency
from scripts.paper.load import Row
from scripts.paper.progress import Progress

BUILTIN = ["--device", "cpu", "--model", "builtin", "--load-format", "checkpoint"]
THREE_DECODE = [
    *BUILTIN, "--batch", "3", "--context", "96", "--host-pool", "32MiB",
    "--set", "cpu_threads=1", "--set", "max_model_len=1500",
]  # fmt: skip

pytestmark = pytest.mark.realtime


def rows_of(folder, name):
    found = json.loads((folder / f"{name}.json").read_text())
    with (folder / f"{name}.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(found["rows"])
    assert found["experiment"] == name and found["machine"] and found["date"]
    return found["rows"]


def run_transparency(folder, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["transparency", *arguments, "--results", str(folder)])
    transparency.main()


def test_transparency_compares_each_share_with_nothing_streamed(tmp_path, monkeypatch, capsys):
    run_transparency(
        tmp_path, monkeypatch, *THREE_DECODE, "--iterations", "6", "--shares", "0.5", "1.5",
        "--kv", "64MiB", "--set", "link_bytes_per_s=2e8",
    )  # fmt: skip
    few, many = rows_of(tmp_path, "transparency")
    assert 0 < few["streamed_bytes"] < many["streamed_bytes"]
    assert few["streamed_bytes"] % (96 * 1024) == 0
    assert 0 < few["link_share"] < many["link_share"]
    assert many["ratio"] > 1 and many["bound_ratio"] > 1
    assert "streamed_bytes" in capsys.readouterr().out


def test_transparency_of_a_simulated_card_is_in_its_own_time(tmp_path, monkeypatch):
    arguments = [
        "--device", "sim", "--set", 'sim_link="nvlink-c2c"', "--batch", "16",
        "--iterations", "10", "--shares", "0.4", "0.8", "--kv", "8GiB", "--host-pool", "8GiB",
    ]  # fmt: skip
    found = {}
    for name, gpu in (("first", "gh200"), ("again", "gh200"), ("other", "h100")):
        run_transparency(tmp_path, monkeypatch, *arguments, "--gpu", gpu, "--name", name)
        found[name] = [{**row, "launch_s": 0} for row in rows_of(tmp_path, name)]
    assert found["first"] == found["again"]
    some, many = found["first"]
    assert 1 < some["bound_ratio"] < some["ratio"] < many["ratio"] < 1.12
    assert many["iteration_s"] == pytest.approx(many["compute_s"], rel=0.01)
    assert found["other"][0]["resident_s"] > 1.15 * some["resident_s"], "its memory is slower"


def test_transparency_refuses_a_batch_that_outgrows_the_device(tmp_path, monkeypatch):
    arguments = [*THREE_DECODE, "--iterations", "60", "--shares", "0.5", "--kv", "4MiB"]
    with pytest.raises(
        SystemExit, match=r"sequences of 376 tokens take .* device has 3.9 MiB.*--kv"
    ):
        run_transparency(tmp_path, monkeypatch, *arguments)
    assert not list(tmp_path.iterdir())


def test_transparency_ends_when_a_sequence_is_parked(tmp_path, monkeypatch):
    """What changes of the streamed blocks take cannot be known beforehand."""
    arguments = [*THREE_DECODE, "--iterations", "150", "--shares", "0.5", "--kv", "4MiB"]
    monkeypatch.setattr(transparency, "_check_room", lambda *_: None)
    monkeypatch.setattr(transparency, "PROBE_BLOCKS", 4)
    with pytest.raises(SystemExit, match=r"of 3 sequences are parked.*all must fit.*--kv"):
        run_transparency(tmp_path, monkeypatch, *arguments)


def test_throughput_runs_one_load_in_every_mode(tmp_path, monkeypatch):
    arguments = [
        *BUILTIN, "--kv", "2MiB", "--host-pool", "32MiB", "--requests", "6", "--context", "128",
        "--results", str(tmp_path), "--set", "cpu_threads=1", "--name", "2.0MiB",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["throughput", *arguments])
    throughput.main()
    rows = {row["mode"]: row for row in rows_of(tmp_path, "2.0MiB")}
    assert list(rows) == ["off", "parking", "pie"]
    assert {row["requests"] for row in rows.values()} == {6}
    assert {row["kv_bytes"] for row in rows.values()} == {2 * MIB}
    assert rows["off"]["streamed_bytes"] == 0
    assert rows["parking"]["mean_streamed_blocks"] == 0
    assert all(row["output_tokens_per_s"] > 0 for row in rows.values())


FAKE_VLLM = {
    "vllm/__init__.py": """
        class SamplingParams:
            def __init__(self, **fields): self.__dict__ |= fields
        TokensPrompt = dict
        """,
    "vllm/sampling_params.py": "class RequestOutputKind: DELTA = 1",
    "vllm/engine/__init__.py": "",
    "vllm/engine/arg_utils.py": "AsyncEngineArgs = dict",
    "vllm/v1/__init__.py": "",
    "vllm/v1/engine/__init__.py": "",
    "vllm/v1/engine/async_llm.py": """
        import asyncio, types
        print("noise where the answers would be")
        class AsyncLLM:
            def __init__(self, arguments):
                assert arguments["kv_cache_memory_bytes"] == 64 * 2**20
                assert arguments.get("kv_offloading_size") in (None, 0.25)
            from_engine_args = classmethod(lambda cls, arguments: cls(arguments))
            async def generate(self, prompt, params, name):
                for _ in range(params.max_tokens):
                    await asyncio.sleep(0.001)
                    yield types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[7])])
            def shutdown(self): pass
        """,
}
ON_VLLM = ["--model", "llama-3.1-8b", "--context", "64", "--host-pool", "256MiB"]


def stand_in(folder):
    for name, text in FAKE_VLLM.items():
        path = folder / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder / "lib"


def test_vllm_answers_the_same_load_in_its_own_process(tmp_path, monkeypatch):
    arguments = [
        *ON_VLLM, "--kv", "64MiB", "--requests", "6", "--modes", "vllm", "vllm-offload",
        "--vllm", str(stand_in(tmp_path)), "--results", str(tmp_path),
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["throughput", *arguments])
    throughput.main()
    plain, offload = rows_of(tmp_path, "throughput")
    assert [plain["mode"], offload["mode"]] == ["vllm", "vllm-offload"]
    for row in (plain, offload):
        assert row["requests"] == row["sent"] == 6 and row["kv_bytes"] == 64 * MIB
        assert row["tpot_p99_s"] >= row["tpot_p50_s"] >= 0.001
        assert row["normalized_p50_s"] > 0 and row["output_tokens_per_s"] > 0


def test_rates_put_vllm_at_offs_rate_and_say_what_a_budget_leaves_out(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(rates, "FEWEST_REQUESTS", 5)
    arguments = [
        *ON_VLLM, "--kv", "64MiB", "--modes", "vllm", "--off-rate", "50", "--shares", "0.5", "1",
        "--own", "--seconds", "0.1", "--vllm", str(stand_in(tmp_path)), "--results", str(tmp_path),
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["rates", *arguments])
    rates.main()
    rows = rows_of(tmp_path, "rates")
    assert [(row["requests_per_s"], row["off_share"]) for row in rows] == [(25, 0.5), (50, 1)]
    assert all(row["requests"] == 5 for row in rows)
    monkeypatch.setattr("sys.argv", ["rates", *arguments, "--budget", "0"])
    rates.main()
    assert "left out, --budget is spent: vllm" in capsys.readouterr().out


def test_decoding_is_counted_from_the_last_first_token_as_flexgen_does():
    first = RequestTimes(submitted_s=0.0, prompt_tokens=4)
    second = RequestTimes(submitted_s=0.0, prompt_tokens=4)
    for time_s in (1.0, 2.0, 3.0, 4.0):
        first.arrived(time_s, 1)
        second.arrived(time_s + 1, 1)
    row = Row(**{**dict.fromkeys(Row.__struct_fields__, 0), "kv_bytes": 5})
    half = flexgen.flexgen_rates(
        {"gpu_peak_bytes": 7, "prefill_s": 1.0, "decode_tokens_per_s": 0.5,
         "total_tokens_per_s": 0.4}, "half", 4,
    )  # fmt: skip
    made = flexgen.pie_rates(row, [first, second], 4, half.gpu_bytes, half)
    # After 2 s: two of the first's tokens and three of the second's, in 3 s.
    assert made.prefill_s == 2 and made.decode_tokens_per_s == pytest.approx(5 / 3)
    assert made.total_tokens_per_s == pytest.approx(8 / 5)
    assert made.decode_gain == pytest.approx(10 / 3) and made.total_gain == pytest.approx(4)


def test_the_cost_of_copies_is_measured_on_a_gpu_alone(tmp_path, monkeypatch):
    def refuse() -> None:
        raise ConfigError("there is no GPU here")

    monkeypatch.setattr(copy_cost, "require_cuda", refuse)
    monkeypatch.setattr("sys.argv", ["copy_cost", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="copy_cost: there is no GPU here"):
        copy_cost.main()
    assert not list(tmp_path.iterdir())


def test_copies_go_through_the_ring_and_the_source_again_and_again():
    source, ring = torch.zeros(copy_cost.SOURCE_BYTES // 4, dtype=torch.int32), torch.zeros(2**21)
    way = copy_cost.Way("host", 2**20, ring.nbytes)
    batches = list(itertools.islice(copy_cost._batches(source, ring, way), 200))
    for sources, destinations, sizes in batches:
        assert (sizes == 2**20).all() and sizes.sum() == ring.nbytes
        assert destinations[0] == ring.data_ptr() and (np.diff(destinations) == 2**20).all()
        assert sources[0] >= source.data_ptr()
        assert sources[-1] + sizes[-1] <= source.data_ptr() + source.nbytes
    begins = [int(sources[0]) for sources, _, _ in batches]
    assert len(set(begins)) == 128 and begins[128:] == begins[:72]


def test_progress_says_what_begins_and_how_long_the_rest_may_take(capsys):
    now = iter([0.0, 30.0, 90.0])
    progress = Progress(4, clock=lambda: next(now))
    for part in ("2GiB off", "2GiB pie", "4GiB off"):
        progress.begin(part)
    assert capsys.readouterr().out.splitlines() == [
        "[....................] 1 of 4: 2GiB off",
        "[#####...............] 2 of 4, 90 s left: 2GiB pie",
        "[##########..........] 3 of 4, 90 s left: 4GiB off",
    ]
