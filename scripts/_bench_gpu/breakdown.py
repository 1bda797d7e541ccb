"""Where a decode iteration's time goes, by kind of kernel, from torch's profiler."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.profiler import ProfilerActivity

# The first that matches counts. Products are last: their names hold the least of their own.
_CLASSES = (
    ("copies", r"memcpy|memset|copy_kernel|CatArray"),
    ("attention", r"attention|attn|flash|fmha|_decode_kernel|_prefill_kernel|_plan_kernel|Paged"),
    ("norm, rope, activation", r"norm|rotate|rope|activat|silu|embed|cos_|sin_|gate"),
    ("sampling", r"_best_of|choose|sampl|argmax|softmax|topk|sort|noise|gumbel|_remember"),
    ("inputs", r"_update_kernel|_resolve_kernel|index"),
    (
        "gemm",
        r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|split_k|matmul|linear|_product|_rows_kernel|_split_kernel",
    ),
)
_GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")


class Breakdown(msgspec.Struct, frozen=True, kw_only=True):
    """Of a window on the GPU. Kernels that ran beside others are counted in full."""

    window_s: float
    by_class_s: dict[str, float]
    idle_s: float
    """Time in which no stream had work, between the first and the last kernel."""
    top_kernels_s: dict[str, float]


@contextmanager
def profiled(found: list[Breakdown]) -> Iterator[None]:
    """Profile what runs inside; the outcome is appended at the end."""
    from torch.profiler import profile

    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        # Other activities than the GPU's would slow the host down.
        with profile(activities=[_activity()]) as profiler:
            yield
        profiler.export_chrome_trace(str(trace))
        found.append(read_trace(json.loads(trace.read_text())["traceEvents"]))


def _activity() -> ProfilerActivity:
    return ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU


def read_trace(events: Iterable[Mapping[str, Any]]) -> Breakdown:
    """Sum up a Chrome trace's GPU work; its times are microseconds."""
    work = sorted(
        (float(event["ts"]), float(event["dur"]), str(event["name"]))
        for event in events
        if event.get("cat") in _GPU_CATEGORIES and "dur" in event
    )
    work = work[_first_steady(work) :]
    by_class: dict[str, float] = {}
    by_kernel: dict[str, float] = {}
    idle_us, busy_until = 0.0, work[0][0] if work else 0.0
    for began, lasted, name in work:
        kind = class_of(name)
        by_class[kind] = by_class.get(kind, 0.0) + lasted / 1e6
        by_kernel[name[:80]] = by_kernel.get(name[:80], 0.0) + lasted / 1e6
        idle_us += max(0.0, began - busy_until)
        busy_until = max(busy_until, began + lasted)
    largest = sorted(by_kernel.items(), key=lambda pair: -pair[1])[:20]
    return Breakdown(
        window_s=(busy_until - work[0][0]) / 1e6 if work else 0.0,
        by_class_s=dict(sorted(by_class.items(), key=lambda pair: -pair[1])),
        idle_s=idle_us / 1e6,
        top_kernels_s=dict(largest),
    )


def _first_steady(work: Sequence[tuple[float, float, str]]) -> int:
    """Where work goes on after the profiler's start has held the host up.

    That is the longest pause among the first quarter of the kernels.
    """
    longest_us, first, busy_until = 0.0, 0, work[0][0] if work else 0.0
    for number, (began, lasted, _) in enumerate(work[: len(work) // 4]):
        if began - busy_until > longest_us:
            longest_us, first = began - busy_until, number
        busy_until = max(busy_until, began + lasted)
    return first


def class_of(kernel: str) -> str:
    """The kind of work a kernel does, by its name."""
    for kind, pattern in _CLASSES:
        if re.search(pattern, kernel, re.IGNORECASE):
            return kind
    return "other"
