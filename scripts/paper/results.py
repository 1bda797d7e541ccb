"""What an experiment leaves behind: rows as CSV, everything as JSON, a plot where one can be made.

Files are written again after every row, so that a run that ends early has not been in vain.
"""

from __future__ import annotations

import csv
import datetime
import gc
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pie_async import __version__

RESULTS = Path("results")

Plot = Callable[[Any, Sequence[Any]], None]
"""Draws rows (one struct each) on a matplotlib figure."""


class Results:
    """The rows of one experiment.

    Args:
        name: of the files.
        folder: where they go.
        facts: what the numbers depend on beside the rows: machine, seed, options.
        plot: how to draw them.
    """

    def __init__(
        self, name: str, folder: Path, facts: dict[str, Any], plot: Plot | None = None
    ) -> None:
        self.rows: list[msgspec.Struct] = []
        self._folder = folder
        self._name = name
        self._plot = plot
        self._facts = {
            "experiment": name,
            "version": __version__,
            "date": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            **facts,
        }

    def add(self, row: msgspec.Struct) -> None:
        """Keep a row, write all, and say it."""
        self.rows.append(row)
        numbers = (f"{name} {_short(value)}" for name, value in _fields(row).items())
        print(", ".join(numbers), flush=True)
        self._write()

    def add_all(self, rows: Sequence[msgspec.Struct]) -> None:
        """Keep many rows at once, and write them."""
        self.rows += rows
        if rows:
            self._write()

    def finish(self) -> None:
        """Draw the plot; without matplotlib say how to get it."""
        if self._plot is None or not self.rows:
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            print("no plot: install matplotlib (the extra 'plot')")
            return
        figure = Figure(figsize=(9, 5), layout="constrained")
        self._plot(figure, self.rows)
        figure.savefig(self._file("png"), dpi=150)
        print(f"wrote {self._folder / self._name}.csv, .json and .png")

    def _file(self, ending: str) -> Path:
        return self._folder / f"{self._name}.{ending}"

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        listed = [_fields(row) for row in self.rows]
        everything = msgspec.json.encode({**self._facts, "rows": listed})
        self._file("json").write_bytes(msgspec.json.format(everything, indent=1))
        with self._file("csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(listed[0]))
            writer.writeheader()
            writer.writerows(listed)


def machine() -> str:
    """The GPU, its memory and driver; without one the processor."""
    import torch

    if not torch.cuda.is_available():
        return f"no GPU, {platform.machine()}, {platform.system()}"
    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {memory:.0f} GiB, torch {torch.__version__}"


def replot(name: str, folder: Path, row: type[msgspec.Struct], plot: Plot) -> None:
    """Draw rows that another machine measured, from its JSON file."""
    found = msgspec.json.decode((folder / f"{name}.json").read_bytes())
    results = Results(name, folder, {}, plot)
    results.rows = [msgspec.convert(each, row) for each in found["rows"]]
    results.finish()


def _fields(row: msgspec.Struct) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__struct_fields__}


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def freeze() -> None:
    """Set what is loaded aside, as the commands do: collecting it stops the loop for 0.15 s."""
    gc.collect()
    gc.freeze()


def thaw() -> None:
    """An engine has ended: give its memory back before the next one starts."""
    gc.unfreeze()
    gc.collect()
