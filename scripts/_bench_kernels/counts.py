"""What a kernel has to read, write and multiply at the least."""

from __future__ import annotations

from collections.abc import Iterable


def decode_bytes(contexts: Iterable[int], *, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Keys and values, read once; queries and results are next to nothing beside them."""
    return sum(contexts) * 2 * kv_heads * head_dim * itemsize


def prefill_flops(rows: Iterable[tuple[int, int]], *, heads: int, head_dim: int) -> int:
    """Two products per token and token that it sees, each of 2 * head_dim operations per head.

    Args:
        rows: of (number of tokens, position of the first).
    """
    seen = sum(num * start + num * (num + 1) // 2 for num, start in rows)
    return 4 * heads * head_dim * seen


def linear_bytes(m: int, n: int, k: int, *, itemsize: int) -> int:
    """[m, k] and the weight [n, k] read, [m, n] written."""
    return (m * k + n * k + m * n) * itemsize


def linear_flops(m: int, n: int, k: int) -> int:
    """A product and a sum per number of the weight and token."""
    return 2 * m * n * k
