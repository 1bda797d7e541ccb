"""Paged attention against its plain torch reference, over random batches and edge lengths."""

from __future__ import annotations

import random

import pytest
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
    plan_decode,
)
from pie_async.cuda.kernels.prefill_attention import (
    PrefillConfig,
    prefill_attention,
    prefill_config,
    prefill_tiles,
)

SHAPES = [
    pytest.param((8, 2, 32, 16), id="grouped"),
    pytest.param((3, 3, 16, 8), id="one-head-each"),
    pytest.param((6, 2, 24, 4), id="odd-group-and-dim"),
    pytest.param((20, 1, 16, 64), id="large-group-and-blocks"),
]
SMALL_TILES = DecodeConfig(16, num_warps=4, num_stages=2, programs_per_processor=1)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Cache:
    """Random KV of lanes of these lengths, in blocks strewn over slots; NaN everywhere else."""

    def __init__(
        self,
        lengths: list[int],
        *,
        kv_heads: int,
        head_dim: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        dropped: list[int] | None = None,
    ) -> None:
        """`dropped`: by lane, how many tokens' blocks at the start are gone."""
        blocks = [-(-length // block_tokens) for length in lengths]
        slots = list(range(sum(blocks) + 3))
        random.shuffle(slots)
        # One layer of three that lie side by side in every slot.
        shape = (len(slots), 3, 2, kv_heads, block_tokens, head_dim)
        self.kv = torch.full(shape, torch.nan, dtype=dtype, device=device)[:, 1]
        self.tables = torch.full((len(lengths) + 1, max(blocks) + 2), slots.pop(), device=device)
        self.tables = self.tables.to(torch.int32)
        for lane, length in enumerate(lengths):
            for block in range(blocks[lane]):
                slot, used = slots.pop(), min(block_tokens, length - block * block_tokens)
                self.tables[lane, block] = slot
                if (block + 1) * block_tokens > (dropped[lane] if dropped else 0):
                    self.kv[slot, :, :, :used] = torch.randn(
                        2, kv_heads, used, head_dim, dtype=dtype, device=device
                    )


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (found.double() - expected).abs().max()
    assert error <= TOLERANCE[dtype] * expected.abs().max(), error  # false for NaN


def strided(n: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows in a wider buffer of NaN, as results go into a slice of a larger one."""
    return torch.full((n, width + 16), torch.nan, dtype=dtype, device=device)[:, 8 : width + 8]


def skip_if_bits(dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as integers")


def check_decode(
    lengths: list[int],
    *,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    window: int | None = None,
    num_programs: int = 5,
    config: DecodeConfig | None = SMALL_TILES,
    padding: int = 2,
    repeats: int = 1,
) -> None:
    heads, kv_heads, head_dim, block_tokens = shape
    workspace = DecodeWorkspace(
        max_rows=len(lengths) + padding,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        dtype=dtype,
        device=device,
        config=config,
        num_programs=num_programs,
    )
    for _ in range(repeats):
        random.shuffle(lengths)
        cache = Cache(
            lengths,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_tokens=block_tokens,
            dtype=dtype,
            device=device,
            dropped=[length - window if window else 0 for length in lengths],
        )
        lanes = random.sample(range(len(lengths)), len(lengths))
        positions = [lengths[lane] - 1 for lane in lanes]
        lanes += [len(lengths)] * padding
        positions += [-1] * padding
        order = random.sample(range(len(lanes)), len(lanes))
        lane = torch.tensor([lanes[i] for i in order], dtype=torch.int32, device=device)
        position = torch.tensor([positions[i] for i in order], dtype=torch.int32, device=device)
        n = len(order)
        wide = torch.randn(n, (heads + 2) * head_dim, dtype=dtype, device=device)
        queries = wide[:, : heads * head_dim].view(n, heads, head_dim)
        out = strided(n, heads * head_dim, dtype, device)
        plan = plan_decode(position, lane, window=window, workspace=workspace)
        decode_attention(
            queries,
            cache.kv,
            cache.tables,
            lane,
            position,
            window=window,
            plan=plan,
            out=out,
            workspace=workspace,
        )
        expected = decode_attention_reference(
            queries.double(), cache.kv.double(), cache.tables, lane, position, window=window
        )
        assert_close(out, expected, dtype)
        assert not workspace.arrivals.any()


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(3)
    torch.manual_seed(3)


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_at_edge_lengths(shape, device) -> None:
    lengths = [1, 15, 16, 17, 64, 31, 130]
    check_decode(lengths, shape=shape, dtype=torch.float32, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decode_dtypes(dtype, device) -> None:
    skip_if_bits(dtype, device)
    check_decode([90, 3, 41], shape=(8, 2, 32, 16), dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_own_configs_of_every_width(head_dim, dtype, device) -> None:
    shape = (4, 2, head_dim, 16)
    check_decode([150, 33], shape=shape, dtype=dtype, device=device, config=None)
    check_prefill([(20, 70), (0, 5)], shape=shape, dtype=dtype, device=device)


@pytest.mark.gpu
def test_a_captured_graph_serves_other_contexts() -> None:
    device, dtype, n = torch.device("cuda"), torch.bfloat16, 9
    heads, kv_heads, head_dim, block_tokens = 8, 2, 128, 16
    workspace = DecodeWorkspace(
        max_rows=n,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        dtype=dtype,
        device=device,
    )
    kv = torch.randn(600, 2, kv_heads, block_tokens, head_dim, dtype=dtype, device=device)
    tables = torch.randint(600, (n + 1, 400), dtype=torch.int32, device=device)
    lanes = torch.arange(n, dtype=torch.int32, device=device)
    positions = torch.zeros_like(lanes)
    queries = torch.randn(n, heads, head_dim, dtype=dtype, device=device)
    out = torch.empty(n, heads * head_dim, dtype=dtype, device=device)

    def attend() -> None:
        plan = plan_decode(positions, lanes, window=None, workspace=workspace)
        decode_attention(
            queries,
            kv,
            tables,
            lanes,
            positions,
            window=None,
            plan=plan,
            out=out,
            workspace=workspace,
        )

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    for longest in (1, 20, 6400, 300, 6400):
        positions.copy_(torch.randint(-1, longest, (n,)))
        positions[3] = longest - 1
        graph.replay()
        first = out.clone()
        expected = decode_attention_reference(
            queries.double(), kv.double(), tables, lanes, positions, window=None
        )
        assert_close(first, expected, dtype)
        for _ in range(20):  # whoever arrives last merges in the same order
            graph.replay()
            assert torch.equal(out, first)


@pytest.mark.parametrize("window", [1, 7, 16, 40])
@pytest.mark.parametrize("block_tokens", [4, 64])
def test_decode_reads_nothing_before_its_window(window, block_tokens, device) -> None:
    lengths = [1, 7, 8, 33, 100, 150]
    shape = (4, 2, 16, block_tokens)
    check_decode(lengths, shape=shape, dtype=torch.float32, device=device, window=window)


@pytest.mark.parametrize("num_programs", [1, 2, 7, 64])
def test_one_plan_serves_short_and_long_contexts(num_programs, device) -> None:
    """Also again and again with other contexts: the counts of arrivals are reset."""
    check_decode(
        [300, 1, 2, 40],
        shape=(4, 2, 16, 16),
        dtype=torch.float32,
        device=device,
        num_programs=num_programs,
        repeats=3,
    )


def test_a_batch_of_padding_only(device) -> None:
    check_decode([5], shape=(4, 2, 16, 16), dtype=torch.float32, device=device, padding=30)


def test_shares_are_equal_and_complete(device) -> None:
    workspace = DecodeWorkspace(
        max_rows=3,
        heads=4,
        kv_heads=2,
        head_dim=16,
        block_tokens=16,
        dtype=torch.float32,
        device=device,
        config=SMALL_TILES,
        num_programs=4,
    )
    positions = torch.tensor([31, -1, 111], dtype=torch.int32, device=device)
    lanes = torch.tensor([1, 2, 0], dtype=torch.int32, device=device)
    plan = plan_decode(positions, lanes, window=None, workspace=workspace)
    # Two heads of 2, 1 and 7 tiles: 20 units, so 5 each.
    assert plan[:, :7].tolist() == [
        [0, 0, 0, 5, 5, 31, 1],
        [1, 1, 0, 5, 5, -1, 2],
        [2, 0, 4, 5, 5, 111, 0],
        [2, 1, 2, 5, 5, 111, 0],
    ]


def check_prefill(
    chunks: list[tuple[int, int]],
    *,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    config: PrefillConfig | None = None,
    window: int | None = None,
) -> None:
    """`chunks`: of (start position, number of tokens)."""
    heads, kv_heads, head_dim, block_tokens = shape
    config = config or prefill_config(heads, kv_heads, head_dim, dtype)
    cache = Cache(
        [start + num_tokens for start, num_tokens in chunks],
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        dtype=dtype,
        device=device,
        dropped=[start + 1 - window if window else 0 for start, _ in chunks],
    )
    rows, first = [], 2
    for lane, (start, num_tokens) in enumerate(chunks):
        rows.append((lane, first, num_tokens, start))
        first += num_tokens + 1  # a token between rows that is in no tile
    random.shuffle(rows)
    wide = torch.randn(first, (heads + 2) * head_dim, dtype=dtype, device=device)
    queries = wide[:, : heads * head_dim].view(first, heads, head_dim)
    out = strided(first, heads * head_dim, dtype, device)
    tiles = prefill_tiles(rows, heads=heads, kv_heads=kv_heads, config=config)
    tiles = torch.cat((tiles, torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32))).to(device)
    prefill_attention(queries, cache.kv, cache.tables, tiles, window=window, out=out, config=config)
    expected = prefill_attention_reference(
        queries.double(), cache.kv.double(), cache.tables, rows, window=window
    )
    is_fed = torch.zeros(first, dtype=torch.bool)
    for _, begin, num_tokens, _ in rows:
        is_fed[begin : begin + num_tokens] = True
    assert out[~is_fed].isnan().all()
    assert_close(out[is_fed], expected[is_fed], dtype)


SMALL = PrefillConfig(tile_rows=32, tile_tokens=16, num_warps=4, num_stages=2)


@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_of_whole_prompts_and_later_chunks(shape, device) -> None:
    chunks = [(0, 1), (0, 16), (0, 37), (5, 20), (64, 16), (63, 3), (17, 1)]
    check_prefill(chunks, shape=shape, dtype=torch.float32, device=device, config=SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_prefill_dtypes(dtype, device) -> None:
    skip_if_bits(dtype, device)
    check_prefill([(70, 45), (0, 33)], shape=(8, 2, 32, 16), dtype=dtype, device=device)


@pytest.mark.parametrize("window", [1, 7, 16, 40])
@pytest.mark.parametrize("block_tokens", [4, 64])
def test_prefill_reads_nothing_before_its_window(window, block_tokens, device) -> None:
    chunks = [(0, 50), (100, 30), (3, 9), (39, 1)]
    shape = (4, 2, 16, block_tokens)
    check_prefill(
        chunks, shape=shape, dtype=torch.float32, device=device, config=SMALL, window=window
    )


def test_long_tiles_come_first() -> None:
    rows = [(3, 0, 5, 0), (1, 5, 9, 100)]
    tiles = prefill_tiles(rows, heads=8, kv_heads=1, config=SMALL)
    assert tiles.tolist() == [
        [1, 13, 1, 108],
        [1, 9, 4, 104],
        [1, 5, 4, 100],
        [3, 4, 1, 4],
        [3, 0, 4, 0],
    ]
    assert prefill_tiles([], heads=8, kv_heads=1, config=SMALL).shape == (0, 4)
