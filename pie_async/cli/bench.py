"""`pie-async bench`: throughput and latency of an engine or a server."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from pie_async import __version__
from pie_async.cli.options import MODEL, count, one_of, with_engine_flags
from pie_async.cli.running import messages, run_async, run_in_virtual_time, started
from pie_async.config import BUILTIN_MODEL, EngineConfig
from pie_async.errors import ConfigError
from pie_async.measurements import LatencyLimits, RequestTimes, summarize
from pie_async.metrics import LinkUse
from pie_async.workload import (
    LENGTH_MODELS,
    WorkItem,
    arrive_at_rate,
    clip,
    fixed_lengths,
    read_trace,
    sample_lengths,
)

if TYPE_CHECKING:
    from pie_async.cli.load import LoadRun, PoolSummary, Target
    from pie_async.cli.report import Report

KINDS = ("latency", "throughput", "serve")
"""Of measurements: requests one after the other; all at once; as they arrive at a server."""
LATENCY_REQUESTS, REQUESTS = 10, 64
SERVER_URL = "http://127.0.0.1:8000"
WORKLOADS = (*LENGTH_MODELS, "fixed", "trace")
UNKNOWN_CONTEXT_TOKENS = 4096
"""A server does not tell its context length."""
UNKNOWN_VOCABULARY = 4096
"""Nor its vocabulary; every model in use has more tokens than this."""
FIRST_TOKEN = 300
"""Prompts avoid the special and byte tokens, which come first in most vocabularies."""

_LOAD, _GOAL = "Workload", "Result"


class LoadPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the flags ask for."""

    workload: str
    num_requests: int | None
    requests_per_s: float | None
    concurrency: int | None
    prompt_tokens: int
    output_tokens: int
    trace: Path | None
    temperature: float
    limits: LatencyLimits | None
    seed: int

    def items(self, context_tokens: int) -> list[WorkItem]:
        """The requests, with their arrival times.

        Raises:
            ConfigError: a trace that cannot be read, lengths that cannot fit.
        """
        items = self._sized(context_tokens)
        if self.requests_per_s is not None:
            return arrive_at_rate(items, requests_per_s=self.requests_per_s, seed=self.seed)
        return items

    def _sized(self, context_tokens: int) -> list[WorkItem]:
        if self.trace is not None:
            traced = read_trace(self.trace, limit=self.num_requests)
            return [clip(item, context_tokens) for item in traced]
        num_requests = self.num_requests or REQUESTS
        if self.workload == "fixed":
            return fixed_lengths(
                prompt_tokens=self.prompt_tokens,
                output_tokens=self.output_tokens,
                num_requests=num_requests,
                context_tokens=context_tokens,
            )
        return sample_lengths(
            LENGTH_MODELS[self.workload],
            num_requests=num_requests,
            context_tokens=context_tokens,
            seed=self.seed,
        )

    def described(self) -> dict[str, Any]:
        return {
            "name": str(self.trace) if self.trace is not None else self.workload,
            "requests_per_s": self.requests_per_s,
            "concurrency": self.concurrency,
            "temperature": self.temperature,
            "seed": self.seed,
        }


