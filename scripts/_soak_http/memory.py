"""Whether a process grows: the slope of its resident memory and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

MIB = 2**20
PARTS = 12
"""Neighbouring samples tell the same; the means of long stretches are nearly independent."""
T_95 = 2.228
"""Two-sided 95 % quantile of Student's t with `PARTS - 2` degrees of freedom."""


@dataclass(frozen=True)
class Slope:
    """Growth in MiB per hour with its 95 % confidence interval, and the memory it is of."""

    per_hour: float
    low: float
    high: float
    least: float
    most: float

    def __str__(self) -> str:
        return (
            f"{self.least:.1f} to {self.most:.1f} MiB, slope {self.per_hour:+.1f} MiB per "
            f"hour (95 %: {self.low:+.1f} to {self.high:+.1f})"
        )


def slope_of(samples: Sequence[tuple[float, int]]) -> Slope:
    """Least squares through the means of `PARTS` equal stretches.

    Args:
        samples: (seconds, bytes), ascending; at least two for each part.
    """
    size = len(samples) // PARTS
    assert size >= 2, f"{len(samples)} samples are too few"
    parts = [samples[i * size : (i + 1) * size] for i in range(PARTS)]
    hours = [fmean(at_s for at_s, _ in part) / 3600 for part in parts]
    mib = [fmean(num_bytes for _, num_bytes in part) / MIB for part in parts]
    mean_h, mean_mib = fmean(hours), fmean(mib)
    spread = sum((h - mean_h) ** 2 for h in hours)
    slope = sum((h - mean_h) * (m - mean_mib) for h, m in zip(hours, mib, strict=True)) / spread
    residuals = [m - mean_mib - slope * (h - mean_h) for h, m in zip(hours, mib, strict=True)]
    error = math.sqrt(sum(r * r for r in residuals) / (PARTS - 2) / spread)
    all_mib = [num_bytes / MIB for _, num_bytes in samples]
    return Slope(slope, slope - T_95 * error, slope + T_95 * error, min(all_mib), max(all_mib))


def tenths(samples: Sequence[tuple[float, int]]) -> str:
    """Memory after each tenth of the samples."""
    last = [samples[len(samples) * (i + 1) // 10 - 1][1] / MIB for i in range(10)]
    return ", ".join(f"{mib:.1f}" for mib in last) + " MiB after each tenth"
