"""scripts/bench_gpu: its arithmetic, its reading of peers and traces, and a run on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pie_async.config import EngineConfig
from scripts._bench_gpu.breakdown import class_of, read_trace
from scripts._bench_gpu.host_time import HostTime
from scripts._bench_gpu.options import parse
from scripts._bench_gpu.peer_rows import measured_peers
from scripts._bench_gpu.peers import FlashInfer, PeerFailed, results_of
from scripts._bench_gpu.roofline import Roofline, shape_of
from scripts._bench_gpu.rows import Row

ROOT = Path(__file__).parent.parent
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{n:02}.6805900,{300 + 50 * n},{40 + n}\n" for n in range(40)
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


# --- rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "measured", "against", "ratio", "is_met"),
    [
        ("time", 6.0, 5.6, 5.6 / 6.0, True),
        ("time", 8.0, 5.6, 0.7, False),
        ("rate", 90.0, 100.0, 0.9, True),
        ("rate", 50.0, 100.0, 0.5, False),
        ("rate", 90.0, None, None, None),
    ],
)
def test_a_row_is_met_when_its_ratio_reaches_the_target(kind, measured, against, ratio, is_met):
    row = Row(
        group="x", name="x", kind=kind, unit="s", measured=measured, against=against,
        against_name="other", target=0.85,
    )  # fmt: skip
    assert row.ratio == (ratio if ratio is None else pytest.approx(ratio))
    assert row.is_met is is_met


@pytest.mark.parametrize(("measured", "is_met"), [(0.01, True), (0.03, False), (None, None)])
def test_a_share_is_met_below_its_target(measured, is_met):
    row = Row(group="x", name="x", kind="share", unit="%", measured=measured, target=0.02)
    assert row.is_met is is_met


def test_the_rooflines_are_those_of_the_issue():
    config = EngineConfig(model="llama-3.1-8b", load_format="random", device="cuda")
    roofline = Roofline(shape_of(config, "bfloat16"), 4.2e12, 800e12)
    assert roofline.decode_s(64, 1024) == pytest.approx(5.6e-3, rel=0.01)
    assert roofline.decode_s(1, 1024) == pytest.approx(3.6e-3, rel=0.01)
    assert roofline.decode_s(256, 512) == pytest.approx(7.7e-3, rel=0.01)
    # about 2 FLOP per parameter and token, and a few per cent of attention
    assert roofline.prefill_flops(8, 2048) == pytest.approx(2 * 7.0e9 * 16384, rel=0.05)
    assert roofline.attention_s(64, 1024) == pytest.approx(64 * 1024 * 4096 / 4.2e12)


# --- profiler ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "gemm"),
        ("_decode_kernel", "attention"),
        ("_rotate_and_store_kernel", "norm, rope, activation"),
        ("_norm_kernel", "norm, rope, activation"),
        ("_best_of_chunk_kernel", "sampling"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("_resolve_kernel", "inputs"),
        ("something_else", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(kernel, kind):
    assert class_of(kernel) == kind


def test_a_trace_is_summed_by_class_and_its_gaps_are_idle():
    def event(ts: float, dur: float, name: str = "gemm", cat: str = "kernel") -> dict:
        return {"ts": ts, "dur": dur, "name": name, "cat": cat}

    seen = read_trace(
        [
            event(0, 10),
            event(5, 10, "_decode_kernel"),
            event(20, 5, "Memcpy DtoH", "gpu_memcpy"),
            event(25, 5),
            event(0, 1000, "python", "cpu_op"),
        ]
    )
    assert seen.by_class_s == pytest.approx({"gemm": 15e-6, "attention": 10e-6, "copies": 5e-6})
    assert seen.idle_s == pytest.approx(5e-6)
    assert seen.window_s == pytest.approx(30e-6)


def test_a_pause_at_the_profilers_start_does_not_count():
    kernels = [{"ts": 1e4 + 10 * n, "dur": 10, "name": "gemm", "cat": "kernel"} for n in range(40)]
    early = [{"ts": 0, "dur": 10, "name": "gemm", "cat": "kernel"}]
    assert read_trace(early + kernels).idle_s == 0
    assert read_trace([]).window_s == 0


def test_host_time_counts_the_work_of_threads():
    host = HostTime()
    sum(range(2_000_000))
    assert host.total_s() > 0


# --- peers ------------------------------------------------------------------------------------

FAKE_VLLM = {
    "vllm/__init__.py": """
        class SamplingParams:
            def __init__(self, **fields): self.__dict__ |= fields
        TokensPrompt = dict
        """,
    "vllm/sampling_params.py": "class RequestOutputKind: DELTA, FINAL_ONLY = 1, 2",
    "vllm/engine/__init__.py": "",
    "vllm/engine/arg_utils.py": "AsyncEngineArgs = dict",
    "vllm/v1/__init__.py": "",
    "vllm/v1/engine/__init__.py": "",
    "vllm/v1/engine/async_llm.py": """
        import json, pathlib, types
        class AsyncLLM:
            def __init__(self, arguments):
                config = json.loads(pathlib.Path(arguments["model"], "config.json").read_text())
                assert config["architectures"] == ["LlamaForCausalLM"]
                assert arguments["kv_cache_memory_bytes"] == 2 * 2**30
            from_engine_args = classmethod(lambda cls, arguments: cls(arguments))
            async def generate(self, prompt, params, name):
                assert prompt["prompt_token_ids"]
                tokens = [7] * params.max_tokens
                for part in ([tokens[:1], tokens[1:]] if params.output_kind == 1 else [tokens]):
                    yield types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=part)])
            def shutdown(self): pass
        """,
}


def write_vllm(directory: Path, **changes: str) -> None:
    for name, text in {**FAKE_VLLM, **changes}.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def test_vllm_gets_the_same_requests_and_its_results_are_kept(tmp_path, trace):
    write_vllm(tmp_path)
    options = parse(
        ["--vllm", str(tmp_path), "--kv", "2GiB", "--trace", str(trace), "--requests", "10",
         "--seconds", "1"]
    )  # fmt: skip
    saved: list[dict] = []
    found = measured_peers(options, lambda peers: saved.append(dict(peers)))
    assert saved == [found]
    for name, tokens in (("throughput-64", 64 * 128), ("throughput-256", 256 * 128)):
        rounds = found[name]["rounds"]
        assert len(rounds) == options.rounds
        for each in rounds:
            assert each["out_tok_per_s"] * each["duration_s"] == pytest.approx(tokens)
    rate = found["azure"]["requests_per_s"]
    assert found["rate"]["requests_per_s"] == pytest.approx(0.7 * rate)
    assert found["rate"]["p99_ttft_ms"] >= found["rate"]["p50_ttft_ms"] > 0


def test_an_earlier_runs_peers_are_used_again(tmp_path):
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"peers": {"azure": {"requests_per_s": 3.0}}}))
    options = parse(["--peers-from", str(earlier)])
    assert measured_peers(options, lambda peers: None) == {"azure": {"requests_per_s": 3.0}}


def test_a_peer_that_fails_costs_its_row_alone(tmp_path, trace):
    write_vllm(tmp_path, **{"vllm/engine/arg_utils.py": "raise SystemExit('no kernel image')"})
    options = parse(["--vllm", str(tmp_path), "--rows", "throughput-64"])
    found = measured_peers(options, lambda peers: None)
    assert "no kernel image" in found["throughput-64"]["failure"]
    script = tmp_path / "slow.py"
    script.write_text("import time; time.sleep(60)")
    with pytest.raises(PeerFailed, match="took longer"):
        results_of(script, [], packages=None, seconds=0.5)


def test_flashinfers_fastest_kernel_counts(tmp_path):
    script = tmp_path / "bench_flashinfer.py"
    script.write_text(
        "import json\n"
        "for us, graph in ((9.0, 8.0), (7.0, 'no graph')):\n"
        "    print('RESULT ' + json.dumps({'us': us, 'graph_us': graph}))\n"
        "print('RESULT ' + json.dumps({'error': 'no holistic kernel'}))\n"
    )
    peer = FlashInfer(tmp_path, script, 30.0)
    assert peer.decode_s(64, 1024) == pytest.approx(8e-6)
    assert peer.prefill_s(8, 2048) == pytest.approx(7e-6)


# --- the whole --------------------------------------------------------------------------------


def test_all_rows_run_on_the_cpu(tmp_path, trace):
    out = tmp_path / "out.json"
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "bench_gpu"), "--device", "cpu", "--model", "builtin",
         "--load-format", "checkpoint", "--kv", "64MiB", "--scale", "0.02", "--seconds", "1",
         "--rounds", "1", "--iterations", "10", "--trace", str(trace), "--set", "cpu_threads=1",
         "--profile", "--out", str(out)],
        env={**os.environ, "PIE_PYTHON": sys.executable}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    measured = {row["group"] for row in found["rows"] if row["measured"] is not None}
    assert measured == {
        "start", "decode-1", "decode-64", "decode-256", "prefill", "ttft", "throughput-64",
        "throughput-256", "azure", "rate",
    }  # fmt: skip
    notes = {row["note"] for row in found["rows"] if row["measured"] is None}
    assert notes == {"RuntimeError: the profiler saw no GPU work", "they need a GPU"}
    assert "decode iteration, batch 1" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rows", "nonsense"], "no rows named nonsense; there are start"),
        (["--rows", "azure"], "need --trace FILE"),
    ],
)
def test_arguments_that_make_no_sense_end_at_once(arguments, says, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert says in capsys.readouterr().err
