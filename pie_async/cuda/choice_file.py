"""What was measured to be fastest, remembered by machine in a file that engines share."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

Choice = tuple[str | int, ...]
"""What it means is known to whoever measured it."""

_VERSION = 1
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError)
"""What reading anybody's JSON as if it were ours may raise."""


class ChoiceFile:
    """Choices by key, for each machine; whatever else may make them differ is part of its name.

    Args:
        path: None: in the user's cache directory. A damaged or unwritable file costs a line in
            the log and the measuring again.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or default_path()
        self._has_complained = False

    def read(self, machine: str) -> dict[str, Choice]:
        """What is remembered for this machine."""
        try:
            choices = self._read().get(machine, {})
            return {str(key): tuple(choice) for key, choice in choices.items()}
        except FileNotFoundError:
            return {}
        except _UNREADABLE as error:
            self._complain(error)
            return {}

    def write(self, machine: str, choices: dict[str, Choice]) -> None:
        """Replace what is remembered for this machine."""
        try:
            machines = self._read()
        except _UNREADABLE:
            machines = {}
        machines[machine] = choices
        text = json.dumps({"version": _VERSION, "machines": machines}, indent=1)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Whole or not at all: another engine may start meanwhile.
            partial = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            partial.write_text(text)
            partial.replace(self._path)
        except OSError as error:
            self._complain(error)

    def _read(self) -> dict[str, Any]:
        content = json.loads(self._path.read_bytes())
        if content["version"] != _VERSION:
            return {}
        return dict(content["machines"])

    def _complain(self, error: Exception) -> None:
        if not self._has_complained:
            self._has_complained = True
            _log.warning(
                "measured choices cannot be kept in %s: %s: %s",
                self._path,
                type(error).__name__,
                error,
            )


def default_path() -> Path:
    """Where the user's caches are."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pie_async" / "tuning.json"
