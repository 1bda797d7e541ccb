"""`pie-async serve`: the OpenAI-compatible server."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pie_async.cli.options import MODEL, one_of, size, with_engine_flags
from pie_async.config import BUILTIN_MODEL, EngineConfig
from pie_async.errors import ConfigError
from pie_async.runtime.logs import FORMATS, log_as
from pie_async.settings import variable_of

if TYPE_CHECKING:
    from pie_async.runtime.faults import FaultPlan

_PANEL = "Server"


@with_engine_flags
def serve(
    *,
    model: MODEL = BUILTIN_MODEL,
    host: Annotated[
        str,
        typer.Option(rich_help_panel=_PANEL,
                     help="Address to listen on; 0.0.0.0 is the whole network."),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(min=0, max=65535,
                     rich_help_panel=_PANEL, help="Port; 0 picks a free one."),
    ] = 8000,
    uds: Annotated[
        Path | None,
        typer.Option(metavar="PATH", rich_help_panel=_PANEL,
                     help="Listen at this Unix socket instead, for this user alone."),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=_PANEL, help="What clients call the model."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE",
                     rich_help_panel=_PANEL, help="Accept only these keys, one per line."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", rich_help_panel=_PANEL,
                     help="A name that clients may call the server by, .example.com for all below, "
                          "* for any; may be repeated. Addresses always do; other names unless "
                          "there are no API keys."),
    ] = None,
    max_connections: Annotated[
        int,
        typer.Option(min=1, metavar="N", rich_help_panel=_PANEL,
                     help="Further connections are refused."),
    ] = 4096,
    max_body: Annotated[
        str,
        typer.Option(parser=size, metavar="SIZE", rich_help_panel=_PANEL,
                     help="Larger request bodies are refused."),
    ] = "4MiB",
    shutdown_timeout: Annotated[
        float,
        typer.Option(min=0.0, metavar="SECONDS", rich_help_panel=_PANEL,
                     help="How long requests may go on after a signal to stop."),
    ] = 30.0,
    metrics_compat: Annotated[
        str | None,
        typer.Option(parser=one_of("vllm"), metavar="vllm", rich_help_panel=_PANEL,
                     help="Have /metrics under vLLM's names too."),
    ] = None,
    otel: Annotated[
        bool,
        typer.Option("--otel", rich_help_panel=_PANEL,
                     help="Send a span for each request to OTEL_EXPORTER_OTLP_ENDPOINT (extra "
                          "otel)."),
    ] = False,
    log_format: Annotated[
        str,
        typer.Option(parser=one_of(*FORMATS), metavar="|".join(FORMATS), rich_help_panel=_PANEL,
                     help="How warnings and errors are written to standard error."),
    ] = "text",
    in_process: Annotated[
        bool,
        typer.Option("--in-process", rich_help_panel=_PANEL,
                     help="Run the engine in the server's own process; nothing restarts it."),
    ] = False,
    faults: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=_PANEL,
                     help="Have go wrong what this plan says (docs/reliability.md); for tests."),
    ] = None,
    allow_faults: Annotated[
        bool,
        typer.Option("--allow-faults", rich_help_panel=_PANEL,
                     help="Yes, --faults is meant: this server may lose requests."),
    ] = False,
    engine: EngineConfig,
) -> int:  # fmt: skip
    """Serve MODEL over OpenAI's API; without one, the small built-in model.

    Stop it with Ctrl-C: what is being answered is finished first.
    """
    del model  # it is in the engine's configuration
    import asyncio  # none of these for --help

    from pie_async.api.auth import ApiKeys
    from pie_async.cli.plan import memory_plan, memory_warning, plan_lines
    from pie_async.cli.running import apart, begun, messages, run_async, started
    from pie_async.runtime.heap import tidied

    os.environ[variable_of("log-format")] = log_format  # for the engine's process too
    log_as(log_format)
    keys = ApiKeys(_read_keys(api_key_file))  # in clear no longer than this takes
    tracer = None
    if otel:
        from pie_async.api.tracing import tracer_from_environment

        tracer = tracer_from_environment()
    plan_of_faults = _read_faults(faults, is_allowed=allow_faults)
    console = messages()
    plan = memory_plan(engine)
    for line in plan_lines(plan):
        console.print(line, markup=False, soft_wrap=True)
    if warning := memory_warning(plan):
        console.print(warning, style="yellow", markup=False, soft_wrap=True)

    async def main() -> int:
        run_engine = partial(started, exits_when_stuck=True) if in_process else apart
        async with begun(run_engine(engine, plan_of_faults)) as starting_engine, tidied():
            # Not before: aiohttp takes half a second, in which the engine's process can start.
            api = await asyncio.to_thread(import_module, "pie_async.api.server")
            async with api.Server(
                host,
                port,
                uds=uds,
                api_keys=keys,
                allowed_hosts=allowed_host or (),
                max_connections=max_connections,
            ) as server:
                running = await starting_engine
                await server.serve(
                    running,
                    served_model_name=served_model_name,
                    max_body_bytes=int(max_body),
                    vllm_metrics=metrics_compat == "vllm",
                    tracer=tracer,
                    shutdown_timeout_s=shutdown_timeout,
                    on_ready=_announcer(served_model_name or running.model.name),
                )
        return 0

    return run_async(main())


def _announcer(name: str) -> Callable[[str], None]:
    from pie_async.cli.running import messages

    def announce(url: str) -> None:
        # scripts wait for this line on standard output
        place = f"{url}/v1" if url.startswith("http") else url
        typer.echo(f"serving {name} at {place} (Ctrl-C stops)")
        if url.startswith("http"):
            messages().print(f"to watch it, open {url}/ or run: pie-async top {url}", style="dim")

    return announce


def _read_faults(path: Path | None, *, is_allowed: bool) -> FaultPlan | None:
    if path is None:
        return None
    if not is_allowed:
        raise ConfigError(
            f"{path} would make this server fail on purpose; add --allow-faults if that is meant",
            option="faults",
        )
    from pie_async.runtime.faults import FaultPlan

    return FaultPlan.read(path)


def _read_keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"cannot read {path}: {reason}", option="api_key_file") from error
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise ConfigError(f"{path} holds no key", option="api_key_file")
    return keys
