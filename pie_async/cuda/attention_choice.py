"""Whether FlashInfer computes attention of prompts: where it works, and is measured faster."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pie_async.cuda.choice_file import ChoiceFile
from pie_async.cuda.flashinfer_attention import (
    Chunk,
    FlashInferAttention,
    FlashInferPlan,
    Heads,
    is_installed,
    one_line,
    refusal,
    version,
)
from pie_async.cuda.kernels.attention_reference import prefill_attention_reference
from pie_async.cuda.kernels.prefill_attention import (
    prefill_attention,
    prefill_config,
    prefill_tiles,
)
from pie_async.cuda.tuning import Timer, replay_seconds, this_machine
from pie_async.errors import ConfigError

_log = logging.getLogger(__name__)

Attention = Literal["triton", "flashinfer"]

CHECKED: Sequence[Chunk] = ((0, 40, 0), (1, 3, 61), (2, 150, 17), (3, 16, 0))
"""Whole prompts and later chunks, ends within and at the end of blocks."""
MEASURED: Sequence[Sequence[Chunk]] = (((0, 2048, 0), (1, 2048, 0)), ((0, 512, 8192),))
"""Two prompts, and a chunk behind a long context; all that `pays` refuses is Triton's anyway."""
_TOLERANCE = 0.02
"""Relative to the reference; bfloat16 rounds to 0.004."""
_GAIN = 0.97
"""What replaces Triton must take at most this share of its time."""


def choose_attention(
    wanted: Literal["auto", "triton", "flashinfer"],
    heads: Heads,
    device: torch.device,
    *,
    file: ChoiceFile | None = None,
    timer: Timer = replay_seconds,
) -> Attention:
    """What attention of prompts is computed with; the log says it.

    Cost: importing FlashInfer and one run of it; where it is not known which is faster, some
    50 ms more, and compilation. Waits for the device.

    Args:
        wanted: as configured; "flashinfer" takes it without measuring.
        file, timer: for tests.

    Raises:
        ConfigError: FlashInfer is wanted, and cannot be used.
    """
    if wanted == "triton" or (wanted == "auto" and not is_installed()):
        return "triton"
    reason = refusal(heads, torch.cuda.get_device_capability(device))
    if reason is None:
        try:
            check(heads, device)
            return _chosen(wanted, heads, device, file or ChoiceFile(), timer)
        except Exception as error:  # a package that does not fit, kernels that are not there
            reason = one_line(error)
    if wanted == "flashinfer":
        raise ConfigError(f"attention flashinfer cannot be used: {reason}", option="attention")
    _log.warning("attention of prompts: Triton, as FlashInfer cannot be used: %s", reason)
    return "triton"


def check(heads: Heads, device: torch.device) -> None:
    """Run FlashInfer once.

    Raises:
        Exception: of any kind, where it does not work or its result is wrong.
    """
    case = _Case(heads, CHECKED, device)
    found = case.flashinfer(case.kv)
    expected = prefill_attention_reference(
        case.queries.double(), case.kv.double(), case.tables, case.rows, window=None
    )
    error = float((found.double() - expected).norm() / expected.norm())
    if not error <= _TOLERANCE:  # false for NaN
        raise ArithmeticError(f"its result is wrong by {error:.1%}")


def measure(
    heads: Heads, chunks: Sequence[Chunk], device: torch.device, timer: Timer = replay_seconds
) -> dict[Attention, float]:
    """Seconds that one layer's attention takes."""
    case = _Case(heads, chunks, device)
    runs: dict[Attention, float] = {"triton": timer(case.triton, [case.kv])}
    runs["flashinfer"] = timer(case.flashinfer, [case.kv])
    return runs


def _chosen(
    wanted: Literal["auto", "flashinfer"],
    heads: Heads,
    device: torch.device,
    file: ChoiceFile,
    timer: Timer,
) -> Attention:
    """FlashInfer works: whether it is taken."""
    if wanted == "flashinfer":
        _log.info("attention of prompts: FlashInfer %s", version())
        return "flashinfer"
    machine, key = f"{this_machine()}, flashinfer {version()}", _key(heads)
    known = file.read(machine)
    if key not in known:
        cases = [measure(heads, chunks, device, timer) for chunks in MEASURED]
        is_faster = all(case["flashinfer"] <= _GAIN * case["triton"] for case in cases)
        known[key] = ("flashinfer" if is_faster else "triton",)
        file.write(machine, known)
        _log.debug("%s: seconds %s", key, cases)
    choice: Attention = "flashinfer" if known[key] == ("flashinfer",) else "triton"
    says = f"FlashInfer {version()}" if choice == "flashinfer" else "Triton"
    _log.info("attention of prompts: %s, measured faster on this card", says)
    return choice


def _key(heads: Heads) -> str:
    return (
        f"prefill attention, {heads.heads} heads, {heads.kv_heads} KV heads of {heads.head_dim}, "
        f"blocks of {heads.block_tokens}, {heads.dtype}"
    )


class _Case:
    """Chunks with random queries and KV, whose blocks are strewn over the slots."""

    def __init__(self, heads: Heads, chunks: Sequence[Chunk], device: torch.device) -> None:
        self._heads = heads
        self._chunks = chunks
        size = heads.block_tokens
        blocks = max(-(-(start + num_tokens) // size) for _, num_tokens, start in chunks)
        slots = torch.randperm(len(chunks) * blocks, device=device).to(torch.int32)
        self.tables = slots.view(len(chunks), blocks)
        shape = (len(slots), 2, heads.kv_heads, size, heads.head_dim)
        self.kv = torch.randn(shape, dtype=heads.dtype, device=device)
        self.rows: list[tuple[int, int, int, int]] = []
        first = 0
        for lane, num_tokens, start in chunks:
            self.rows.append((lane, first, num_tokens, start))
            first += num_tokens
        self.queries = torch.randn(
            first, heads.heads, heads.head_dim, dtype=heads.dtype, device=device
        )
        width = heads.heads * heads.head_dim
        self._out = torch.empty(first, width, dtype=heads.dtype, device=device)
        self._config = prefill_config(heads.heads, heads.kv_heads, heads.head_dim, heads.dtype)
        tiles = prefill_tiles(
            self.rows, heads=heads.heads, kv_heads=heads.kv_heads, config=self._config
        )
        self._tiles = tiles.to(device)
        self._plan: FlashInferPlan | None = None

    def triton(self, kv: Tensor) -> Tensor:
        prefill_attention(
            self.queries,
            kv,
            self.tables,
            self._tiles,
            window=None,
            out=self._out,
            config=self._config,
        )
        return self._out

    def flashinfer(self, kv: Tensor) -> Tensor:
        if self._plan is None:
            attention = FlashInferAttention(self._heads, kv.device)
            self._plan = attention.plan(self._chunks, self.tables)
        self._plan.run(self.queries, kv, self._out)
        return self._out
