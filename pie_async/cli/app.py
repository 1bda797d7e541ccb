"""The commands, and how their failures are told."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Protocol, runtime_checkable

import typer

from pie_async import __version__
from pie_async.cli.help import GroupedHelp
from pie_async.errors import ConfigError, InvalidRequest, PieError
from pie_async.settings import variable_of

PROGRAM = "pie-async"
FAILED, BAD_FLAGS, INTERRUPTED = 1, 2, 130

_EPILOG = (
    "Every flag can be given as an environment variable too (PIE_ASYNC_DEVICE_KV=64MiB is "
    "--device-kv 64MiB) and in a TOML file that --config names. Flags win over the environment, "
    "and that over the file."
)

COMMANDS = {
    "serve": "Serve MODEL over OpenAI's API; without one, the small built-in model.",
    "chat": "Talk with MODEL, or with a server's model (--url).",
    "generate": "Continue a prompt, or answer a message, with MODEL.",
    "bench": "Measure throughput and latency of MODEL, or of a server (--url).",
    "plan": "Say whether pooling would pay: throughput, latency and limits on named GPUs.",
    "doctor": "Look at this machine, measure it, and say what would be pooled for MODEL.",
    "top": "Watch a server: memory, links, governor, requests.",
    "trace": "Save a server's last iterations for Perfetto.",
    "config": "Show what flags, environment and file come to.",
}
"""The commands, each in the module of its name, and what the list of them says: only the module of
the one that is meant is imported."""


def build(arguments: Sequence[str] | None = None) -> typer.Typer:
    """The application with its commands.

    Args:
        arguments: what it is going to be called with; the commands that are not meant are there in
            name only. None: all are whole.
    """
    meant = None if arguments is None else _meant(arguments)
    # What typer asks of its own options has it import pydantic, which takes as long as the rest.
    asks_program = arguments is None or list(arguments[:1]) != [meant]
    app = typer.Typer(
        name=PROGRAM,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        add_completion=asks_program,
        add_help_option=asks_program,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog=_EPILOG,
    )
    app.callback()(_root)
    for name, summary in COMMANDS.items():
        if arguments is None or name == meant:
            command = getattr(import_module(f"pie_async.cli.{_module(name)}"), name)
        else:
            command = _named_only
        app.command(name, cls=GroupedHelp, epilog=_EPILOG, short_help=summary)(command)
    return app


def _module(name: str) -> str:
    # `plan` is what an engine's memory plan is made by, and the word is the user's for both.
    return {"plan": "plan_command", "config": "config_command"}.get(name, name)


def _meant(arguments: Sequence[str]) -> str | None:
    """The command among the arguments, or on the line that a shell wants completed."""
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    words = line.split()[1:] if line else arguments
    return next((word for word in words if word in COMMANDS), None)


def _named_only() -> None:
    """Stands for a command that is not called."""


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Tell the version."),
    ] = False,
) -> None:
    """LLM inference that pools host memory with the device's for the KV cache."""


def run(arguments: Sequence[str]) -> int:
    """Run one command; the exit status. Errors become one line unless --debug is given."""
    is_debugging = "--debug" in arguments or os.environ.get(variable_of("debug"), "0") not in (
        "",
        "0",
    )
    _forget_service_links()
    if _meant(arguments) == "bench":
        from pie_async.cli.bench import with_kind

        arguments = with_kind(arguments)
    try:
        status = build(arguments)(args=list(arguments), prog_name=PROGRAM, standalone_mode=False)
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone; what Python would flush at exit has nowhere to go either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if is_debugging and not isinstance(error, _UsageError):
            raise
        return _tell(error)
    return status if isinstance(status, int) else 0


def _forget_service_links() -> None:
    """Kubernetes tells a pod of a service named pie-async by this variable, and means no port."""
    if os.environ.get(variable_of("port"), "").startswith("tcp://"):
        del os.environ[variable_of("port")]


@runtime_checkable
class _UsageError(Protocol):
    """click's errors; typer brings its own click or uses the installed one, by version."""

    exit_code: int

    def format_message(self) -> str: ...


def _tell(error: Exception) -> int:
    if isinstance(error, _UsageError):
        # without arguments at all the help is the message, and it was printed already
        if message := error.format_message().strip():
            path = getattr(getattr(error, "ctx", None), "command_path", PROGRAM)
            _print_error(f"{message.splitlines()[0]} (see {path} --help)")
        return error.exit_code
    if isinstance(error, ConfigError):
        from pie_async.cli.options import flag_of

        flag = flag_of(error.option)
        message = str(error)
        _print_error(f"{flag}: {message}" if flag and flag not in message else message)
        return BAD_FLAGS
    if isinstance(error, InvalidRequest):
        _print_error(str(error))
        return BAD_FLAGS
    if isinstance(error, PieError):
        _print_error(str(error))
        return FAILED
    reason = " ".join(str(error).split())
    _print_error(f"{type(error).__name__}: {reason} (--debug shows where)")
    return FAILED


def _print_error(message: str) -> None:
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
