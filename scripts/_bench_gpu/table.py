"""The rows for people, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from scripts._bench_gpu.rows import Row

_SCALES = {"ms": 1e3, "us": 1e6, "%": 100.0, "TFLOP/s": 1e-12, "TB/s": 1e-12}


def tell(row: Row) -> None:
    """One row, as soon as it is measured."""
    parts = (
        f"{row.name}:",
        _number(row.measured, row.unit),
        "" if row.against is None else f"({row.against_name} {_number(row.against, row.unit)})",
        "" if row.ratio is None else f"ratio {row.ratio:.3f}",
        row.note,
    )
    print(" ".join(part for part in parts if part), flush=True)


def show(rows: Sequence[Row], title: str) -> None:
    """One table: measured, what it is held against, ratio, target."""
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("measure", no_wrap=True)
    for name in ("measured", "against", "", "ratio", "target", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            _number(row.measured, row.unit),
            "" if row.against is None else _number(row.against, row.unit),
            row.against_name,
            "" if row.ratio is None else f"{row.ratio:.3f}",
            _target(row),
            {True: "met", False: "SHORT", None: ""}[row.is_met] or row.note[:40],
        )
    Console(width=150).print(table)


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    scaled = value * _SCALES.get(unit, 1.0)
    return f"{scaled:,.3f} {unit}" if scaled < 100 else f"{scaled:,.0f} {unit}"


def _target(row: Row) -> str:
    if row.target is None:
        return ""
    if row.against_name:
        return f">= {row.target:.2f}x"
    return f"<= {_number(row.target, row.unit)}"


def write(path: Path, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """Everything that was measured; written again after every row, so that no run is lost."""
    listed = [
        {**msgspec.to_builtins(row), "ratio": row.ratio, "is_met": row.is_met} for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode({**facts, "rows": listed}), indent=1))
