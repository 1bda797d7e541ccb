"""Settings from a TOML file: keys are flags without their dashes in front.

Keys at the top are of the engine and hold for every command; a table named as a command holds for
that command alone, and its other flags are only there:

    device-kv = "2GiB"
    host-pool = "64GiB"

    [serve]
    port = 8080
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

from pie_async.config import EngineConfig
from pie_async.errors import ConfigError
from pie_async.settings import settings_of

COMMANDS = ("serve", "generate", "chat", "bench", "doctor", "config")
"""Those that read a file."""


def read_settings(path: Path, *, command: Any) -> dict[str, Any]:
    """The file's values for a command, by its parameters' names.

    Args:
        command: click's, whose parameters may be set.

    Raises:
        ConfigError: the file cannot be read, or has a key that nothing has.
    """
    written = _read(path)
    parameters = {
        option.lstrip("-"): parameter.name
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    engine = {told.key for told in settings_of(EngineConfig).values()} | {"model"}
    own = written.pop(command.name, {})
    values = {}
    for key, value in written.items():
        if key in COMMANDS and isinstance(value, dict):
            continue
        name = parameters[_known(key, engine, path)]
        values[name] = _as_written(key, value, path)
    if not isinstance(own, dict):
        raise _bad(f"{path}: {command.name} must be a table")
    for key, value in own.items():
        known = parameters.keys() - {"config", "help", "h"}
        name = parameters[_known(key, known, path)]
        values[name] = _as_written(key, value, path)
    return values


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise _bad(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _bad(f"{path} is no TOML: {error}") from error


def _known(key: str, known: set[str], path: Path) -> str:
    name = key.replace("_", "-")
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; is {close[0]} meant?" if close else ""
    raise _bad(f"{path}: there is no setting {key!r}{hint}")


def _as_written(key: str, value: Any, path: Path) -> Any:
    """As on the command line, where everything is text."""
    if isinstance(value, bool):
        return value
    if isinstance(value, list) and all(isinstance(each, str | int | float) for each in value):
        return [str(each) for each in value]
    if not isinstance(value, str | int | float):
        raise _bad(f"{path}: {key} must be a text, a number, true or false")
    return str(value)


def _bad(message: str) -> ConfigError:
    return ConfigError(message, option="config")