@with_engine_flags
def bench(
    *,
    kind: Annotated[
        str,
        typer.Argument(parser=one_of(*KINDS), metavar="|".join(KINDS),
                       help="One request after the other; all at once (also if this word is left "
                            "out); or as they arrive at a server."),
    ] = "throughput",
    model: MODEL = BUILTIN_MODEL,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", rich_help_panel=_GOAL,
                     help="Measure nothing; compare two results that --json wrote."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", rich_help_panel=_LOAD,
                     help="Measure this OpenAI-compatible server, not an engine in here."),
    ] = None,
    url_model: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=_LOAD,
                     help="The server's model; by default the first it lists."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", envvar="PIE_ASYNC_API_KEY", show_envvar=False,
                     rich_help_panel=_LOAD, help="The server's key."),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(parser=one_of(*WORKLOADS), metavar="|".join(WORKLOADS), rich_help_panel=_LOAD,
                     show_default="sharegpt-like; for latency fixed",
                     help="Where request lengths come from."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=_LOAD,
                     help="Replay a trace: Azure's .csv or Mooncake's .jsonl."),
    ] = None,
    num_requests: Annotated[
        str | None,
        typer.Option("--num-requests", "-n", parser=count, metavar="N", rich_help_panel=_LOAD,
                     show_default="64, for latency 10, or the whole trace",
                     help="How many requests."),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=1e-6, metavar="PER_S", rich_help_panel=_LOAD,
                     show_default="all at once, or the trace's times",
                     help="Requests per second, as a Poisson process."),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", rich_help_panel=_LOAD,
                     show_default="no limit; for latency 1", help="Most requests open at once."),
    ] = None,
    prompt_tokens: Annotated[
        str,
        typer.Option(parser=count, metavar="N", rich_help_panel=_LOAD,
                     help="Prompt length of a fixed workload."),
    ] = "128",
    output_tokens: Annotated[
        str,
        typer.Option(parser=count, metavar="N", rich_help_panel=_LOAD,
                     help="Output length of a fixed workload."),
    ] = "128",
    temperature: Annotated[
        float, typer.Option(min=0.0, max=2.0, rich_help_panel=_LOAD, help="0 is greedy.")
    ] = 0.0,
    ttft_limit: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="SECONDS", rich_help_panel=_GOAL, show_default="none",
                     help="Longest TTFT that counts towards goodput."),
    ] = None,
    tpot_limit: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="SECONDS", rich_help_panel=_GOAL, show_default="none",
                     help="Longest TPOT that counts towards goodput."),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=_GOAL, help="Write the result here too."),
    ] = None,
    engine: EngineConfig,
) -> int:  # fmt: skip
    """Measure throughput and latency of MODEL in this process, or of a server with --url.

    With --device sim the clock is virtual: minutes of load take seconds.
    """
    from pie_async.cli.report import check_writable

    del model
    if compare is not None:
        return _compare(*compare)
    if kind == "serve":
        url = url or SERVER_URL
    is_latency = kind == "latency"
    if workload is None:
        workload = "fixed" if is_latency else "sharegpt-like"
    if concurrency is None and is_latency:
        concurrency = 1
    if num_requests is None and trace is None:
        num_requests = str(LATENCY_REQUESTS if is_latency else REQUESTS)
    if json is not None:
        check_writable(json)
    if workload == "trace" and trace is None:
        raise ConfigError("--workload trace needs --trace FILE", option="trace")
    has_limits = ttft_limit is not None or tpot_limit is not None
    job = LoadPlan(
        workload="trace" if trace is not None else workload,
        num_requests=None if num_requests is None else _positive(num_requests, "num_requests"),
        requests_per_s=rate,
        concurrency=concurrency,
        prompt_tokens=_positive(prompt_tokens, "prompt_tokens"),
        output_tokens=_positive(output_tokens, "output_tokens"),
        trace=trace,
        temperature=temperature,
        limits=LatencyLimits(ttft_s=ttft_limit, tpot_s=tpot_limit) if has_limits else None,
        seed=engine.seed,
    )
    if url is not None:
        return run_async(_finish(_bench_server(job, url, url_model, api_key), json))
    run = run_in_virtual_time if engine.device == "sim" else run_async
    return run(_finish(_bench_engine(job, engine), json))


def _compare(before: Path, after: Path) -> int:
    from rich.console import Console

    from pie_async.cli.comparison import differences, table

    console = Console(highlight=False)
    for line in differences(before, after):
        messages().print(line, style="yellow", markup=False, soft_wrap=True)
    console.print(table(before, after))
    return 0


def with_kind(arguments: Sequence[str]) -> list[str]:
    """The command line with the word that may be left out: what is no kind is a model."""
    words = list(arguments)
    at = words.index("bench") + 1 if "bench" in words else 0
    if at and not {*KINDS, "-h", "--help"} & set(words[at : at + 1]):
        words.insert(at, "throughput")
    return words


