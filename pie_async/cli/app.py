"""The commands, and how their failures are told."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Protocol, runtime_checkable

import typer

from pie_async import __version__
from pie_async.cli import bench, doctor, generate, serve
from pie_async.cli.options import flag_of
from pie_async.errors import ConfigError, InvalidRequest, PieError

PROGRAM = "pie-async"
FAILED, BAD_FLAGS, INTERRUPTED = 1, 2, 130

_EPILOG = (
    "Engine flags can be given as environment variables too: PIE_DEVICE_KV=64MiB is "
    "--device-kv 64MiB. A flag on the command line wins."
)


def build() -> typer.Typer:
    """The application with its commands."""
    app = typer.Typer(
        name=PROGRAM,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog=_EPILOG,
    )
    app.callback()(_root)
    app.command(epilog=_EPILOG)(serve.serve)
    app.command(epilog=_EPILOG)(generate.generate)
    app.command(epilog=_EPILOG)(bench.bench)
    app.command(epilog=_EPILOG)(doctor.doctor)
    return app


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
    is_debugging = "--debug" in arguments or os.environ.get("PIE_DEBUG", "0") not in ("", "0")
    try:
        status = build()(args=list(arguments), prog_name=PROGRAM, standalone_mode=False)
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
