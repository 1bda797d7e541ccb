"""Flags: help that can be read, values people write, errors of one line."""

import subprocess
import sys

import msgspec
import pytest
import typer

from pie_async import __version__
from pie_async.__main__ import main
from pie_async.cli.options import (
    MODEL,
    SETTINGS,
    count,
    flag_of,
    rate,
    seconds,
    size,
    with_engine_flags,
)
from pie_async.config import EngineConfig
from pie_async.errors import ConfigError


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    for flag in SETTINGS.values():
        monkeypatch.delenv(flag.variable, raising=False)


def test_every_field_of_the_configuration_but_the_model_has_a_flag():
    fields = {field.name for field in msgspec.structs.fields(EngineConfig)}
    assert set(SETTINGS) == fields - {"model"}
    assert len({flag.flag for flag in SETTINGS.values()}) == len(SETTINGS)


@pytest.mark.parametrize(
    ("text", "value"),
    [("64MiB", 64 * 2**20), ("1.5GiB", 3 * 2**29), ("500MB", 5 * 10**8), ("7", 7)],
)
def test_sizes_are_read_as_people_write_them(text, value):
    assert size(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("32k", 32_000), ("25.6k", 25_600), ("4Ki", 4096), ("1M", 10**6), ("12", 12)],
)
def test_counts_are_read_as_people_write_them(text, value):
    assert count(text) == value


