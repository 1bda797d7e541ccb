"""Where blocks lie, and what other slots hold, never shows in a result."""

from __future__ import annotations

import random

import pytest
import torch

from pie_async.messages import RunIteration, TableUpdate
from pie_async.model.attention import PagedKv
from pie_async.model.attention_plan import Planner, Span, order_spans
from pie_async.model.config import read_config
from pie_async.model.weights import load_model
from tests.support.checkpoints import greedy, write_checkpoint
from tests.support.direct_runner import DirectRunner

CPU = torch.device("cpu")
RNG = random.Random(1)
PROMPTS = [[RNG.randrange(97) for _ in range(length)] for length in (1, 4, 11, 12, 13, 30)]


@pytest.fixture(scope="module", params=["llama", "mistral-window", "opt"])
def peer(request, tmp_path_factory):
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("paging"), request.param)
    path = checkpoint.path
    return load_model(path, read_config(path), torch.float32, CPU), checkpoint.model


def logits_of(runner, chunk):
    runner.generate(PROMPTS, 9, chunk=chunk)
    return torch.stack([torch.stack(rows) for rows in runner.logits.values()])


@pytest.mark.parametrize("chunk", [None, 5])
def test_other_slots_give_bit_identical_logits(peer, chunk):
    decoder, _ = peer
    first, second = (logits_of(DirectRunner(decoder, seed=seed), chunk) for seed in (0, 1))
    assert torch.equal(first, second)


@pytest.mark.parametrize("chunk", [None, 5])
def test_poisoned_slots_give_bit_identical_logits(peer, chunk):
    decoder, _ = peer
    clean, poisoned = (
        logits_of(DirectRunner(decoder, poison=poison), chunk) for poison in (False, True)
    )
    assert torch.equal(clean, poisoned)


def test_moving_blocks_in_mid_generation_changes_no_bit(peer):
    """As when a sealed block is demoted and staged: same numbers, another slot."""
    decoder, _ = peer
    outcomes = []
    for is_moving in (False, True):
        runner = DirectRunner(decoder, seed=3)
        bindings = [runner.submit(lane, prompt) for lane, prompt in enumerate(PROMPTS)]
        lanes = range(len(PROMPTS))
        runner.iterate(lanes, bindings=bindings)
        for _ in range(5):
            if is_moving:
                move_sealed_blocks(runner)
            runner.iterate(lanes)
        outcomes.append(torch.stack([torch.stack(rows) for rows in runner.logits.values()]))
    assert torch.equal(*outcomes)


def move_sealed_blocks(runner):
    tables = []
    for lane, sequence in runner._running.items():
        for index in range(sequence.fed // runner._block_tokens):
            old, new = sequence.slots[index], runner._free.pop(0)
            for kv in runner.kv:
                kv[new] = kv[old]
                kv[old] = float("nan")
            runner._free.append(old)
            sequence.slots[index] = new
            tables.append(TableUpdate(lane, index, (new,)))
    runner.runner.begin(RunIteration(iteration=99, rows=(), tables=tuple(tables)))


def test_lane_reused_by_a_shorter_sequence_ignores_its_old_table(peer):
    decoder, model = peer
    runner = DirectRunner(decoder, lanes=1)
    runner.generate([PROMPTS[-1]], 9)
    for kv in runner.kv:
        kv.fill_(float("nan"))
    tokens, _ = greedy(model, PROMPTS[2], 6)
    assert runner.generate([PROMPTS[2]], 6) == [tokens]


def test_later_update_of_a_table_entry_wins(peer):
    decoder, _ = peer
    runner = DirectRunner(decoder).runner
    updates = (TableUpdate(2, 0, (5, 6)), TableUpdate(2, 1, (7,)))
    runner.begin(RunIteration(iteration=0, rows=(), tables=updates))
    assert runner._tables[2, :3].tolist() == [5, 7, 0]


def reference(kv, slots, span, queries, window):
    """Dense attention of one row, token by token, over its own positions."""
    keys, values = torch.cat([kv[slot] for slot in slots], dim=2).repeat_interleave(2, 1)
    rows = []
    for i, query in enumerate(queries):
        position = span.start + i
        seen = slice(0 if window is None else max(position + 1 - window, 0), position + 1)
        scores = torch.einsum("hd,htd->ht", query, keys[:, seen]) * query.shape[-1] ** -0.5
        rows.append(torch.einsum("ht,htd->hd", scores.softmax(-1), values[:, seen]).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5, 600])
def test_mixed_iteration_equals_dense_attention(window, dtype):
    """Decode rows of very different lengths (split into batches), prompts and later chunks."""
    size, heads, dim = 16, 2, 32
    torch.manual_seed(0)
    kv = torch.full((512, 2, heads, size, dim), float("nan"), dtype=dtype)
    contexts = [(2000, 1), (3, 1), (0, 1), (1023, 1), (15, 1), (16, 1), (500, 1)]
    spans = [
        Span(lane, start, count)
        for lane, (start, count) in enumerate([*contexts, (0, 17), (40, 9), (700, 33), (31, 2)])
    ]
    slots = torch.randperm(512).tolist()
    tables = torch.zeros(11, 128, dtype=torch.int64)
    for span in spans:
        own = [slots.pop() for _ in range(-(-span.end // size))]
        tables[span.lane, : len(own)] = torch.tensor(own)
        kv[own] = torch.randn(len(own), 2, heads, size, dim).to(dtype)
        kv[own[span.start // size :]] = float("nan")
        written = kv[own[span.start // size]]
        written[:, :, : span.start % size] = torch.randn(2, heads, span.start % size, dim)
        if span.start % size:
            written[:, :, span.start % size :] = 0.0
    spans = [spans[i] for i in order_spans(spans)]
    lanes = torch.tensor([span.lane for span in spans for _ in range(span.num_tokens)])
    positions = torch.cat([torch.arange(span.start, span.end) for span in spans])
    queries, keys, values = (
        torch.randn(len(lanes), n, dim).to(dtype) for n in (2 * heads, heads, heads)
    )
    paged = PagedKv(kv)
    plan = Planner(paged, tables, dtype).plan(spans, lanes, positions, [window])[window]
    assert window is not None or sum(part.tokens.stop <= 7 for part in plan._parts) > 1
    attended = plan.attend(paged, queries, keys, values).float()
    first = 0
    for span in spans:
        tokens = slice(first, first + span.num_tokens)
        first = tokens.stop
        own = tables[span.lane, : -(-span.end // size)].tolist()
        expected = reference(kv.float(), own, span, queries[tokens].float(), window)
        torch.testing.assert_close(
            attended[tokens], expected, rtol=0, atol=2e-5 if dtype == torch.float32 else 2e-2
        )
