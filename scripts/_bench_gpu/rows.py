"""One measured number and what it is held against."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Kind = Literal["time", "rate", "share"]
"""Times and shares are better when small, rates when large."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the table. Times are seconds, rates are per second."""

    group: str
    """The name under which `--rows` selects it."""
    name: str
    kind: Kind
    unit: str
    """For the table: s, ms, us, tok/s, TFLOP/s, TB/s, %."""
    measured: float | None = None
    """None: it could not be measured; `note` says why."""
    against: float | None = None
    """In the same unit: the roofline, or what a peer does."""
    against_name: str = ""
    target: float | None = None
    """The least ratio; of a share, the most; of a time without `against`, the most."""
    note: str = ""
    details: dict[str, Any] = {}

    @property
    def ratio(self) -> float | None:
        """How near to what it is held against; above 1 is better than that."""
        if not self.measured or not self.against:
            return None
        if self.kind == "rate":
            return self.measured / self.against
        return self.against / self.measured

    @property
    def is_met(self) -> bool | None:
        """None: no target, or nothing to hold it against."""
        if self.target is None or self.measured is None:
            return None
        if self.against_name:
            return None if self.ratio is None else self.ratio >= self.target
        return self.measured <= self.target