@pytest.mark.parametrize("text", ["", "k", "1.5", "1.0001k", "3kk", "-", "1e3", "nan", "infk"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(typer.BadParameter, match="not a whole number"):
        count(text)


@pytest.mark.parametrize(
    ("text", "value"), [("50ms", 0.05), ("0.05", 0.05), ("2 s", 2.0), ("1.5ms", 0.0015)]
)
def test_times_are_read_as_people_write_them(text, value):
    assert seconds(text) == pytest.approx(value)


def test_rates_may_end_in_per_second():
    assert rate("12.5GB/s") == rate("12.5GB") == 12.5e9


@pytest.mark.parametrize("command", ["serve", "generate", "bench", "doctor"])
def test_help_names_the_memory_flags_with_their_defaults(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--device-kv" in out
    assert "256.0 MiB" in out
    assert "PIE_ASYNC_DEVICE_KV" in out


def test_version_and_the_list_of_commands(capsys):
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("serve", "generate", "bench", "doctor"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--device", "tpu"], "'tpu' is not one of cpu, cuda, sim"),
        (["serve", "--dtype", "int4"], "auto, float32, float16, bfloat16"),
        (["serve", "--device-kv", "12x"], "64MiB, 1.5GiB or 500MB"),
        (["serve", "--load-format", "dummy"], "'dummy', as vLLM calls it, is 'random' here"),
        (["serve", "--load-format", "pickle"], "'pickle' is not one of checkpoint, random"),
        (["serve", "--gpu-memory", "0"], "above 0 and up to 1 (0.9 or 90%) or a size (80GiB)"),
        (["serve", "--gpu-memory", "150%"], "not '150%'"),
        (["serve", "--gpu-memory", "1.5"], "not '1.5'"),
        (["serve", "--gpu-memory", "abc"], "not 'abc'"),
        (["serve", "--quantization", "int4"], "'int4' is not one of fp8"),
        (["doctor", "--quantization", "fp8"], "needs device cuda, not cpu"),
        (["serve", "--itl-target", "fast"], "'fast' is not a time"),
        (["serve", "--itl-target", "50ms", "--token-budget", "512"], "give one of them"),
        (["serve", "--itl-target", "0"], "--itl-target: itl_target_s must be above 0"),
        (["doctor", "--device", "cuda"], "--device"),
        (["serve", "--port", "70000"], "65535"),
        (["bench", "--max-model-len", "1.5"], "4096 or 32k"),
        (["bench", "--ring-depth", "1"], "--ring-depth"),
        (["bench", "--num-requests", "0"], "--num-requests"),
        (["bench", "--workload", "sharegpt"], "sharegpt-like, alpaca-like, fixed, trace"),
        (["bench", "--workload", "trace"], "--trace FILE"),
        (["bench", "--trace", "missing.csv"], "missing.csv"),
        (["bench", "--device", "sim", "--sim-gpu", "x"], "h200"),
        (["generate", "-p", "x", "--temperature", "9"], "temperature must be between 0.0 and 2.0"),
        (["generate", "-p", "x", "--system", "y"], "--system needs --chat"),
        (["generate", "-p", "x", "--device-kv", "1KiB"], "--device-kv"),
        (["serve", "--api-key-file", "missing.txt"], "missing.txt"),
        (["bench", "--no-such-flag"], "--no-such-flag"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_bad_flags_end_with_status_2_and_one_line_that_names_them(arguments, says, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.strip().count("\n") == 0
    assert captured.err.startswith("pie-async: ")


def test_a_missing_model_ends_with_status_1_and_one_line(tmp_path, capsys):
    assert main(["doctor", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert "nowhere" in error
    assert error.strip().count("\n") == 0


def test_debug_shows_where_an_error_comes_from():
    with pytest.raises(ConfigError, match="missing"):
        main(["bench", "--debug", "--trace", "missing.csv"])


def test_the_environment_sets_flags_and_the_command_line_wins(monkeypatch, capsys):
    monkeypatch.setenv("PIE_ASYNC_DEVICE_KV", "8MiB")
    assert main(["doctor", "--json"]) == 0
    assert plan_of(capsys)["device_kv_bytes"] == 8 * 2**20
    assert main(["doctor", "--json", "--device-kv", "4MiB"]) == 0
    assert plan_of(capsys)["device_kv_bytes"] == 4 * 2**20


def test_a_bad_environment_value_is_refused_like_a_flag(monkeypatch, capsys):
    monkeypatch.setenv("PIE_ASYNC_HOST_POOL", "lots")
    assert main(["doctor"]) == 2
    assert "'lots'" in capsys.readouterr().err


def plan_of(capsys):
    return msgspec.json.decode(capsys.readouterr().out)["plan"]


def test_errors_name_the_flag_of_a_field_and_other_options_by_their_name():
    assert flag_of("max_running_sequences") == "--max-running"
    assert flag_of("port") == "--port"
    assert flag_of("model") is None
    assert flag_of(None) is None


def test_help_groups_flags_and_tells_each_once(capsys):
    assert main(["serve", "--help"]) == 0
    out = capsys.readouterr().out
    places = [out.index(f"\n{panel}:\n") for panel in ("Arguments", "Server", "Engine", "Options")]
    assert places == sorted(places)
    assert out.index("--allowed-host") < places[2] < out.index("--device-kv")
    assert all(out.count(f"\n  {flag} ") == 1 for flag in ("--port", "--device-kv", "-h,"))


@pytest.mark.parametrize("arguments", [["--help", "serve"], ["-h"], ["--version", "serve"]])
def test_what_is_asked_of_the_program_is_answered_by_it(arguments, capsys):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "pie-async [OPTIONS] COMMAND" in out or out == f"pie-async {__version__}\n"


def test_help_loads_nothing_that_takes_long():
    heavy = ("torch", "aiohttp", "transformers", "rich", "pydantic", "asyncio")
    script = (
        "import sys; from pie_async.__main__ import main; main(['serve', '--help']);"
        f"sys.exit(any(name in sys.modules for name in {heavy}))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "environment", "is_on"),
    [
        ([], None, True),
        (["--no-prefix-caching"], None, False),
        ([], "0", False),
        (["--prefix-caching"], "0", True),
    ],
)
def test_prefix_caching_is_on_unless_it_is_switched_off(arguments, environment, is_on, monkeypatch):
    if environment is not None:
        monkeypatch.setenv("PIE_ASYNC_PREFIX_CACHING", environment)
    found = []

    def command(model: MODEL, engine: EngineConfig) -> None:
        found.append(engine.prefix_caching)

    app = typer.Typer()
    app.command()(with_engine_flags(command))
    app(["builtin", *arguments], standalone_mode=False)
    assert found == [is_on]
