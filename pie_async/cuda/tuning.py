"""Which implementation of a linear layer is fastest here: measured once, remembered in a file."""

from __future__ import annotations

import functools
import logging
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import triton
from torch import Tensor

from pie_async.cuda import cublas_lt
from pie_async.cuda.choice_file import ChoiceFile
from pie_async.cuda.kernels.fp8 import (
    FP8,
    MAX_FP8,
    SCALED,
    WIDENED,
    candidates_fp8,
    linear_fp8,
)
from pie_async.cuda.kernels.linear import MAX_TOKENS, TORCH, Choice, candidates, linear

_log = logging.getLogger(__name__)

Run = Callable[[Tensor], Tensor]
Timer = Callable[[Run, Sequence[Tensor]], float]
"""Seconds that a product takes, given weights to take in turn."""
Candidates = Callable[[int, int, int, torch.dtype], list[Choice]]

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)
"""Tokens at which is measured; fewer take the next bucket's choice."""

_GAIN = 0.97
"""What replaces the first candidate must take at most this share of its time."""
_TOLERANCE, _FP8_TOLERANCE = 0.02, 0.1
"""Relative to the first candidate's product; bfloat16 rounds to 0.004, FP8 to 0.06."""
_TUNED_DTYPES = (torch.float16, torch.bfloat16, FP8)
_CACHED_BYTES = 200 * 2**20
"""Several times the L2 cache of the large cards: weights taken in turn come from memory."""
_MIN_RUNS, _MAX_RUNS = 4, 20
_REPLAYS = 5


