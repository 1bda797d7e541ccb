"""The engine's flags, one per field of `EngineConfig`, and the values that people write."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer
from typer.models import OptionInfo

from pie_async.cli.settings_file import read_settings
from pie_async.config import (
    EngineConfig,
    LoadFormat,
    check_gpu_memory,
    format_size,
    parse_pool,
    parse_size,
)
from pie_async.errors import ConfigError
from pie_async.settings import Setting, settings_of, variable_of

Command = TypeVar("Command", bound=Callable[..., Any])

_COUNT = re.compile(r"(-?\d{1,15}(?:\.\d{1,15})?)(|[km]i?)", re.IGNORECASE)
_SECONDS = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(|s|ms)")
_DEFAULTS = EngineConfig()
_COUNT_UNITS = {"": 1, "k": 1000, "m": 1000**2, "ki": 1024, "mi": 1024**2}


def size(text: str) -> int:
    """Bytes from "64MiB", "1.5GiB", "500MB" or a plain number."""
    return _refusing(lambda: parse_size(text, option="the value"))


def count(text: str) -> int:
    """A whole number, also as "32k", "1.5M" (thousands) or "32Ki" (1024s)."""
    match = _COUNT.fullmatch(text.strip())
    value = float(match[1]) * _COUNT_UNITS[match[2].lower()] if match else 0.5
    if not value.is_integer():
        raise typer.BadParameter(f"{text!r} is not a whole number; write for example 4096 or 32k")
    return int(value)


def rate(text: str) -> float:
    """Bytes per second from "12.5GB", "12.5GB/s" or a plain number."""
    return float(_refusing(lambda: parse_size(text.removesuffix("/s"), option="the rate")))


def seconds(text: str) -> float:
    """Seconds from "50ms", "0.05s" or a plain number."""
    match = _SECONDS.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a time; write for example 50ms or 0.05")
    return float(match[1]) * (1e-3 if match[2] == "ms" else 1.0)


def gpu_memory(text: str) -> str:
    """A size or a share of the card, as written."""
    _refusing(lambda: check_gpu_memory(text))
    return text


def pool(text: str) -> str:
    """The pool's place, as written."""
    _refusing(lambda: parse_pool(text))
    return text


def load_format(text: str) -> str:
    """Where weights come from."""
    if text == "dummy":
        raise typer.BadParameter("'dummy', as vLLM calls it, is 'random' here")
    return one_of(*get_args(LoadFormat))(text)


def one_of(*allowed: str) -> Callable[[str], str]:
    """A parser for a choice of words."""

    def parse(text: str) -> str:
        if text not in allowed:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(allowed)}")
        return text

    return parse


_Meant = TypeVar("_Meant")


def _refusing(parse: Callable[[], _Meant]) -> _Meant:
    try:
        return parse()
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


SETTINGS = settings_of(EngineConfig)
"""All fields of `EngineConfig` but `model`, which is every command's argument."""


def _parser(told: Setting) -> Callable[[str], Any] | None:
    if told.flag == "--load-format":
        return load_format
    if told.kind == "words":
        return one_of(*told.words)
    parsers: dict[str, Callable[[str], Any]] = {
        "size": size,
        "count": count,
        "seconds": seconds,
        "rate": rate,
        "share": gpu_memory,
        "pool": pool,
        "text": str,
    }
    return parsers.get(told.kind)


def default_of(field: str) -> str:
    """What a field is if nobody sets it, as people would write it."""
    told = SETTINGS[field]
    if told.default:
        return told.default
    value = getattr(_DEFAULTS, field)
    if told.kind == "size":
        return format_size(value)
    if told.kind == "seconds":
        return f"{value:g}s"
    return ("off", "on")[value] if told.kind == "switch" else str(value)


def flag_of(field: str | None) -> str | None:
    """The flag that sets a field of `EngineConfig`; other options are flags of their own name."""
    if field is None or field == "model":
        return None
    return SETTINGS[field].flag if field in SETTINGS else "--" + field.replace("_", "-")


MODEL = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        envvar=variable_of("model"),
        show_envvar=False,
        help="A Hugging Face directory, a hub id, or 'builtin'.",
    ),
]


def with_engine_flags(command: Command) -> Command:
    """Give a command every engine flag; it gets them as one argument, `engine`.

    The command has parameters `model: MODEL` and `engine: EngineConfig`; its own flags keep
    their place in front of the engine's. All of them may come from the environment and from the
    file that --config names as well.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "engine"]
    for parameter in own:
        _let_environment_set(parameter)
    added = [_parameter(name, told) for name, told in SETTINGS.items()]

    @functools.wraps(command)
    def wrapper(**values: Any) -> Any:
        values.pop("config")
        fields = {name: values.pop(name) for name in SETTINGS}
        given = {name: value for name, value in fields.items() if value is not None}
        config = EngineConfig(model=values["model"], **given)
        return command(engine=config, **values)

    parameters = [*own, _CONFIG, *added]
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper  # type: ignore[return-value]


def _parameter(field: str, told: Setting) -> inspect.Parameter:
    parser = _parser(told)
    default = default_of(field)
    # What is on unless it is switched off has a second name for that.
    is_on = told.kind == "switch" and default == "on"
    option = typer.Option(
        f"{told.flag}/--no-{told.key}" if is_on else told.flag,
        parser=parser,
        metavar=told.written or None,
        help=f"{told.help} Default: {default}.",
        show_default=False,
        envvar=told.variable,
        show_envvar=False,
        rich_help_panel=told.panel,
        autocompletion=_completing(told.words) if told.words else None,
    )
    kind = bool if parser is None else str
    return inspect.Parameter(
        field,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _completing(words: tuple[str, ...]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def _let_environment_set(parameter: inspect.Parameter) -> None:
    for info in getattr(parameter.annotation, "__metadata__", ()):
        if isinstance(info, OptionInfo) and info.envvar is None:
            info.envvar = variable_of(parameter.name.replace("_", "-"))
            info.show_envvar = False


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Called before other options are looked at: what the file says is their default."""
    if path is not None:
        defaults = read_settings(path, command=context.command)
        context.default_map = {**defaults, **(context.default_map or {})}
    return path


_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Settings in TOML; environment and flags win over them.",
            envvar=variable_of("config"),
            show_envvar=False,
            is_eager=True,
            callback=_read_config,
            rich_help_panel="Engine",
        ),
    ],
)
