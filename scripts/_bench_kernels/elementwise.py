"""What runs between products and attention, at the sizes of Llama 3.1 8B.

Every call finds its input in memory. In an engine it is often still in the L2 cache, so that
small shapes take less there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pie_async.cuda.kernels import activation, embedding, inputs, norm, qkv, sampling
from pie_async.model.noise import seed_key, token_codes
from scripts._bench_kernels.timing import Case, Work, difference, num_copies

ROWS, _QUICK_ROWS = (1, 64, 256, 8192), (1, 64)
_MOST_SAMPLED = 1024
_BLOCK_TOKENS, _MAX_BLOCKS, _LANES = 16, 512, 256
_EPS = 1e-5


class Sizes(NamedTuple):
    """Of a model."""

    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 128256


class Made(NamedTuple):
    """A call, its reference on equal data, and the bytes that it reads and writes."""

    work: Work
    reference: Work
    num_bytes: int


class Data:
    """Random operands; what only lookups read is shared."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        self.sizes, self.device, self.dtype = sizes, device, dtype

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, device=self.device, dtype=torch.int32)

    @functools.cached_property
    def table(self) -> Tensor:
        return self.random(self.sizes.vocab, self.sizes.hidden)

    @functools.cached_property
    def codes(self) -> Tensor:
        return token_codes(self.sizes.vocab, self.device)


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    """Each kernel at several numbers of tokens, bfloat16."""
    data = Data(Sizes(), device, torch.bfloat16)
    for name, make in MAKERS.items():
        for rows in _QUICK_ROWS if quick else ROWS:
            yield case(name, make, data, rows)


def case(name: str, make: Maker, data: Data, rows: int) -> Case:
    """One kernel on as many operands as the cache does not hold."""
    if make in (_greedy, _drawn):
        rows = min(rows, _MOST_SAMPLED)
    first = make(data, rows)
    others = [make(data, rows) for _ in range(num_copies(first.num_bytes) - 1)]
    works = [made.work for made in (first, *others)]
    return Case(name, f"{rows} rows", "", works, lambda: _error(first), num_bytes=first.num_bytes)


def _error(made: Made) -> float:
    found, expected = _tensors(made.work), _tensors(made.reference)
    # A maximum would lose NaN.
    return sum(difference(*pair) for pair in zip(found, expected, strict=True))


def _tensors(work: Work) -> tuple[Tensor, ...]:
    result = work()
    assert result is not None
    return (result,) if isinstance(result, Tensor) else result


def _norm(data: Data, n: int, *, is_rms: bool = True) -> Made:
    size = data.sizes.hidden
    x, weight = data.random(n, size), data.random(size)
    bias = None if is_rms else data.random(size)
    return Made(
        lambda: norm.norm(x, weight, bias, eps=_EPS, is_rms=is_rms),
        lambda: norm.norm_reference(x, weight, bias, eps=_EPS, is_rms=is_rms),
        2 * x.nbytes,
    )


def _add_norm(data: Data, n: int) -> Made:
    size = data.sizes.hidden
    # Small, since the residual grows with every replay.
    x, residual, weight = data.random(n, size) / 8, data.random(n, size), data.random(size)
    twin = residual.clone()
    return Made(
        lambda: (norm.add_norm(x, residual, weight, None, eps=_EPS, is_rms=True), residual),
        lambda: (norm.add_norm_reference(x, twin, weight, None, eps=_EPS, is_rms=True), twin),
        4 * x.nbytes,
    )