class Tuner:
    """Knows the fastest choice per shape; measures what it does not know when told to.

    Args:
        path: of the `ChoiceFile`.
        machine: what choices are good for; None: this card and these library versions.
        quantizes_activations: for FP8 weights; as the checkpoint was made for.
        timer, propose: for tests.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        machine: str | None = None,
        quantizes_activations: bool = True,
        timer: Timer | None = None,
        propose: Candidates | None = None,
    ) -> None:
        self._file = ChoiceFile(path)
        self._machine = machine
        self._fp8_default = SCALED if quantizes_activations else WIDENED
        self._timer = timer or replay_seconds
        self._propose = propose or self._candidates
        self._known: dict[str, Choice] | None = None

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """x W^T + b by what is known to be fastest; never measures, so it may be captured.

        Args:
            scale: [out] float32, for an FP8 weight.
        """
        return product(x, weight, bias, scale, choice=self.known(weight, x.shape[0]))

    def known(self, weight: Tensor, m: int) -> Choice:
        """The choice for m tokens as far as is known; otherwise what every m can have."""
        bucket, default = _bucket(m), self._default(weight)
        if bucket is None or self._known is None:
            return default
        return self._known.get(self._key(weight, bucket), default)

    def prepare(self, weights: Iterable[Tensor], tokens: Iterable[int] = BUCKETS) -> None:
        """Know the choices for these weights at these numbers of tokens; see `choose`."""
        buckets = {bucket for m in tokens if (bucket := _bucket(m)) is not None}
        for weight in {self._key(each, 0): each for each in weights}.values():
            for bucket in sorted(buckets):
                self.choose(weight, bucket)

    def choose(self, weight: Tensor, m: int) -> Choice:
        """The fastest for m tokens, measured with this weight if its shape is not known.

        Cost: once per shape and bucket some tens of milliseconds, compilation (seconds on a
        fresh machine) and up to 200 MiB beside; waits for the device. Not while capturing.

        Args:
            weight: [out, k]; its numbers matter only for the time they take.
        """
        bucket = _bucket(m)
        if bucket is None or weight.dtype not in _TUNED_DTYPES:
            return self._default(weight)
        if self._known is None:
            self._machine = self._machine or this_machine()
            self._known = self._file.read(self._machine)
        key = self._key(weight, bucket)
        if key not in self._known:
            self._known[key] = self._measure(weight, bucket)
            self._file.write(self._machine or "", self._known)
        return self._known[key]

    def _measure(self, weight: Tensor, m: int) -> Choice:
        (n, k), is_fp8 = weight.shape, weight.dtype == FP8
        copies = _CACHED_BYTES // (weight.numel() * weight.element_size())
        weights = [weight, *(weight.clone() for _ in range(min(copies, _MAX_RUNS)))]
        x = torch.randn(m, k, device=weight.device)
        x = x.to(torch.bfloat16 if is_fp8 else weight.dtype)
        scale = torch.full((n,), 1 / MAX_FP8, device=weight.device) if is_fp8 else None
        expected = product(x, weight, None, scale, choice=self._default(weight)).float()
        allowed = (_FP8_TOLERANCE if is_fp8 else _TOLERANCE) * expected.norm()
        seconds: dict[Choice, float] = {}
        for choice in self._propose(m, n, k, weight.dtype):

            def run(weight: Tensor, choice: Choice = choice) -> Tensor:
                return product(x, weight, None, scale, choice=choice)

            try:
                if (run(weight).float() - expected).norm() <= allowed:
                    seconds[choice] = self._timer(run, weights)
            except Exception as error:  # of any of the compilers and drivers below
                _log.debug("no %s for [%d, %d] by [%d, %d]: %s", choice, m, k, n, k, error)
        default = self._default(weight)
        best = min(seconds, key=lambda choice: seconds[choice], default=default)
        if default in seconds and seconds[best] > _GAIN * seconds[default]:
            best = default
        _log.debug("[%d, %d] by [%d, %d]: %s of %s", m, k, n, k, best, seconds)
        return best

    def _default(self, weight: Tensor) -> Choice:
        return self._fp8_default if weight.dtype == FP8 else TORCH

    def _candidates(self, m: int, n: int, k: int, dtype: torch.dtype) -> list[Choice]:
        if dtype != FP8:
            return candidates(m, n, k, dtype)
        return candidates_fp8(m, n, k, quantizes_activations=self._fp8_default == SCALED)

    def _key(self, weight: Tensor, bucket: int) -> str:
        (n, k), dtype = weight.shape, str(weight.dtype).removeprefix("torch.")
        how = f"{dtype}, {self._fp8_default[0]}" if weight.dtype == FP8 else dtype
        return f"{how} [{bucket}, {k}] by [{n}, {k}]"


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    choice: Choice | None = None,
) -> Tensor:
    """x (W * scale)^T + b; a scale goes with an FP8 weight."""
    if scale is None:
        return linear(x, weight, bias, choice=choice)
    return linear_fp8(x, weight, scale, bias, choice=choice)


def this_machine() -> str:
    """The card and the versions of everything whose choice or code is measured."""
    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"triton {triton.__version__}, cublasLt {cublas_lt.version()}"
    )


def replay_seconds(run: Run, weights: Sequence[Tensor]) -> float:
    """Median time of one run within a replayed CUDA graph, as an engine runs it."""
    runs = max(min(len(weights) * 2, _MAX_RUNS), _MIN_RUNS)
    graph, stream = torch.cuda.CUDAGraph(), _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(weights[0])  # what is compiled, loaded or allocated now must not be captured
        graph.capture_begin()
        try:
            for each in range(runs):
                run(weights[each % len(weights)])
        finally:
            graph.capture_end()
        graph.replay()
        milliseconds = [_milliseconds(graph.replay) for _ in range(_REPLAYS)]
    torch.cuda.current_stream().wait_stream(stream)
    return statistics.median(milliseconds) / runs / 1e3


def _milliseconds(work: Callable[[], None]) -> float:
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


@functools.cache
def _stream() -> torch.cuda.Stream:
    """One for good: torch keeps a workspace for every stream that ever saw a product."""
    return torch.cuda.Stream()


def _bucket(m: int) -> int | None:
    return next((bucket for bucket in BUCKETS if m <= bucket), None) if m else None


assert BUCKETS[-1] == MAX_TOKENS
