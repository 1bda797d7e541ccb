"""FlashInfer's attention for rows of several tokens over our paged KV: a package that is optional.

Its kernel for Hopper GPUs (FlashAttention 3), causal, without a window. An iteration is planned
once, on the host, and the plan runs in every layer. The package is imported when it is first
asked for, never with this module.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

PACKAGE = "flashinfer"
EXTRA = "pip install 'pie-async[flashinfer]'"
_HOPPER = 9
_HEAD_DIMS = (64, 128, 256)
_DTYPES = (torch.float16, torch.bfloat16)
_PLANS = 2
"""As many iterations are in flight: none waits for the plan of the one before it."""
_TILE_TOKENS = 128
"""Its tiles are of so many tokens of one row and one head; ours take all heads of a KV head."""
LEAST_PAIRS = 2**21
"""Pairs of a token and one that it sees, as a prompt of 2,048 has. With fewer, what 32 layers gain
is less than the 0.2 to 0.8 ms that planning takes."""
LEAST_FILLED = 0.7
"""Share of its tiles that has to be tokens of the rows.

Time of a layer on an H200, Triton's over FlashInfer's, bfloat16, 32 heads, 8 KV heads of 128:
1 x 8,192 tokens 1.43, 8 x 1,024 1.24, 2,048 behind 16,384 1.46, 512 behind 8,192 1.46; but
8 x 64 behind 1,024 0.77, 16 x 16 behind 4,096 0.38, 64 x 2 behind 1,024 0.28.
"""
_WORKSPACE_BYTES = 16 * 2**20
"""For results of split rows. The kernel splits none so far; 8 MiB beside it hold the plan."""

Chunk = tuple[int, int, int]
"""Lane, number of tokens, position of the first."""


class Heads(NamedTuple):
    """What a kernel is made for."""

    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: torch.dtype


def refusal(heads: Heads, capability: tuple[int, int]) -> str | None:
    """Why FlashInfer cannot be used for this, in a few words; None: it can.

    Args:
        capability: of the GPU.
    """
    if capability[0] != _HOPPER:
        return "its kernel for prompts needs a Hopper GPU (compute capability 9.0)"
    if heads.dtype not in _DTYPES:
        return f"it computes in float16 and bfloat16, not {heads.dtype}"
    if heads.head_dim not in _HEAD_DIMS:
        return f"it has kernels for heads of 64, 128 and 256, not {heads.head_dim}"
    if not is_installed():
        return f"it is not installed; {EXTRA}"
    return None


def is_installed() -> bool:
    """Whether the package is there; whether it works is another matter."""
    return importlib.util.find_spec(PACKAGE) is not None


def version() -> str:
    """Of the package.

    Raises:
        Exception: of any kind, where it cannot be imported.
    """
    return str(importlib.import_module(PACKAGE).__version__)


def pays(chunks: Sequence[Chunk]) -> bool:
    """Whether these are the long rows that FlashInfer is faster with."""
    pairs = filled = 0
    for _, num_tokens, start in chunks:
        seen = start + num_tokens // 2
        pairs += num_tokens * seen
        filled += -(-num_tokens // _TILE_TOKENS) * _TILE_TOKENS * seen
    return pairs >= LEAST_PAIRS and pairs >= LEAST_FILLED * filled


class FlashInferPlan:
    """Attention of one iteration's chunks, whose tokens follow each other.

    Attributes:
        num_tokens: of all chunks.
    """

    def __init__(self, wrapper: Any, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._wrapper = wrapper

    def run(self, queries: Tensor, kv: Tensor, out: Tensor) -> None:
        """Attend in one layer.

        Args:
            queries: [num_tokens, heads, head_dim], last dimension contiguous.
            kv: [slots, 2, kv_heads, block_tokens, head_dim], contiguous within a slot; holds the
                chunks' own.
            out: [num_tokens, heads * head_dim]; rows may be strided.
        """
        # It promises nothing about kernels that let it start before they end.
        self._wrapper.run(queries, kv, out=out.view(queries.shape), enable_pdl=False)


class FlashInferAttention:
    """Plans the chunks of one iteration after the other; never waits for the GPU.

    Raises:
        Exception: of any kind, where the package does not work.
    """

    def __init__(self, heads: Heads, device: torch.device) -> None:
        make_wrapper = importlib.import_module(PACKAGE).BatchPrefillWithPagedKVCacheWrapper
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._heads = heads
        self._is_cuda = device.type == "cuda"
        # A plan is copied from pinned memory whenever the stream gets there: it must not be
        # replaced before.
        self._turns = itertools.cycle(
            [_Turn(make_wrapper(workspace, kv_layout="HND", backend="fa3")) for _ in range(_PLANS)]
        )

    def plan(self, chunks: Sequence[Chunk], tables: Tensor) -> FlashInferPlan:
        """Lay out an iteration, on the current stream; good until `_PLANS` more are laid out.

        Args:
            tables: [lanes + 1, max_blocks] int32 slots; those of the chunks are read now.

        Raises:
            Exception: of any kind, where the package cannot.
        """
        heads, size = self._heads, self._heads.block_tokens
        ends = [start + num_tokens for _, num_tokens, start in chunks]
        blocks = [-(-end // size) for end in ends]
        first_tokens = list(itertools.accumulate((n for _, n, _ in chunks), initial=0))
        turn = next(self._turns)
        if turn.copied is not None:
            turn.copied.synchronize()
        turn.wrapper.plan(
            # On the host, or it would wait for them to come from the device.
            _int32(first_tokens),
            _int32(list(itertools.accumulate(blocks, initial=0))),
            torch.cat(
                [tables[lane, :count] for (lane, _, _), count in zip(chunks, blocks, strict=True)]
            ),
            _int32([(end - 1) % size + 1 for end in ends]),
            heads.heads,
            heads.kv_heads,
            heads.head_dim,
            size,
            causal=True,
            q_data_type=heads.dtype,
            kv_data_type=heads.dtype,
        )
        if self._is_cuda:
            turn.copied = turn.copied or torch.cuda.Event()
            turn.copied.record()
        return FlashInferPlan(turn.wrapper, first_tokens[-1])


class _Turn:
    """A wrapper, which holds one plan at a time, and when that plan has left the host."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self.copied: torch.cuda.Event | None = None


def one_line(error: Exception) -> str:
    """An error of a library, for the log."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"


def _int32(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)
