"""Products with the weights of Llama 3.1 8B: torch, cuBLASLt's algorithms and Triton.

What `cuda/tuning.py` measures on a user's machine, with all candidates side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pie_async.cuda.kernels.linear import Choice, candidates, linear_reference
from pie_async.cuda.tuning import BUCKETS, product
from scripts._bench_kernels.counts import linear_bytes, linear_flops
from scripts._bench_kernels.timing import Case, difference, num_copies

SHAPES = {
    "qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096),
    "lm_head": (4096, 128256),
}  # fmt: skip
"""k and out."""
_QUICK_SHAPES, _QUICK_TOKENS = ("qkv", "down"), (1, 64)
_DTYPE = torch.bfloat16
_SCALE = 0.02
"""Of weights, about as models have them."""


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    """Every candidate of every shape, at each number of tokens that choices are made for."""
    for name in _QUICK_SHAPES if quick else SHAPES:
        k, n = SHAPES[name]
        weights = [
            _SCALE * torch.randn(n, k, device=device, dtype=_DTYPE)
            for _ in range(num_copies(n * k * _DTYPE.itemsize))
        ]
        for m in _QUICK_TOKENS if quick else BUCKETS:
            yield from shape_cases(name, weights, m)


def shape_cases(name: str, weights: Sequence[Tensor], m: int) -> Iterator[Case]:
    """Every candidate for m tokens.

    Args:
        weights: [out, k] each, taken in turn.
    """
    n, k = weights[0].shape
    x = torch.randn(m, k, device=weights[0].device, dtype=weights[0].dtype)
    expected = linear_reference(x.float(), weights[0].float())
    for number, choice in enumerate(candidates(m, n, k, x.dtype)):
        works = [functools.partial(product, x, weight, choice=choice) for weight in weights]
        yield Case(
            kernel=f"linear {name}",
            shape=f"[{m}, {k}] by [{n}, {k}]",
            config=_named(choice, number),
            works=works,
            error=lambda work=works[0]: difference(work(), expected),  # type: ignore[misc]
            num_bytes=linear_bytes(m, n, k, itemsize=x.element_size()),
            flops=linear_flops(m, n, k),
        )


def _named(choice: Choice, number: int) -> str:
    """As in a table; the numbers are those of `candidates`, where torch is 0."""
    kind, *sizes = choice
    return f"cuBLASLt {number}" if kind == "lt" else " ".join(map(str, (kind, *sizes)))
