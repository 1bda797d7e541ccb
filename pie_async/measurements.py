"""What a client measures: times of single requests and what they come to together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec


class RequestTimes(msgspec.Struct, kw_only=True):
    """One request as its client saw it. Times are of one clock, in seconds."""

    submitted_s: float
    prompt_tokens: int
    output_tokens: int = 0
    token_s: list[float] = []
    """Arrival of each output token; tokens that came together share a time."""
    finished_s: float | None = None
    error: str | None = None

    def arrived(self, now_s: float, num_tokens: int) -> None:
        """Take down that so many output tokens came."""
        self.output_tokens += num_tokens
        self.token_s.extend([now_s] * num_tokens)

    @property
    def is_complete(self) -> bool:
        return self.error is None and self.finished_s is not None and bool(self.token_s)

    @property
    def ttft_s(self) -> float:
        """Submit to first output token."""
        return self.token_s[0] - self.submitted_s

    @property
    def e2e_s(self) -> float:
        """Submit to end."""
        assert self.finished_s is not None
        return self.finished_s - self.submitted_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of an output token after the first; None if there is only one."""
        if self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Gaps between consecutive output tokens."""
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """Mean and percentiles of some values, seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution | None:
        """None if there are no values."""
        ordered = sorted(values)
        if not ordered:
            return None
        return cls(
            mean=math.fsum(ordered) / len(ordered),
            p50=percentile(ordered, 50),
            p90=percentile(ordered, 90),
            p99=percentile(ordered, 99),
            max=ordered[-1],
        )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Linearly interpolated percentile (0..100) of ascending values, as NumPy's default."""
    at = (len(ordered) - 1) * share / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


class LatencyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a request must keep to count towards goodput; None: no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def are_met(self, request: RequestTimes) -> bool:
        tpot_s = request.tpot_s
        return (self.ttft_s is None or request.ttft_s <= self.ttft_s) and (
            self.tpot_s is None or tpot_s is None or tpot_s <= self.tpot_s
        )


class LoadSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A finished run. Rates count complete requests only, over the whole run."""

    requests: int
    failed: int
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    goodput_requests_per_s: float | None
    """Requests within both limits; None if no limit was set."""
    goodput_share: float | None
    ttft_s: Distribution | None
    tpot_s: Distribution | None
    itl_s: Distribution | None
    e2e_s: Distribution | None
    errors: dict[str, int]
    """How often each error was seen."""


def summarize(
    requests: Sequence[RequestTimes],
    *,
    duration_s: float,
    limits: LatencyLimits | None = None,
) -> LoadSummary:
    """What a run comes to.

    Args:
        duration_s: first submission to last end.
    """
    complete = [request for request in requests if request.is_complete]
    output = sum(request.output_tokens for request in complete)
    prompt = sum(request.prompt_tokens for request in complete)
    per_s = 1 / duration_s if duration_s > 0 else 0.0
    good = sum(limits.are_met(request) for request in complete) if limits else None
    errors: dict[str, int] = {}
    for request in requests:
        if not request.is_complete:
            reason = request.error or "ended without output"
            errors[reason] = errors.get(reason, 0) + 1
    return LoadSummary(
        requests=len(requests),
        failed=len(requests) - len(complete),
        duration_s=duration_s,
        prompt_tokens=prompt,
        output_tokens=output,
        requests_per_s=len(complete) * per_s,
        output_tokens_per_s=output * per_s,
        total_tokens_per_s=(prompt + output) * per_s,
        goodput_requests_per_s=None if good is None else good * per_s,
        goodput_share=None if good is None else good / max(1, len(requests)),
        ttft_s=Distribution.of(request.ttft_s for request in complete),
        tpot_s=Distribution.of(t for r in complete if (t := r.tpot_s) is not None),
        itl_s=Distribution.of(gap for request in complete for gap in request.itl_s),
        e2e_s=Distribution.of(request.e2e_s for request in complete),
        errors=errors,
    )