def _positive(value: str | int, option: str) -> int:
    if int(value) < 1:
        raise ConfigError(f"must be at least 1, not {value}", option=option)
    return int(value)


async def _finish(measured: Any, path: Path | None) -> int:
    from rich.console import Console

    from pie_async.cli.report import tables, write_json

    report: Report = await measured
    console = Console(highlight=False)
    for table in tables(report):
        console.print(table)
        console.print()
    for error, times in report.summary.errors.items():
        messages().print(f"{times} x {error}", style="red", markup=False, soft_wrap=True)
    if path is not None:
        write_json(report, path)
    return 1 if report.summary.failed else 0


async def _bench_engine(job: LoadPlan, config: EngineConfig) -> Report:
    from pie_async.cli.load import EngineTarget, PoolWatch, clock_of

    async with started(config) as engine:
        items = job.items(engine.model.max_model_len)
        clock = clock_of(config)
        watch = PoolWatch(engine, clock)
        first = engine.stats()
        async with watch.watching():
            run = await _put(
                EngineTarget(engine, temperature=job.temperature),
                job,
                items,
                vocab_size=engine.model.vocab_size,
                clock=clock,
            )
        return _report(
            job,
            run,
            target="engine",
            model=engine.model.name,
            engine=config,
            pool=watch.summary(started_s=run.started_s),
            link=LinkUse.between(first, engine.stats()),
        )


async def _bench_server(job: LoadPlan, url: str, model: str | None, api_key: str | None) -> Report:
    from pie_async.api.client import CompletionsClient

    items = job.items(UNKNOWN_CONTEXT_TOKENS)
    async with CompletionsClient(
        url, model=model, api_key=api_key, temperature=job.temperature
    ) as client:
        run = await _put(client, job, items, vocab_size=UNKNOWN_VOCABULARY)
        return _report(job, run, target=url, model=client.model, engine=None, pool=None)


async def _put(
    target: Target,
    job: LoadPlan,
    items: list[WorkItem],
    *,
    vocab_size: int,
    clock: Callable[[], float] = time.perf_counter,
) -> LoadRun:
    from pie_async.cli.load import Prompts, put_load

    prompts = Prompts(
        vocab_size=vocab_size, first_token=min(FIRST_TOKEN, vocab_size // 2), seed=job.seed
    )
    bar, on_finished = _progress(len(items))
    with bar:
        return await put_load(
            target,
            items,
            prompts,
            concurrency=job.concurrency,
            clock=clock,
            on_finished=on_finished,
        )


def _progress(
    num_requests: int,
) -> tuple[AbstractContextManager[Any], Callable[[RequestTimes], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]:,} output tokens"),
        console=(console := messages()),
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("requests", total=num_requests, tokens=0)
    tokens = 0

    def on_finished(request: RequestTimes) -> None:
        nonlocal tokens
        tokens += request.output_tokens
        bar.update(task, advance=1, tokens=tokens)

    return bar, on_finished


def _report(
    job: LoadPlan,
    run: LoadRun,
    *,
    target: str,
    model: str,
    engine: EngineConfig | None,
    pool: PoolSummary | None,
    link: LinkUse | None = None,
) -> Report:
    from pie_async.cli.report import Report
    from pie_async.hardware import read_hardware

    hardware = read_hardware()
    is_simulated = engine is not None and engine.device == "sim"
    return Report(
        version=__version__,
        date=datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
        target=target,
        model=model,
        clock="virtual" if is_simulated else "real",
        machine=f"{hardware.processor}, {hardware.cores} of {hardware.cores_in_all} cores",
        workload=job.described(),
        engine=None if engine is None else msgspec.structs.asdict(engine),
        summary=summarize(run.requests, duration_s=run.duration_s, limits=job.limits),
        pool=pool,
        link=link,
    )
