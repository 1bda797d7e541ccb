"""The engine's flags, one per field of `EngineConfig`, and the values that people write."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_args

import msgspec
import typer

from pie_async.config import (
    DEVICE_KV_BYTES,
    Attention,
    DeviceName,
    DtypeName,
    EngineConfig,
    Kernels,
    LoadFormat,
    Quantization,
    check_gpu_memory,
    format_size,
    parse_pool,
    parse_size,
)
from pie_async.errors import ConfigError

Command = TypeVar("Command", bound=Callable[..., Any])

_COUNT = re.compile(r"(-?\d{1,15}(?:\.\d{1,15})?)(|[km]i?)", re.IGNORECASE)
_SECONDS = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(|s|ms)")
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


class _Flag(msgspec.Struct, frozen=True):
    """How a field of `EngineConfig` is given on the command line."""

    name: str
    parser: Callable[[str], Any] | None
    metavar: str | None
    help: str
    default: str
    panel: str = "Engine"

    @property
    def spellings(self) -> str:
        """What is on unless it is switched off has a second name for that."""
        off = "/--no-" + self.name.removeprefix("--")
        return self.name + off if self.parser is None and self.default == "on" else self.name

    @property
    def variable(self) -> str:
        return "PIE_" + self.name.removeprefix("--").replace("-", "_").upper()


_MEMORY, _SIM = "Memory", "Simulated device"
_DEFAULTS = EngineConfig()

# `model` is every command's argument; all other fields of EngineConfig are here.
FLAGS: dict[str, _Flag] = {
    "gpu_memory": _Flag(
        "--gpu-memory", gpu_memory, "SIZE|SHARE",
        "Cap of everything taken on the card: 80GiB, 0.9 or 90% (cuda).",
        str(_DEFAULTS.gpu_memory), _MEMORY,
    ),
    "device_kv_bytes": _Flag(
        "--device-kv", size, "SIZE", "Device arena: KV that is resident.",
        f"{format_size(DEVICE_KV_BYTES)}; on cuda what --gpu-memory leaves", _MEMORY,
    ),
    "host_pool_bytes": _Flag(
        "--host-pool", size, "SIZE",
        "Ceiling of the pool, wherever it is; 0 switches pooling off.",
        format_size(_DEFAULTS.host_pool_bytes), _MEMORY,
    ),
    "pool": _Flag(
        "--pool", pool, "host|peer:N",
        "Memory that holds the pool: this machine's, or GPU N's (cuda).",
        _DEFAULTS.pool, _MEMORY,
    ),
    "pool_idle_s": _Flag(
        "--pool-idle", seconds, "TIME",
        "Give host memory of the pool back after so long without need; 0 keeps it.",
        f"{_DEFAULTS.pool_idle_s:g}s", _MEMORY,
    ),
    "max_streamed_bytes": _Flag(
        "--max-streamed", size, "SIZE", "Most KV that an iteration may stream (cuda).",
        "2GiB (with --pool peer:N 8GiB), or what --max-model-len needs", _MEMORY,
    ),
    "streamed_blocks": _Flag(
        "--streamed-blocks", count, "N", "Fix how many blocks may be streamed.",
        "the governor decides", _MEMORY,
    ),
    "exchange": _Flag(
        "--exchange", None, None,
        "Copy streamed KV back after every layer group too, for measurements.", "off", _MEMORY,
    ),
    "link_bytes_per_s": _Flag(
        "--link-rate", rate, "SIZE/s", "Limit the link between host pool and arena (cpu).",
        "no limit", _MEMORY,
    ),
    "block_tokens": _Flag(
        "--block-tokens", count, "N", "Tokens of one KV block.",
        str(_DEFAULTS.block_tokens), _MEMORY,
    ),
    "layer_group": _Flag(
        "--layer-group", count, "N", "Most layers staged and awaited as one.",
        "as suits the device", _MEMORY,
    ),
    "ring_depth": _Flag(
        "--ring-depth", count, "N", "Layer groups that the staging ring holds.",
        "as suits the device", _MEMORY,
    ),
    "device": _Flag(
        "--device", one_of(*get_args(DeviceName)), "|".join(get_args(DeviceName)),
        "Where the model runs; sim runs on a cost model, without tensors.", _DEFAULTS.device,
    ),
    "dtype": _Flag(
        "--dtype", one_of(*get_args(DtypeName)), "|".join(get_args(DtypeName)),
        "What the model computes in; auto is float32 on the CPU.", _DEFAULTS.dtype,
    ),
    "load_format": _Flag(
        "--load-format", load_format, "|".join(get_args(LoadFormat)),
        "Where weights come from; random needs a config.json or a shape's name alone.",
        _DEFAULTS.load_format,
    ),
    "quantization": _Flag(
        "--quantization", one_of(*get_args(Quantization)), "|".join(get_args(Quantization)),
        "What weights are converted to when loaded (cuda).", "none",
    ),
    "max_model_len": _Flag(
        "--max-model-len", count, "N", "Longest prompt plus output, in tokens.",
        "what model and memory hold",
    ),
    "max_running_sequences": _Flag(
        "--max-running", count, "N", "Most sequences in one iteration.", "64; on cuda 256",
    ),
    "token_budget": _Flag(
        "--token-budget", count, "N", "Most tokens in one iteration.", "512; on cuda 8192",
    ),
    "kernels": _Flag(
        "--kernels", one_of(*get_args(Kernels)), "|".join(get_args(Kernels)),
        "torch computes with torch's own operators, slowly, as a reference (cuda).",
        _DEFAULTS.kernels,
    ),
    "attention": _Flag(
        "--attention", one_of(*get_args(Attention)), "|".join(get_args(Attention)),
        "What attention of prompts is computed with; auto: what was measured faster (cuda).",
        _DEFAULTS.attention,
    ),
    "cuda_graphs": _Flag(
        "--cuda-graphs", None, None,
        "Replay decode iterations instead of launching their kernels one by one (cuda).", "on",
    ),
    "itl_target_s": _Flag(
        "--itl-target", seconds, "TIME",
        "Most time between two tokens while others prefill; sets the token budget (cuda).",
        "no target",
    ),
    "itl_limit_s": _Flag(
        "--itl-limit", seconds, "TIME",
        "Most time that an iteration may take for the sake of streaming.", "no limit",
    ),
    "prefix_caching": _Flag(
        "--prefix-caching", None, None,
        "Share the KV of equal leading tokens, also of requests that have ended.", "on",
    ),
    "iterations_in_flight": _Flag(
        "--iterations-in-flight", count, "1|2", "Iterations issued before tokens are back.",
        str(_DEFAULTS.iterations_in_flight),
    ),
    "max_queued_requests": _Flag(
        "--max-queued", count, "N", "More requests than this are refused.",
        str(_DEFAULTS.max_queued_requests),
    ),
    "max_queued_tokens": _Flag(
        "--max-queued-tokens", count, "N", "The same for tokens of their prompts.",
        f"{_DEFAULTS.max_queued_tokens // 2**20}Mi",
    ),
    "reader_patience_s": _Flag(
        "--reader-patience", seconds, "TIME",
        "Pause a request whose reader takes nothing for so long; 0: never.",
        f"{_DEFAULTS.reader_patience_s:g}s",
    ),
    "watchdog_s": _Flag(
        "--watchdog", seconds, "TIME",
        "End the engine, with a report, if it stands still for so long; 0: never.",
        f"{_DEFAULTS.watchdog_s:g}s",
    ),
    "report_dir": _Flag(
        "--report-dir", str, "DIR", "Where reports go.", "in the user's cache directory",
    ),
    "cpu_threads": _Flag(
        "--cpu-threads", count, "N", "Threads of one torch operation (cpu).", "all cores but one",
    ),
    "seed": _Flag(
        "--seed", count, "N", "Seeds of requests without one are drawn from it.",
        str(_DEFAULTS.seed),
    ),
    "debug": _Flag(
        "--debug", None, None,
        "Show where errors come from; poison staging buffers, check invariants.", "off",
    ),
    "check_copies": _Flag(
        "--check-copies", None, None,
        "Compare checksums of copied blocks; what is wrong is copied or computed again.", "off",
    ),
    "sim_gpu": _Flag(
        "--sim-gpu", str, "NAME", "GPU whose cost model runs.", _DEFAULTS.sim_gpu, _SIM
    ),
    "sim_link": _Flag(
        "--sim-link", str, "NAME", "Link to the pool.", _DEFAULTS.sim_link, _SIM
    ),
}  # fmt: skip


def flag_of(field: str | None) -> str | None:
    """The flag that sets a field of `EngineConfig`; other options are flags of their own name."""
    if field is None or field == "model":
        return None
    return FLAGS[field].name if field in FLAGS else "--" + field.replace("_", "-")


MODEL = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        envvar="PIE_MODEL",
        show_envvar=False,
        help="A Hugging Face directory, a hub id, or 'builtin'.",
    ),
]


def with_engine_flags(command: Command) -> Command:
    """Give a command every engine flag; it gets them as one argument, `engine`.

    The command has parameters `model: MODEL` and `engine: EngineConfig`; its own flags keep
    their place in front of the engine's.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "engine"]
    added = [_parameter(name, flag) for name, flag in FLAGS.items()]

    @functools.wraps(command)
    def wrapper(**values: Any) -> Any:
        fields = {name: values.pop(name) for name in FLAGS}
        given = {name: value for name, value in fields.items() if value is not None}
        config = EngineConfig(model=values["model"], **given)
        return command(engine=config, **values)

    parameters = [*own, *added]
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper  # type: ignore[return-value]


def _parameter(field: str, flag: _Flag) -> inspect.Parameter:
    option = typer.Option(
        flag.spellings,
        parser=flag.parser,
        metavar=flag.metavar,
        help=f"{flag.help} Default: {flag.default}.",
        show_default=False,
        envvar=flag.variable,
        show_envvar=False,
        rich_help_panel=flag.panel,
    )
    kind = bool if flag.parser is None else str
    return inspect.Parameter(
        field,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )
