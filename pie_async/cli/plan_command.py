"""`pie-async plan`: whether pooling would pay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from pie_async.cli.options import count, size
from pie_async.cli.running import messages, run_in_virtual_time
from pie_async.config import format_size
from pie_async.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from pie_async.cli.prediction import Load, Outcome, Place, Prediction
    from pie_async.workload import WorkItem

GPU_SHARE = 0.9
"""Of a card, as --gpu-memory takes by default."""
CONTEXT_TOKENS = 8192


def plan(
    *,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="h200, h100, gh200, b200, a100, l40s or rtx4090."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Several of them beside each other."),
    ] = None,
    machine: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="This machine, as `pie-async doctor --machine FILE` "
                     "measured it."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(metavar="DIR|NAME", help="A directory with a config.json, or llama-3.1-8b, "
                     "llama-3.1-70b, qwen2.5-32b, opt-13b."),
    ] = "llama-3.1-8b",
    workload: Annotated[
        str,
        typer.Option(metavar="NAME|FILE", help="sharegpt-like, alpaca-like, or a trace: Azure's "
                     ".csv or Mooncake's .jsonl."),
    ] = "sharegpt-like",
    gpu_memory: Annotated[
        str | None,
        typer.Option(parser=size, metavar="SIZE", show_default="90% of the card",
                     help="What everything may take on the card."),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default="the card's usual one",
                     help="pcie3, pcie4, pcie5, nvlink or nvlink-c2c."),
    ] = None,
    host_pool: Annotated[
        str,
        typer.Option(parser=size, metavar="SIZE", help="Most that the pool may be."),
    ] = "64GiB",
    num_requests: Annotated[
        str,
        typer.Option("--num-requests", "-n", parser=count, metavar="N",
                     help="How many requests are simulated."),
    ] = "300",
    rate: Annotated[
        float | None,
        typer.Option(min=1e-6, metavar="PER_S",
                     show_default="0.9 of what saturates it without a pool",
                     help="Requests per second for the latencies."),
    ] = None,
    max_running: Annotated[
        str,
        typer.Option(parser=count, metavar="N", help="Most sequences in one iteration."),
    ] = "256",
    seed: Annotated[str, typer.Option(parser=count, metavar="N", help="Of the load.")] = "0",
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw it too (.svg, .png, .pdf); needs the extra plot."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the result here too.")
    ] = None,
) -> int:  # fmt: skip
    """Say whether pooling would pay: throughput, latency, the best pool and what limits it, from
    the simulator and by arithmetic. Takes about ten seconds for each GPU."""
    from rich.console import Console

    from pie_async.assembly.on_sim import sim_shape
    from pie_async.cli.prediction import HOW_FAR_OFF, predict

    places = _places(gpu, compare, machine, link, gpu_memory, int(host_pool))
    name, shape = sim_shape(model)
    weight_bytes = shape.weight_bytes + shape.head_parameters * shape.weight_item_bytes
    load = _load(workload, int(num_requests), rate, int(max_running), int(seed))
    if plot is not None:
        _require_matplotlib()
    told = messages()
    predictions = []
    for place in places:
        with told.status(f"simulating {name} on {place.name}"):
            predictions.append(
                run_in_virtual_time(predict(model, shape, place, load, weight_bytes=weight_bytes))
            )
    console = Console(highlight=False)
    console.print(f"{name}, {format_size(weight_bytes)} of weights; {len(load.items)} requests, "
                  f"{workload}", soft_wrap=True)  # fmt: skip
    for table in _tables(predictions):
        console.print(table)
        console.print()
    for each in predictions:
        console.print(_verdict(each), soft_wrap=True, markup=False)
    console.print(HOW_FAR_OFF, style="dim")
    _save(predictions, json, plot)
    return 0


def _places(
    gpu: str | None,
    compare: str | None,
    machine: Path | None,
    link: str | None,
    gpu_memory: str | None,
    host_pool_bytes: int,
) -> list[Place]:
    from pie_async.cli.prediction import Place
    from pie_async.device.cost_model import USUAL_LINKS, gpu_named, link_named

    names = [*([gpu] if gpu else []), *(compare.split(",") if compare else [])]
    files = [str(machine)] if machine is not None else []
    if machine is not None and machine.suffix != ".json":
        raise ConfigError(f"{machine} is no .json file", option="machine")
    if not names and not files:
        names = ["h200"]
    places = []
    for name in dict.fromkeys([*names, *files]):
        is_file = name in files
        card = gpu_named(name, option="machine" if is_file else "gpu")
        joined = link or (name if is_file else USUAL_LINKS[card.name])
        link_named(joined, option="link")
        places.append(
            Place(
                name=card.name,
                gpu=name,
                link=joined,
                gpu_memory_bytes=int(gpu_memory or GPU_SHARE * card.memory_bytes),
                host_pool_bytes=host_pool_bytes,
            )
        )
    return places


def _load(workload: str, number: int, rate: float | None, max_running: int, seed: int) -> Load:
    from pie_async.cli.prediction import Load
    from pie_async.workload import LENGTH_MODELS, arrive_at_rate, clip, read_trace, sample_lengths

    if number < 8:
        raise ConfigError(f"must be at least 8, not {number}", option="num_requests")
    items: list[WorkItem]
    if workload in LENGTH_MODELS:
        items = sample_lengths(
            LENGTH_MODELS[workload], num_requests=number, context_tokens=CONTEXT_TOKENS, seed=seed
        )
    elif Path(workload).suffix:
        items = [clip(each, CONTEXT_TOKENS) for each in read_trace(Path(workload), limit=number)]
    else:
        raise ConfigError(
            f"{workload!r} is none of {', '.join(LENGTH_MODELS)}, nor a trace's file",
            option="workload",
        )

    def arrive(load: Sequence[WorkItem], per_s: float) -> list[WorkItem]:
        return arrive_at_rate(load, requests_per_s=per_s, seed=seed)

    return Load(
        items=tuple(items),
        requests_per_s=rate,
        max_running=max_running,
        seed=seed,
        arrive=arrive,
    )


# --- telling --------------------------------------------------------------------------------


def _tables(predictions: Sequence[Prediction]) -> Iterator[Table]:
    """Throughput, then latency; a row without the pool and one with it for each GPU."""
    from rich.table import Table

    throughput = Table(box=None, header_style="bold", pad_edge=False)
    latency = Table(box=None, header_style="bold", pad_edge=False)
    for table in (throughput, latency):
        for name in ("GPU", "link", "pool"):
            table.add_column(name, no_wrap=True)
    for name in ("KV on it", "tokens/s", "gain", "bound", "stall", "recomputed"):
        throughput.add_column(name, justify="right", no_wrap=True)
    for name in ("TTFT p50", "p99, s", "TPOT p50", "p99, ms"):
        latency.add_column(name, justify="right", no_wrap=True)
    for each in predictions:
        pool = format_size(each.best_pool_bytes) if each.best_pool_bytes else "no use"
        names = ((each.place.name, _link(each), "off"), ("", "", pool))
        gains = (("", ""), (f"{each.gain:.2f}x", f"{each.gain_bound:.2f}x"))
        for head, gain, outcome in zip(names, gains, (each.off, each.pooled), strict=True):
            throughput.add_row(*head, *_cells(outcome), *gain, *_trouble(outcome))
            latency.add_row(*head, *_latency(outcome))
    yield throughput
    yield latency


def _link(each: Prediction) -> str:
    return "as measured" if each.place.link.endswith(".json") else each.place.link


def _cells(outcome: Outcome) -> tuple[str, str]:
    return format_size(outcome.kv_bytes), f"{outcome.steady_tokens_per_s:,.0f}"


def _trouble(outcome: Outcome) -> tuple[str, str]:
    return f"{outcome.stall_share:.1%}", str(outcome.recomputed)


def _latency(outcome: Outcome) -> tuple[str, str, str, str]:
    latency = outcome.latency
    assert latency is not None
    ttft, tpot = latency.ttft_s, latency.tpot_s
    return f"{ttft.p50:.2f}", f"{ttft.p99:.2f}", f"{1e3 * tpot.p50:.1f}", f"{1e3 * tpot.p99:.1f}"


def _verdict(each: Prediction) -> str:
    """One sentence for each GPU."""
    latencies = f"latencies at {each.latency_requests_per_s:.2g} requests/s"
    if not each.best_pool_bytes:
        return f"{each.place.name}: pooling would not pay; {latencies}. Limit: {each.limit}."
    return (
        f"{each.place.name}: {each.gain:.2f} times the throughput with a pool of "
        f"{format_size(each.best_pool_bytes)} (--host-pool), of which up to "
        f"{format_size(each.pooled.streamed_peak_bytes)} are streamed in an iteration; "
        f"{latencies}. Limit: {each.limit}."
    )


def _save(predictions: Sequence[Prediction], json: Path | None, plot: Path | None) -> None:
    for path, option in ((json, "json"), (plot, "plot")):
        if path is None:
            continue
        try:
            if option == "json":
                body = msgspec.json.encode(predictions)
                path.write_bytes(msgspec.json.format(body, indent=2) + b"\n")
            else:
                _draw(predictions, path)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}", option=option) from error
        except ValueError as error:  # matplotlib's, of formats
            raise ConfigError(f"cannot draw {path}: {error}", option=option) from error


def _require_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ConfigError("drawing needs matplotlib: pip install 'pie_async[plot]'", option="plot")


def _draw(predictions: Sequence[Prediction], path: Path) -> None:
    """Throughput with and without the pool, the bound above it, and the latency's tail."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 + 1.6 * len(predictions), 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    at = range(len(predictions))
    names = [each.place.name for each in predictions]
    off = [each.off.steady_tokens_per_s for each in predictions]
    left.bar([x - 0.2 for x in at], off, 0.38, label="no pool", color="#a9c0ee")
    left.bar([x + 0.2 for x in at], [each.pooled.steady_tokens_per_s for each in predictions], 0.38,
             label="pool", color="#12917a")  # fmt: skip
    bounds = [each.gain_bound * each.off.steady_tokens_per_s for each in predictions]
    left.plot([x + 0.2 for x in at], bounds, "_", color="#22252b", markersize=18, label="bound")
    left.set_ylabel("output tokens/s, simulated")
    for shift, name, colour in ((-0.2, "off", "#a9c0ee"), (0.2, "pooled", "#12917a")):
        tails = [getattr(each, name).latency.ttft_s.p99 for each in predictions]
        right.bar([x + shift for x in at], tails, 0.38, color=colour)
    right.set_ylabel("TTFT p99, s")
    for axes in (left, right):
        axes.set_xticks(list(at), names)
        axes.grid(axis="y", alpha=0.3)
    left.legend()
    figure.savefig(path)