def _rotate_and_store(data: Data, n: int, *, has_norms: bool = False) -> Made:
    heads, kv_heads, dim = data.sizes.heads, data.sizes.kv_heads, data.sizes.head_dim
    slots = n // _BLOCK_TOKENS + 2
    x = data.random(n, (heads + 2 * kv_heads) * dim)
    kv = torch.zeros(slots, 2, kv_heads, _BLOCK_TOKENS, dim, device=data.device, dtype=data.dtype)
    twin = kv.clone()
    places = torch.randperm(slots * _BLOCK_TOKENS, device=data.device)[:n]
    angles = 6 * torch.rand(n, 1, dim // 2, device=data.device)
    cos, sin = angles.cos().to(data.dtype), angles.sin().to(data.dtype)
    rotation = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    weight = data.random(dim) if has_norms else None

    def call(function: Callable[..., Tensor], kv: Tensor) -> tuple[Tensor, Tensor]:
        queries = function(
            x, places, kv, num_heads=heads, rotation=rotation, q_norm=weight, k_norm=weight,
            eps=_EPS,
        )  # fmt: skip
        return queries, kv

    return Made(
        lambda: call(qkv.rotate_and_store, kv),
        lambda: call(qkv.rotate_and_store_reference, twin),
        2 * x.nbytes + 2 * rotation[0].nbytes,
    )


def _silu_and_multiply(data: Data, n: int) -> Made:
    x = data.random(n, 2 * data.sizes.inner)
    return Made(
        lambda: activation.activate(x, "silu", True),
        lambda: activation.activate_reference(x, "silu", True),
        x.nbytes * 3 // 2,
    )


def _gelu(data: Data, n: int) -> Made:
    x = data.random(n, data.sizes.inner)
    return Made(
        lambda: activation.activate(x, "gelu", False),
        lambda: activation.activate_reference(x, "gelu", False),
        2 * x.nbytes,
    )


def _embed(data: Data, n: int) -> Made:
    ids, table = data.integers(0, data.sizes.vocab, n).long(), data.table
    return Made(
        lambda: embedding.embed(ids, table),
        lambda: embedding.embed_reference(ids, table),
        2 * n * data.sizes.hidden * table.element_size(),
    )


def _greedy(data: Data, n: int) -> Made:
    logits = data.random(n, data.sizes.vocab)
    return Made(
        lambda: sampling.choose(logits, temperature=None),
        lambda: sampling.choose_reference(logits, temperature=None),
        logits.nbytes,
    )


def _drawn(data: Data, n: int) -> Made:
    logits, codes = data.random(n, data.sizes.vocab), data.codes
    temperature = torch.full((n,), 0.8, device=data.device)
    keys = torch.tensor([seed_key(seed) for seed in range(n)], device=data.device)
    positions = torch.arange(n, device=data.device, dtype=torch.int32)

    def call(function: Callable[..., Tensor]) -> Tensor:
        return function(
            logits, temperature=temperature, keys=keys, positions=positions, codes=codes
        )

    return Made(
        lambda: call(sampling.choose), lambda: call(sampling.choose_reference), logits.nbytes
    )


def _resolve(data: Data, n: int) -> Made:
    tables = data.integers(0, 1000, _LANES + 1, _MAX_BLOCKS)
    last = data.integers(0, 1000, _LANES + 1).long()
    tokens, lanes = data.integers(-1, 1000, n), data.integers(0, _LANES, n)
    positions = data.integers(-1, _MAX_BLOCKS * _BLOCK_TOKENS, n)
    given = (tokens, lanes, positions, last, tables, _BLOCK_TOKENS)
    read, written = 3 * 4 + 8 + 4, 2 * 8
    return Made(
        lambda: inputs.resolve(*given),
        lambda: inputs.resolve_reference(*given),
        (read + written) * n,
    )


Maker = Callable[[Data, int], Made]
MAKERS: dict[str, Maker] = {
    "norm": _norm,
    "layer norm": functools.partial(_norm, is_rms=False),
    "add, norm": _add_norm,
    "rotate and store": _rotate_and_store,
    "the same, q and k normed": functools.partial(_rotate_and_store, has_norms=True),
    "silu and multiply": _silu_and_multiply,
    "gelu": _gelu,
    "embed": _embed,
    "choose, greedy": _greedy,
    "choose, drawn": _drawn,
    "resolve": _resolve,
}
