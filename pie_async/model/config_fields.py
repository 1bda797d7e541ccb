"""Checked reading of a JSON object that someone else wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pie_async.config import MIB, format_size
from pie_async.errors import ModelError, UnsupportedModel


class Fields:
    """One JSON object whose values are taken out one by one, each checked.

    Every error names the file and the field. `unread` tells what nobody asked for.
    A field that is null counts as absent.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where
        self._read: set[str] = set()

    def within(self, name: str, values: Mapping[str, Any]) -> Fields:
        """The object that a field holds."""
        return Fields(values, f"{self._where}: {name}")

    def fail(self, name: str, problem: str) -> ModelError:
        """The error to raise about a field."""
        return ModelError(f"{self._where}: {name} {problem}")

    def unsupported(self, name: str, problem: str) -> UnsupportedModel:
        """The error to raise about a field whose value means something not computed here."""
        return UnsupportedModel(name, f"{self._where}: {name} {problem}")

    def has(self, name: str) -> bool:
        """Whether the field is there at all, null or not."""
        return name in self._values

    def value(self, name: str) -> Any:
        """The value as it stands; None when absent or null."""
        self._read.add(name)
        return self._values.get(name)

    def integer(
        self, name: str, default: int | None = None, *, low: int = 1, high: int = 2**31 - 1
    ) -> int:
        """An integer in low..high; without a default the field is required."""
        value = self._given(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(name, f"must be an integer, not {value!r}")
        if not low <= value <= high:
            raise self.fail(name, f"must be between {low} and {high}, not {value}")
        return value

    def number(
        self, name: str, default: float | None = None, *, low: float = 0.0, high: float = 1e12
    ) -> float:
        """A finite number above low and at most high."""
        value = self._given(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(name, f"must be a number, not {value!r}")
        if not (math.isfinite(value) and low < value <= high):
            raise self.fail(name, f"must be above {low:g} and at most {high:g}, not {value}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._given(name, default)
        if not isinstance(value, bool):
            raise self.fail(name, f"must be true or false, not {value!r}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._given(name, default)
        if not isinstance(value, str):
            raise self.fail(name, f"must be a string, not {value!r}")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One token id, a list of them, or none."""
        value = self.value(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for each in ids:
            if isinstance(each, bool) or not isinstance(each, int) or each < 0:
                raise self.fail(name, f"must be a token id or a list of them, not {value!r}")
        return tuple(ids)

    def unread(self) -> dict[str, Any]:
        """Fields that were never asked for."""
        return {name: value for name, value in self._values.items() if name not in self._read}

    def _given(self, name: str, default: Any) -> Any:
        value = self.value(name)
        if value is None:
            value = default
        if value is None:
            raise self.fail(name, "is missing")
        return value


MOST_JSON_BYTES = 64 * MIB
"""The index of a model in hundreds of files has 10 MiB."""


def check_size(path: Path, most_bytes: int) -> None:
    """Refuse a file that cannot be meant, before it is read.

    Raises:
        ModelError: naming the file and its size.
        OSError: it is not there.
    """
    if (num_bytes := path.stat().st_size) > most_bytes:
        raise ModelError(
            f"{path} has {format_size(num_bytes)}; at most {format_size(most_bytes)} are read"
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: naming the file, when it is missing, unreadable or something else.
    """
    try:
        check_size(path, MOST_JSON_BYTES)
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist; is this a Hugging Face model directory?"
        ) from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is damaged: it holds {type(value).__name__}, not an object")
    return value
