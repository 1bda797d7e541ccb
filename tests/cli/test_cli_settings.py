"""Flags, environment and file, in this order; the file's mistakes; what `config` shows."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import msgspec
import pytest

from pie_async.__main__ import main
from pie_async.cli.app import COMMANDS, build
from pie_async.cli.config_command import settings_table
from pie_async.cli.options import SETTINGS, default_of
from pie_async.config import EngineConfig, parse_size


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    for told in SETTINGS.values():
        monkeypatch.delenv(told.variable, raising=False)


def shown(capsys, *arguments: str) -> dict:
    assert main(["config", *arguments]) == 0
    return tomllib.loads(capsys.readouterr().out)


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "pie.toml"
    path.write_text('device-kv = "8MiB"\nhost_pool = 4096\nblock-tokens = 32\n')
    monkeypatch.setenv("PIE_ASYNC_CONFIG", str(path))
    assert shown(capsys) == {
        "model": "builtin", "device-kv": "8MiB", "host-pool": "4KiB", "block-tokens": 32,
    }  # fmt: skip
    monkeypatch.setenv("PIE_ASYNC_DEVICE_KV", "6MiB")
    assert shown(capsys)["device-kv"] == "6MiB"
    found = shown(capsys, "--device-kv", "4MiB")
    assert (found["device-kv"], found["block-tokens"]) == ("4MiB", 32)


def test_what_config_shows_says_the_same_when_it_is_read(tmp_path, capsys):
    flags = "--host-pool 1500MB --no-prefix-caching --itl-limit 30ms --debug --gpu-memory 80GiB"
    flags = [*flags.split(), "--link-rate", "12.5GB/s", "--sim-gpu", 'a"b', "mo del"]
    assert main(["config", *flags]) == 0
    told = capsys.readouterr().out
    path = tmp_path / "again.toml"
    path.write_text(told)
    assert main(["config", "--config", str(path)]) == 0
    assert capsys.readouterr().out == told
    found = tomllib.loads(told)
    assert found["model"] == "mo del" and found["sim-gpu"] == 'a"b'
    assert found["prefix-caching"] is False and found["debug"] is True


def test_a_table_holds_for_its_command_alone(tmp_path, capsys):
    path = tmp_path / "pie.toml"
    path.write_text("seed = 5\n[generate]\nmax-tokens = 3\n[serve]\nport = 1\n[config]\nseed = 6\n")
    assert shown(capsys, "--config", str(path))["seed"] == 6
    arguments = ["generate", "--config", str(path), "-p", "ROMEO:", "--device-kv", "2MiB"]
    assert main(arguments) == 0
    short = capsys.readouterr().out
    assert main([*arguments, "--max-tokens", "30"]) == 0
    assert len(capsys.readouterr().out) > len(short)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('device-kw = "1MiB"', "there is no setting 'device-kw'; is device-kv meant?"),
        ("port = 8000", "there is no setting 'port'"),  # the server's: in its table
        ("[serv]\nport = 1", "there is no setting 'serv'"),
        ("[config]\nport = 1", "there is no setting 'port'"),
        ('device-kv = "lots"', "'lots'"),
        ("device-kv = [1, {}]", "device-kv must be a text, a number, true or false"),
        ("config = 3", "config must be a table"),
        ("x = ", "is no TOML"),
        ("block-tokens = 0", "--block-tokens: block_tokens must be at least 1"),
    ],
)
def test_mistakes_in_the_file_are_one_line_with_status_2(tmp_path, capsys, text, says):
    path = tmp_path / "pie.toml"
    path.write_text(text)
    assert main(["config", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.strip().count("\n") == 0


def test_a_file_that_is_not_there_is_told(capsys):
    assert main(["config", "--config", "nowhere.toml"]) == 2
    assert "--config: cannot read nowhere.toml" in capsys.readouterr().err


def test_the_schema_is_of_all_fields_and_describes_them(capsys):
    assert main(["config", "--schema"]) == 0
    schema = msgspec.json.decode(capsys.readouterr().out)
    properties = schema["$defs"]["EngineConfig"]["properties"]
    assert set(properties) == {field.name for field in msgspec.structs.fields(EngineConfig)}
    for name, told in SETTINGS.items():
        assert properties[name]["description"] == told.help
    assert properties["device"]["enum"] == ["cpu", "cuda", "sim"]


def test_the_table_has_every_setting_and_defaults_are_what_they_say():
    table = settings_table()
    assert all(f"`{told.flag}`" in table for told in SETTINGS.values())
    usual = EngineConfig()
    for name, told in SETTINGS.items():
        if told.kind == "size" and not told.default:
            assert parse_size(default_of(name), option=name) == getattr(usual, name)


def test_every_command_is_listed_with_what_its_own_help_says():
    whole = {command.name or command.callback.__name__: command for command in
             build().registered_commands}  # fmt: skip
    assert whole.keys() == COMMANDS.keys()
    for name, command in whole.items():
        assert command.callback.__name__ == name
        assert command.callback.__doc__.split()[0] == COMMANDS[name].split()[0], name


def test_the_list_of_commands_imports_none_of_them():
    script = (
        "import sys; from pie_async.__main__ import main; main(['--help']);"
        "sys.exit(sum(name in sys.modules for name in ('rich', 'asyncio', 'numpy', 'pydantic',"
        "'pie_async.cli.serve', 'pie_async.config')))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("pie-async ", {"serve", "chat", "top"}),
        ("pie-async serve --device ", {"cpu", "cuda", "sim"}),
        ("pie-async bench --host", {"--host-pool"}),
    ],
)
def test_the_shell_completes_commands_flags_and_words(line, offered, monkeypatch):
    done = subprocess.run(
        [sys.executable, "-m", "pie_async"], capture_output=True, text=True,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), "_PIE_ASYNC_COMPLETE": "complete_bash",
             "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)},
    )  # fmt: skip
    assert offered <= set(done.stdout.split()), done.stderr


def test_a_kubernetes_service_of_this_name_is_no_port(monkeypatch, capsys):
    monkeypatch.setenv("PIE_ASYNC_PORT", "tcp://10.0.0.1:8000")
    assert main(["serve", "--api-key-file", "missing.txt"]) == 2
    assert "missing.txt" in capsys.readouterr().err
    monkeypatch.setenv("PIE_ASYNC_PORT", "eight")
    assert main(["serve", "--api-key-file", "missing.txt"]) == 2
    assert "--port" in capsys.readouterr().err
