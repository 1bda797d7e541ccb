"""Attention kernels alone, as a layer calls them: replayed from a CUDA graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from pie_async.device.cost_model import ModelShape

_ROUNDS = 30
_BLOCK_TOKENS = 16


def decode_attention_s(shape: ModelShape, batch: int, context: int) -> float:
    """Median seconds of one layer's attention, one token per sequence, bfloat16."""
    from pie_async.cuda.kernels.decode_attention import (
        DecodeWorkspace,
        decode_attention,
        plan_decode,
    )

    kv, tables, lanes = _paged(shape, batch, context)
    positions = torch.full((batch,), context - 1, dtype=torch.int32, device="cuda")
    queries = _random(batch, shape.num_heads, shape.head_dim)
    out = torch.empty(batch, shape.num_heads * shape.head_dim, dtype=kv.dtype, device="cuda")
    workspace = DecodeWorkspace(
        max_rows=batch,
        heads=shape.num_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        block_tokens=_BLOCK_TOKENS,
        dtype=kv.dtype,
        device=kv.device,
    )
    # Once for all layers, so not part of a layer's time.
    plan = plan_decode(positions, lanes, window=None, workspace=workspace)
    return _replayed_s(
        lambda: decode_attention(
            queries, kv, tables, lanes, positions,
            window=None, plan=plan, out=out, workspace=workspace,
        )
    )  # fmt: skip


def prefill_attention_s(shape: ModelShape, batch: int, tokens: int) -> float:
    """Median seconds of one layer's causal attention over whole prompts, bfloat16."""
    from pie_async.cuda.kernels.prefill_attention import (
        prefill_attention,
        prefill_config,
        prefill_tiles,
    )

    kv, tables, _ = _paged(shape, batch, tokens)
    config = prefill_config(shape.num_heads, shape.kv_heads, shape.head_dim, kv.dtype)
    rows = [(lane, lane * tokens, tokens, 0) for lane in range(batch)]
    tiles = prefill_tiles(rows, heads=shape.num_heads, kv_heads=shape.kv_heads, config=config)
    tiles = tiles.to("cuda")
    queries = _random(batch * tokens, shape.num_heads, shape.head_dim)
    out = torch.empty(len(queries), shape.num_heads * shape.head_dim, dtype=kv.dtype, device="cuda")
    return _replayed_s(
        lambda: prefill_attention(queries, kv, tables, tiles, window=None, out=out, config=config)
    )


def _paged(
    shape: ModelShape, batch: int, context: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KV, block tables in random order, lanes."""
    blocks = -(-context // _BLOCK_TOKENS)
    kv = _random(batch * blocks, 2, shape.kv_heads, _BLOCK_TOKENS, shape.head_dim)
    generator = torch.Generator("cuda").manual_seed(0)
    order = torch.randperm(batch * blocks, device="cuda", generator=generator)
    tables = torch.zeros(batch + 1, blocks, dtype=torch.int32, device="cuda")
    tables[:batch] = order.view(batch, blocks)
    return kv, tables, torch.arange(batch, dtype=torch.int32, device="cuda")


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def _replayed_s(work: Callable[[], None]) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the tensors
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(_ROUNDS)
    ]
    for began, ended in times:
        began.record()
        graph.replay()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(float(began.elapsed_time(ended)) for began, ended in times) / 1e3
