"""Decode and prefill attention, in the configurations of the tables beside the kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pie_async.cuda.kernels.attention_reference import (
    decode_attention_reference,
    prefill_attention_reference,
)
from pie_async.cuda.kernels.decode_attention import (
    DecodeConfig,
    DecodeWorkspace,
    decode_attention,
    decode_config,
    plan_decode,
)
from pie_async.cuda.kernels.prefill_attention import (
    PrefillConfig,
    prefill_attention,
    prefill_config,
    prefill_tiles,
)
from scripts._bench_kernels.counts import decode_bytes, prefill_flops
from scripts._bench_kernels.timing import Case, Work, difference, num_copies

_BLOCK_TOKENS = 16
_DTYPE = torch.bfloat16


class Heads(NamedTuple):
    """Of a layer."""

    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads} x {self.head_dim}"


Parts = tuple[tuple[int, int], ...]
"""Decode: of (rows, context). Prefill: of (tokens, position of the first), one per row."""

LAYERS = (Heads(32, 8, 128), Heads(32, 8, 64), Heads(16, 8, 256))
DECODES: tuple[Parts, ...] = (
    ((64, 1024),), ((64, 8192),), ((256, 512),), ((1, 1024),), ((1, 32768),),
    ((1, 32768), (63, 300)), ((64, 300),), ((16, 100), (32, 300), (16, 900)),
)  # fmt: skip
PREFILLS: tuple[Parts, ...] = (((2048, 0),) * 8, ((512, 8192),), ((512, 0),) * 4)
UNGROUPED, UNGROUPED_PREFILL = Heads(40, 40, 128), ((2048, 0),) * 4

DECODE_CONFIGS = {
    128: ((32, 2, 4, 4), (64, 2, 3, 3), (32, 4, 3, 4)),
    64: ((64, 2, 4, 4), (32, 2, 4, 4), (64, 2, 3, 6), (64, 4, 3, 6), (32, 2, 4, 8)),
    256: ((32, 4, 3, 2), (32, 2, 3, 2), (32, 4, 2, 3), (16, 2, 4, 4), (16, 4, 4, 3)),
}
PREFILL_CONFIGS = {
    128: ((64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 3)),
    64: ((64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 3), (64, 64, 4, 4), (128, 128, 8, 2)),
    256: ((128, 64, 8, 2), (64, 32, 4, 3), (64, 64, 8, 2), (64, 32, 4, 2)),
}
"""By head_dim."""


class Paged:
    """KV in blocks of random order, held by several sets of rows in turn."""

    def __init__(self, layer: Heads, contexts: Sequence[int], device: torch.device) -> None:
        blocks = [-(-context // _BLOCK_TOKENS) for context in contexts]
        shape = (2, layer.kv_heads, _BLOCK_TOKENS, layer.head_dim)
        sets = num_copies(sum(blocks) * torch.Size(shape).numel() * _DTYPE.itemsize)
        self.kv = torch.randn(sets * sum(blocks), *shape, dtype=_DTYPE, device=device)
        order = torch.randperm(len(self.kv), device=device).int()
        slots = torch.split_with_sizes(order, blocks * sets)
        self.tables = [
            torch.zeros(len(blocks) + 1, max(blocks), dtype=torch.int32, device=device)
            for _ in range(sets)
        ]
        for i, row_slots in enumerate(slots):
            self.tables[i // len(blocks)][i % len(blocks), : len(row_slots)] = row_slots

    def wide(self, lanes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """KV and tables of some rows of the first set alone, in float32 for the reference."""
        slots = self.tables[0][list(lanes)]
        tables = torch.arange(slots.numel(), device=slots.device).view(slots.shape)
        return self.kv[slots.flatten().long()].float(), tables


def cases(device: torch.device, *, sweep: bool = False, quick: bool = False) -> Iterator[Case]:
    """Decode, then prefill, of each layer; in other configurations than those in use too."""
    for layer in LAYERS[:1] if quick else LAYERS:
        for parts in DECODES[:1] if quick else DECODES:
            contexts = [context for rows, context in parts for _ in range(rows)]
            paged = Paged(layer, contexts, device)
            used = decode_config(layer.head_dim, _DTYPE)
            others = [DecodeConfig(*each) for each in DECODE_CONFIGS[layer.head_dim]]
            for config in dict.fromkeys([used, *others] if sweep else [used]):
                case = decode_case(layer, contexts, config, paged)
                shape = " + ".join(f"{rows} x {context}" for rows, context in parts)
                yield _named(case, layer, shape, is_used=config == used)
    prefills = [(layer, parts) for layer in LAYERS for parts in PREFILLS]
    prefills.append((UNGROUPED, UNGROUPED_PREFILL))
    for layer, parts in prefills[:1] if quick else prefills:
        paged = Paged(layer, [start + tokens for tokens, start in parts], device)
        chosen = prefill_config(*layer, _DTYPE)
        tried = [PrefillConfig(*each) for each in PREFILL_CONFIGS[layer.head_dim]]
        for tiling in dict.fromkeys([chosen, *tried] if sweep else [chosen]):
            tokens, start = parts[0]
            shape = f"{len(parts)} x {tokens}" + (f" at {start}" if start else "")
            case = prefill_case(layer, parts, tiling, paged)
            yield _named(case, layer, shape, is_used=tiling == chosen)


def _named(case: Case, layer: Heads, shape: str, *, is_used: bool) -> Case:
    return case._replace(shape=f"{layer}, {shape}", note="in use" if is_used else "")


def decode_case(
    layer: Heads,
    contexts: Sequence[int],
    config: DecodeConfig,
    paged: Paged,
    *,
    num_programs: int | None = None,
) -> Case:
    """One token per row; the plan, made once for all layers, is not part of the time."""
    n, device = len(contexts), paged.kv.device
    positions = torch.tensor(contexts, dtype=torch.int32, device=device) - 1
    lanes = torch.arange(n, dtype=torch.int32, device=device)
    queries = torch.randn(n, layer.heads, layer.head_dim, dtype=_DTYPE, device=device)
    out = torch.full((n, layer.heads * layer.head_dim), torch.nan, dtype=_DTYPE, device=device)
    workspace = DecodeWorkspace(
        max_rows=n, heads=layer.heads, kv_heads=layer.kv_heads, head_dim=layer.head_dim,
        block_tokens=_BLOCK_TOKENS, dtype=_DTYPE, device=device, config=config,
        num_programs=num_programs,
    )  # fmt: skip
    plan = plan_decode(positions, lanes, window=None, workspace=workspace)

    def work_on(tables: Tensor) -> Work:
        return lambda: decode_attention(
            queries, paged.kv, tables, lanes, positions,
            window=None, plan=plan, out=out, workspace=workspace,
        )  # fmt: skip

    works = [work_on(tables) for tables in paged.tables]

    def error() -> float:
        works[0]()
        some = sorted({0, n // 2, n - 1})
        expected = decode_attention_reference(
            queries[some].float(), *paged.wide(some), lanes[: len(some)], positions[some],
            window=None,
        )  # fmt: skip
        return difference(out[some], expected)

    num_bytes = decode_bytes(
        contexts, kv_heads=layer.kv_heads, head_dim=layer.head_dim, itemsize=_DTYPE.itemsize
    )
    return Case("decode", "", _text(config), works, error, num_bytes=num_bytes)


def prefill_case(layer: Heads, parts: Parts, config: PrefillConfig, paged: Paged) -> Case:
    """Chunks of rows, or whole prompts."""
    device, first, rows = paged.kv.device, 0, []
    for lane, (tokens, start) in enumerate(parts):
        rows.append((lane, first, tokens, start))
        first += tokens
    tiles = prefill_tiles(rows, heads=layer.heads, kv_heads=layer.kv_heads, config=config)
    tiles = tiles.to(device)
    queries = torch.randn(first, layer.heads, layer.head_dim, dtype=_DTYPE, device=device)
    out = torch.full((first, layer.heads * layer.head_dim), torch.nan, dtype=_DTYPE, device=device)

    def work_on(tables: Tensor) -> Work:
        return lambda: prefill_attention(
            queries, paged.kv, tables, tiles, window=None, out=out, config=config
        )

    works = [work_on(tables) for tables in paged.tables]

    def error() -> float:
        works[0]()
        lane, begin, tokens, start = rows[-1]
        expected = prefill_attention_reference(
            queries[begin:].float(), *paged.wide([lane]), [(0, 0, tokens, start)], window=None
        )
        # Of the other rows only that they were written.
        return torch.nan if out.isnan().any() else difference(out[begin:], expected)

    flops = prefill_flops(parts, heads=layer.heads, head_dim=layer.head_dim)
    return Case("prefill", "", _text(config), works, error, flops=flops)


def _text(config: tuple[int, ...]) -> str:
    return ", ".join(map(str, config))
