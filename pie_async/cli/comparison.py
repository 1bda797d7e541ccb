"""Two results of `pie-async bench` beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.table import Table

from pie_async.errors import ConfigError

_ALIKE = ("model", "workload", "clock", "machine", "target")


class Figure(NamedTuple):
    """A number of a result."""

    name: str
    path: tuple[str, ...]
    scale: float = 1.0
    is_better_large: bool = False


FIGURES = (
    Figure("output tokens/s", ("output_tokens_per_s",), is_better_large=True),
    Figure("requests/s", ("requests_per_s",), is_better_large=True),
    Figure("goodput, requests/s", ("goodput_requests_per_s",), is_better_large=True),
    *(
        Figure(f"{name} {part}, ms", (field, part), 1e3)
        for name, field in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("ITL", "itl_s"),
                            ("end to end", "e2e_s"))
        for part in ("p50", "p90", "p99")
    ),
    Figure("failed requests", ("failed",)),
)  # fmt: skip


def table(before: Path, after: Path) -> Table:
    """Every figure that both have, and the second by the first.

    Raises:
        ConfigError: one of them is no result.
    """
    first, second = read(before), read(after)
    found = Table(box=None, header_style="bold", pad_edge=False)
    found.add_column("")
    for name in (before.name, after.name, "ratio", ""):
        found.add_column(name, justify="right")
    for figure in FIGURES:
        one, two = _value(first, figure), _value(second, figure)
        if one is not None and two is not None:
            found.add_row(figure.name, f"{one:,.2f}", f"{two:,.2f}", *_judged(figure, one, two))
    return found


def _judged(figure: Figure, one: float, two: float) -> tuple[str, str]:
    if not one:
        return ("", "worse") if two > one else ("", "")
    ratio = two / one
    if abs(ratio - 1) < 0.005:
        return f"{ratio:.3f}", ""
    return f"{ratio:.3f}", "better" if (ratio > 1) == figure.is_better_large else "worse"


def differences(before: Path, after: Path) -> Iterator[str]:
    """What makes them hard to compare, a line each."""
    first, second = read(before), read(after)
    for name in _ALIKE:
        one, two = first.get(name), second.get(name)
        if one != two:
            yield f"{name} differs: {_brief(one)} and {_brief(two)}"


def _brief(value: Any) -> str:
    return (
        ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    )


def _value(result: dict[str, Any], figure: Figure) -> float | None:
    found: Any = result["summary"]
    for name in figure.path:
        found = found.get(name) if isinstance(found, dict) else None
    return found * figure.scale if isinstance(found, int | float) else None


def read(path: Path) -> dict[str, Any]:
    """A result that `--json` wrote.

    Raises:
        ConfigError: it is none.
    """
    try:
        result = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", option="compare") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}", option="compare") from error
    if not isinstance(result, dict) or not isinstance(result.get("summary"), dict):
        raise ConfigError(f"{path} is no result of `pie-async bench --json`", option="compare")
    return result
