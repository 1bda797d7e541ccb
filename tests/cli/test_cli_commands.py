"""The commands, on the built-in model and on the simulated device."""

import io
import json
import sys

import pytest

from pie_async.__main__ import main
from pie_async.cli.options import SETTINGS
from pie_async.hardware import read_hardware, usable_bytes

pytestmark = pytest.mark.realtime  # the commands start loops of their own
SMALL = ["--device-kv", "2MiB", "--host-pool", "32MiB"]
SIM = ["--device", "sim", "--device-kv", "64MiB", "--host-pool", "1GiB", "tiny"]


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    for flag in SETTINGS.values():
        monkeypatch.delenv(flag.variable, raising=False)


def generated(capsys, *arguments):
    assert main(["generate", "-n", "12", *SMALL, *arguments]) == 0
    return capsys.readouterr().out


def test_generate_writes_the_text_alone_and_the_same_for_the_same_seed(capsys):
    first = generated(capsys, "-p", "ROMEO:", "--seed", "5")
    assert len(first.split()) > 2
    assert first == generated(capsys, "-p", "ROMEO:", "--seed", "5")
    assert first != generated(capsys, "-p", "ROMEO:", "--seed", "6")


def test_generate_reads_its_prompt_from_standard_input(capsys, monkeypatch):
    wanted = generated(capsys, "-p", "JULIET:", "--temperature", "0")
    monkeypatch.setattr(sys, "stdin", io.StringIO("JULIET:"))
    assert generated(capsys, "--temperature", "0") == wanted


def test_generate_refuses_empty_input(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["generate"]) == 2
    assert "standard input is empty" in capsys.readouterr().err


def test_chat_answers_a_message_with_another_text_than_plain_completion(capsys):
    plain = generated(capsys, "-p", "Who goes there?", "--temperature", "0")
    chat = generated(capsys, "--chat", "-p", "Who goes there?", "--temperature", "0")
    assert chat.strip()
    assert chat != plain


def test_bench_writes_a_table_and_json_that_agree(capsys, tmp_path):
    path = tmp_path / "result.json"
    flags = ["--workload", "fixed", "--prompt-tokens", "20", "--output-tokens", "6", "-n", "5"]
    assert main(["bench", *SMALL, *flags, "--ttft-limit", "100", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["summary"]["output_tokens"] == 30
    assert report["summary"]["prompt_tokens"] == 100
    assert report["summary"]["failed"] == 0
    assert report["summary"]["goodput_share"] == 1.0
    assert report["pool"]["iterations"] >= 6
    assert report["engine"]["device_kv_bytes"] == 2 * 2**20
    for name in ("output tokens/s", "TTFT", "TPOT", "ITL", "p99", "stall share", "goodput"):
        assert name in out
    assert f"{report['summary']['output_tokens_per_s']:,.1f}" in out


def test_bench_shows_the_pool_at_work_when_the_arena_is_too_small(tmp_path):
    path = tmp_path / "result.json"
    flags = ["--workload", "fixed", "--prompt-tokens", "64", "--output-tokens", "32", "-n", "12"]
    memory = ["--device-kv", "1MiB", "--host-pool", "32MiB"]
    assert main(["bench", *memory, *flags, "--json", str(path)]) == 0
    pool = json.loads(path.read_text())["pool"]
    assert pool["streamed_blocks_peak"] + pool["parked_blocks_peak"] > 0
    assert pool["d2h_bytes"] > 0
    assert pool["resident_blocks_peak"] <= pool["device_blocks"]
    assert len(pool["timeline"]) >= 2


def test_bench_on_the_simulated_device_runs_in_virtual_time_and_repeats_itself(tmp_path):
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path in paths:
        flags = ["-n", "40", "--rate", "5", "--json", str(path)]
        assert main(["bench", *SIM, *flags]) == 0
    one, two = (json.loads(path.read_text()) for path in paths)
    assert one["clock"] == "virtual"
    assert one["summary"]["duration_s"] > 4  # forty requests at five a second
    assert one["summary"] == two["summary"]
    assert one["pool"] == two["pool"]


def test_bench_replays_a_trace_at_its_own_times(tmp_path):
    trace, path = tmp_path / "trace.jsonl", tmp_path / "result.json"
    line = '{{"timestamp": {}, "input_length": 40, "output_length": 5, "hash_ids": [1]}}\n'
    trace.write_text(line.format(0) + line.format(30_000))
    assert main(["bench", *SIM, "--trace", str(trace), "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["summary"]["duration_s"] == pytest.approx(30, abs=0.5)
    assert report["workload"]["name"] == str(trace)


def test_bench_that_cannot_write_its_json_says_so_before_it_measures(tmp_path, capsys):
    target = tmp_path / "no-such-folder" / "result.json"
    assert main(["bench", *SIM, "-n", "2", "--json", str(target)]) == 2
    told = capsys.readouterr()
    assert "no-such-folder" in told.err
    assert not told.out


def test_doctor_tells_hardware_copies_and_plan(capsys):
    assert main(["doctor", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "GPU: " in out
    assert "GB/s" in out
    assert "device arena 2.0 MiB: 21 blocks, 336 tokens" in out
    # a ring of 2 of 4 groups, for as many blocks as the pool has
    assert (
        "in all: weights 20.9 MiB, KV 2.0 MiB, staging up to 21.3 MiB, pool up to 32.0 MiB" in out
    )
    assert "of memory to spare" in out


def test_doctor_json_holds_the_same_plan_that_the_engine_makes(capsys):
    assert main(["doctor", "--json", *SMALL]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = found["plan"]
    assert plan["device_blocks"] == 21
    assert plan["block_bytes"] == 6 * 2 * 16 * 4 * 32 * 4  # layers, K and V, tokens, heads, dim
    assert plan["max_model_len"] == 4096
    assert found["copies"]["contiguous_bytes_per_s"] > 1e8


def test_doctor_says_where_the_pool_lies_and_asks_nothing_of_host_memory_for_a_peers(capsys):
    gpu = ["--device", "cuda", "--device-kv", "64MiB", "--host-pool", "4000TiB"]
    assert main(["doctor", *gpu, "--pool", "peer:1"]) == 0
    printed = capsys.readouterr().out
    assert "pool in the memory of GPU 1 up to 4000.0 TiB" in printed
    assert "warning" not in printed
    assert main(["doctor", *gpu]) == 0
    assert "warning: the pool may take" in capsys.readouterr().out


def test_a_plan_beyond_the_machines_memory_is_warned_about_naming_the_flags(capsys):
    assert main(["doctor", "--json", "--host-pool", "4000TiB"]) == 0
    [warning] = json.loads(capsys.readouterr().out)["warnings"]
    assert "--host-pool" in warning


def test_usable_memory_respects_the_containers_limit():
    hardware = read_hardware()
    limited = type(hardware)(
        **{name: getattr(hardware, name) for name in hardware.__struct_fields__}
        | {"available_bytes": 1000, "cgroup_limit_bytes": 500, "cgroup_used_bytes": 100}
    )
    assert usable_bytes(limited) == 400
