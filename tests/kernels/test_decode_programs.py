"""Captured iterations give the tokens of the reference, whatever is replayed after what."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch

from pie_async.core import batch_shapes
from pie_async.core.layout import KvLayout
from pie_async.cuda import decode_program, fused_model, programs
from pie_async.cuda.decode_program import DecodeProgram
from pie_async.cuda.fused_model import DRAWN, GREEDY, takes_one_kernel
from pie_async.cuda.fused_runner import FusedRunner, LaunchedPass, ReplayedPass
from pie_async.cuda.profiling import PLAIN, WIDEST, largest_iteration, longest_prompt
from pie_async.messages import RunIteration, TableUpdate
from pie_async.model import decoder as decoder_module
from pie_async.model import layers as layers_module
from pie_async.model.config import read_config
from pie_async.model.sampling import Needs
from pie_async.model.weights import load_model
from pie_async.sampling_params import SamplingParams, StructuredOutputs
from tests.support.checkpoints import write_checkpoint
from tests.support.direct_runner import DirectRunner

GROUPS = 2
"""Of three layers: the first group is shorter."""
DRAW = SamplingParams(temperature=0.8)
COUNTED = SamplingParams(
    temperature=0.7, frequency_penalty=1.5, repetition_penalty=1.5, top_p=0.9, logprobs=2
)


@pytest.fixture
def decoder(tmp_path, device, monkeypatch):
    """On the CPU its graphs are recorded instead of captured."""
    # What oneDNN packs, the kernels could not read.
    for module in (decoder_module, layers_module):
        monkeypatch.setattr(module, "pack_linear", lambda weight, bias: None)
    if device.type == "cpu":
        from tests.support.recorded_graphs import record_graphs

        record_graphs(monkeypatch)
    path = write_checkpoint(tmp_path, "llama").path
    return load_model(path, read_config(path), torch.float32, device)


@pytest.fixture(autouse=True)
def prompt_sizes(monkeypatch):
    """Prompts are launched, unless a test says what they are padded to: here, too, that is the
    faster way for few of them."""
    monkeypatch.setattr(batch_shapes, "PROMPT_SIZES", ())
    return lambda *sizes: monkeypatch.setattr(batch_shapes, "PROMPT_SIZES", sizes)


class Fused(DirectRunner):
    """Also keeps how each iteration was run."""

    def __init__(self, decoder, *, streams: bool = True, **how) -> None:
        make_runner = partial(self._make, streams)
        super().__init__(decoder, make_runner=make_runner, num_groups=GROUPS, lanes=4, **how)
        self.passes: list[type] = []
        begin = self.runner.begin

        def keep(command):
            forward = begin(command)
            self.passes.append(type(forward))
            return forward

        self.runner.begin = keep

    @staticmethod
    def _make(streams, decoder, kv, *, lanes, max_blocks, block_tokens):
        config = decoder.config
        layout = KvLayout(
            num_layers=config.num_layers,
            block_tokens=block_tokens,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            item_bytes=4,
            num_groups=GROUPS,
            ring_depth=2,
        )
        return FusedRunner(
            decoder,
            kv,
            layout,
            lanes=lanes,
            max_blocks=max_blocks,
            max_tokens=128,
            streams=streams,
        )


def reference(decoder) -> DirectRunner:
    return DirectRunner(decoder, lanes=4)


def same(mine, theirs) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert [(t.sequence, t.token) for t in a] == [(t.sequence, t.token) for t in b]
        for one, other in zip(a, b, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def in_order(sampled):
    return sorted(sampled, key=lambda token: token.sequence)


def serve(runner: DirectRunner) -> list:
    """Batches of all sizes, staged and not, all ways of sampling; lanes change hands."""
    found = []

    def iterate(*lanes, new=(), **how):
        bindings = [runner.submit(lane, prompt, sampling) for lane, prompt, sampling in new]
        found.append(in_order(runner.iterate(lanes, bindings=bindings, **how)[0]))

    iterate(0, new=[(0, [5, 6, 7], PLAIN)])
    for _ in range(3):
        iterate(0)
    for _ in range(3):
        iterate(0, is_staged=True)
    iterate(0, 1, new=[(1, [9] * 11, DRAW)], is_staged=True)
    for turn in range(4):
        iterate(0, 1, is_staged=turn % 2 == 1)
    iterate(1, 2, new=[(2, [11, 12], COUNTED)])
    for turn in range(6):
        iterate(0, 1, 2, is_staged=turn in (1, 2, 4))
    iterate(2, is_staged=True)
    # While sequence 2 decodes and is counted, lane 0 gets a prompt token by token.
    iterate(0, 2, new=[(0, [3, 1, 4, 1, 5], COUNTED)], chunk=1)
    for turn in range(7):
        iterate(0, 2, chunk=1, is_staged=turn == 2)
    for _ in range(3):
        iterate(1)
        iterate(1, is_staged=True)
    return found


def serve_alike(runner: DirectRunner, sampling: SamplingParams) -> list:
    """One, two and three sequences, each staged and not."""
    found = []
    for lane, prompt in enumerate([[5, 6, 7], [9] * 11, [11, 12]]):
        bindings = [runner.submit(lane, prompt, sampling)]
        for is_staged in (False, True, False):
            sampled, _ = runner.iterate(range(lane + 1), bindings=bindings, is_staged=is_staged)
            found.append(in_order(sampled))
            bindings = []
    return found


def test_whatever_is_replayed_after_what_the_tokens_are_those_of_the_reference(decoder) -> None:
    mine = Fused(decoder)
    same(serve(mine), serve(reference(decoder)))
    assert mine.passes.count(ReplayedPass) >= 20
    assert mine.passes[-1] is ReplayedPass


def test_graphs_are_captured_between_iterations_and_replayed_from_then_on(decoder) -> None:
    one = Fused(decoder)
    one.iterate([0], bindings=[one.submit(0, [5, 6, 7])])
    assert not one.runner.wants_graphs
    before = one.runner.graph_bytes
    row, tables = one.row(0)
    forward = one.runner.begin(RunIteration(iteration=1, rows=(row,), tables=tuple(tables)))
    assert one.runner.wants_graphs
    assert one.runner.graph_bytes == before, "it was captured within the iteration"
    for layers in one._groups:
        one.runner.run_layers(forward, layers)
    one.runner.sample(forward)
    one.runner.capture_wanted()
    one.iterate([0])
    assert one.passes == [LaunchedPass, LaunchedPass, ReplayedPass]


def test_a_penalty_leaves_the_layers_to_the_graph_and_ends_with_its_sequence(decoder) -> None:
    one = Fused(decoder)
    bindings = [one.submit(0, [5, 6]), one.submit(1, [7], COUNTED)]
    one.iterate([0, 1], bindings=bindings)
    for _ in range(3):
        one.iterate([0, 1])
    assert one.passes[-1] is ReplayedPass
    for _ in range(3):
        one.iterate([0])  # lane 1 stays bound until another sequence takes it
    assert one.passes[-1] is ReplayedPass
    programs = one.runner._programs._captured
    assert {key for key in programs if not key[1]} == {(2, 0, False), (1, 0, False)}
    assert not programs[2, 0, False]._samplings
    assert set(programs[1, 0, False]._samplings) == {GREEDY}


def test_what_a_row_that_only_feeds_its_prompt_would_have_said_is_not_counted(decoder) -> None:
    def counts(runner: DirectRunner, lanes) -> torch.Tensor:
        bindings = [runner.submit(lane, [5, 6, 7, 8, 9], COUNTED) for lane in (0, 1)]
        runner.iterate([0], bindings=bindings)
        for _ in range(4):
            runner.iterate([0, 1], chunk=1)
        return lanes.sampler._counts[:2]

    mine, theirs = Fused(decoder), reference(decoder)
    found = counts(mine, mine.runner._model.lanes)
    assert torch.equal(found, counts(theirs, theirs.runner._lanes))
    assert found.sum(1).tolist() == [5, 0]
    assert mine.passes[-1] is ReplayedPass


@pytest.mark.parametrize("most", [7, 1 << 16])
def test_more_table_updates_than_a_graph_takes_come_before_it(decoder, monkeypatch, most) -> None:
    """As after a demotion, from which on all entries of a long table are sent again."""
    monkeypatch.setattr(fused_model, "_MOST_UPDATES", most)

    def tokens(runner: DirectRunner) -> list:
        found = [runner.iterate([0], bindings=[runner.submit(0, [5] * 90)])[0]]
        for turn in range(6):
            table = runner.table(0)
            if turn == 3:  # a table of nothing, and then the real one
                runner.iterate([], tables=[TableUpdate(0, 0, (0,) * len(table.slots))])
            found.append(runner.iterate([0], tables=[table] if turn > 2 else [])[0])
        return found

    mine = Fused(decoder)
    same(tokens(mine), tokens(reference(decoder)))
    assert len(mine.table(0).slots) > 16
    assert mine.passes[-3:] == [ReplayedPass] * 3


@pytest.mark.parametrize("sampling", [PLAIN, DRAW, COUNTED], ids=["greedy", "drawn", "counted"])
def test_prompts_beside_decoding_are_replayed_too(decoder, prompt_sizes, sampling) -> None:
    """Of other lengths than those captured with, in chunks, staged and not."""
    prompt_sizes(16)

    def tokens(runner: DirectRunner) -> list:
        found = []

        def iterate(lanes, *, new=(), chunk=None, is_staged=False) -> None:
            bindings = [runner.submit(lane, prompt, sampling) for lane, prompt in new]
            how = {} if chunk is None else {"chunk": chunk}
            done = runner.iterate(lanes, bindings=bindings, is_staged=is_staged, **how)[0]
            found.append(in_order(done))

        iterate([0, 1], new=[(0, [5, 6, 7]), (1, [9] * 13)])
        iterate([0, 1, 2, 3], new=[(2, [4] * 12), (3, [8, 9])])
        iterate([0, 1, 2], new=[(2, [3, 1, 4, 1, 5, 9, 2, 6] * 2)], chunk=4)
        for turn in range(4):
            iterate([0, 1, 2], chunk=4, is_staged=turn in (0, 2))
        iterate([3, 0], new=[(3, [7] * 16)])
        return found

    mine = Fused(decoder)
    same(tokens(mine), tokens(reference(decoder)))
    mixed = [key for key in mine.runner._programs._captured if key[1]]
    assert {key[1] for key in mixed} == {16} and {key[2] for key in mixed} == {False, True}
    assert mine.passes.count(ReplayedPass) >= 5


def test_few_ways_of_sampling_have_graphs_of_their_own() -> None:
    ways = {
        Needs(draws=draws, top_k=k, top_p=top_p, top_logprobs=top, masks=masks)
        for draws in (False, True)
        for k in range(50)
        for top_p in (False, True)
        for top in range(-1, 5)
        for masks in (False, True)
    }
    masked = {needs._replace(masks=True) for needs in (GREEDY, DRAWN)}
    assert set(filter(takes_one_kernel, ways)) == {GREEDY, DRAWN} | masked


def refuse_memory(monkeypatch, owner, name: str, failures: int) -> None:
    """The first calls of this find none."""
    call, left = getattr(owner, name), [failures]

    def refuse(*args, **how):
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("as the test asked")
        return call(*args, **how)

    monkeypatch.setattr(owner, name, refuse)


@pytest.mark.parametrize("failures", [1, 2], ids=["at-first", "for-good"])
def test_without_memory_for_a_graph_iterations_go_on_without_one(
    decoder, monkeypatch, caplog, failures: int
) -> None:
    refuse_memory(monkeypatch, programs, "DecodeProgram", failures)
    mine, theirs = Fused(decoder), reference(decoder)
    tokens = [runner.generate([[5, 6, 7]], 5) for runner in (mine, theirs)]
    assert tokens[0] == tokens[1]
    assert mine.passes[-1] is (ReplayedPass if failures == 1 else LaunchedPass)
    assert ("no memory for a CUDA graph" in caplog.text) is (failures == 2)
    assert not mine.runner.wants_graphs


def test_no_graph_is_captured_where_the_card_has_no_room_for_one(decoder, caplog) -> None:
    one = Fused(decoder)
    one.runner.has_room = lambda: False
    one.generate([[5, 6, 7]], 5)
    assert set(one.passes) == {LaunchedPass}
    assert caplog.text.count("no memory for a CUDA graph of 1 rows") == 1


@pytest.mark.parametrize("failures", [1, 2], ids=["at-first", "for-good"])
def test_without_memory_for_sampling_in_a_graph_its_layers_are_replayed(
    decoder, monkeypatch, caplog, failures: int
) -> None:
    refuse_memory(monkeypatch, DecodeProgram, "capture_sampling", failures)
    mine, theirs = Fused(decoder), reference(decoder)
    tokens = [runner.generate([[5, 6, 7]], 6) for runner in (mine, theirs)]
    assert tokens[0] == tokens[1]
    assert mine.passes[2:] == [ReplayedPass] * 4
    (program,) = mine.runner._programs._captured.values()
    assert program.samples(GREEDY) is (failures == 1)
    assert caplog.text.count("their sampling kernels run without one") == (failures == 2)
    assert not mine.runner.wants_graphs


@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "drawn"])
def test_rows_under_masks_that_change_are_replayed_beside_others(
    decoder, temperature: float
) -> None:
    guided = SamplingParams(
        temperature=temperature, structured_outputs=StructuredOutputs(regex="a")
    )

    def tokens(runner: DirectRunner) -> list:
        draw = torch.Generator().manual_seed(1)
        words = -(-decoder.config.vocab_size // 32)
        masks = torch.zeros(3, words, dtype=torch.int32, pin_memory=decoder.device.type == "cuda")
        runner.runner.use_masks(masks)
        bindings = [runner.submit(0, [5, 6, 7], guided), runner.submit(1, [8, 9], DRAW)]
        found = []
        for turn in range(8):
            slot = turn % 3
            masks[slot] = torch.randint(-(2**31), 2**31, (words,), generator=draw).int()
            how = {"masks": {0: slot}, "is_staged": turn in (3, 5, 6)}
            sampled = in_order(runner.iterate([0, 1], bindings=bindings, **how)[0])
            (word, bit) = divmod(sampled[0].token, 32)
            assert masks[slot, word] >> bit & 1, "not allowed by its mask"
            found.append(sampled)
            bindings = []
        return found

    mine = Fused(decoder)
    same(tokens(mine), tokens(reference(decoder)))
    for program in mine.runner._programs._captured.values():
        assert program.samples(Needs(draws=True, masks=True))
    assert mine.passes.count(ReplayedPass) == 5


@pytest.mark.parametrize("streams", [False, True])
def test_what_most_sampling_needs_is_captured_at_the_start(decoder, monkeypatch, streams) -> None:
    """Staged iterations too, from kernels that have run by then: each shape's layers run once."""
    layer_runs: list[bool] = []
    recorded = decode_program.capture

    def capture(pieces, pool, **how):
        if "have_run" in how:
            layer_runs.append(not how["have_run"])
        return recorded(pieces, pool, **how)

    monkeypatch.setattr(decode_program, "capture", capture)
    one = Fused(decoder, streams=streams)
    one.runner.warm_up()
    captured = one.runner._programs._captured
    assert {key[2] for key in captured} == ({False, True} if streams else {False})
    assert sum(layer_runs) == len({key[:2] for key in captured})
    assert all(set(program._samplings) == {GREEDY, DRAWN} for program in captured.values())
    same(serve_alike(one, PLAIN), serve_alike(reference(decoder), PLAIN))
    # Prompts are launched, and where staged iterations have no graphs from the start so are those.
    assert one.passes.count(ReplayedPass) == (6 if streams else 3)
    one.passes.clear()
    same(serve_alike(one, DRAW), serve_alike(reference(decoder), DRAW))
    assert one.passes.count(ReplayedPass) == 6


def test_a_launched_iteration_keeps_no_activations_until_it_is_over(decoder) -> None:
    """The next one is launched meanwhile."""
    one = Fused(decoder)
    bindings = [one.submit(0, [5] * 30)]
    row, tables = one.row(0)
    command = RunIteration(iteration=0, rows=(row,), bindings=tuple(bindings), tables=tuple(tables))
    forward = one.runner.begin(command)
    hidden = weakref.ref(forward._hidden)
    for layers in one._groups:
        one.runner.run_layers(forward, layers)
    one.runner.sample(forward)
    assert hidden() is None
    assert not any(isinstance(each, torch.Tensor) for each in vars(forward).values())


def test_a_closed_runner_holds_no_weights(decoder) -> None:
    one = Fused(decoder)
    one.generate([[5, 6, 7]], 4)
    model = weakref.ref(one.runner._model)
    one.runner.close()
    gc.collect()
    assert model() is None
    assert one.runner.graph_bytes == 0


@pytest.mark.parametrize("sampling", [WIDEST, COUNTED], ids=["widest", "counted"])
def test_rows_sampled_in_parts_are_those_sampled_together(decoder, monkeypatch, sampling) -> None:
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12]]

    def reports(rows_at_once: int) -> list:
        monkeypatch.setattr(fused_model, "_ROWS_AT_ONCE", rows_at_once)
        one = Fused(decoder)
        bindings = [one.submit(lane, each, sampling) for lane, each in enumerate(prompts)]
        found = [in_order(one.iterate(range(3), bindings=bindings)[0])]
        return found + [in_order(one.iterate(range(3))[0]) for _ in range(3)]

    assert reports(2) == reports(64)


# --- profiling ----------------------------------------------------------------------------------


def test_the_largest_iteration_has_all_tokens_in_as_many_rows_as_can_be() -> None:
    command = largest_iteration(100, WIDEST, lanes=8, longest=40)
    lengths = [row.num_tokens for row in command.rows]
    assert lengths == [40, 40, 15, 1, 1, 1, 1, 1]
    assert all(row.is_sampled for row in command.rows)
    assert [binding.prompt_len for binding in command.bindings] == lengths
    few = largest_iteration(100, WIDEST, lanes=2, longest=40)
    assert sum(row.num_tokens for row in few.rows) == 80
    one_each = largest_iteration(3, PLAIN, lanes=8, longest=40)
    assert [row.num_tokens for row in one_each.rows] == [1, 1, 1]


def test_the_longest_prompt_has_positions_in_the_model() -> None:
    for longest, block_tokens in [(1, 16), (16, 16), (17, 16), (2048, 16), (2047, 16)]:
        max_blocks = -(-longest // block_tokens) + 1
        assert 1 <= longest_prompt(max_blocks, block_tokens) <= longest


@pytest.mark.parametrize("sampling", [PLAIN, WIDEST], ids=["plain", "widest"])
def test_profiling_runs_every_part_of_an_iteration(decoder, sampling) -> None:
    """And leaves a runner whose later tokens are right, for slot 0 is written anew."""
    mine, theirs = Fused(decoder), reference(decoder)
    assert (mine.runner.profile(30, sampling) > 0) is mine.kv[0].is_cuda
    assert mine.kv[0][0].isnan().sum() < mine.kv[0][1].isnan().sum()
    assert mine.kv[0][1:].isnan().all(), "something but slot 0 was written"
    assert mine.generate([[5, 6, 7]], 4) == theirs.generate([[5, 6, 7]], 4)


def test_a_runner_of_the_smallest_sizes_warms_up(decoder) -> None:
    config = decoder.config
    kv = [
        torch.zeros(4, 2, config.kv_heads, 16, config.head_dim, device=decoder.device)
        for _ in range(config.num_layers)
    ]
    layout = KvLayout(
        num_layers=config.num_layers,
        block_tokens=16,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        item_bytes=4,
        num_groups=config.num_layers,
        ring_depth=2,
    )
    runner = FusedRunner(decoder, kv, layout, lanes=1, max_blocks=2, max_tokens=1)
    runner.warm_up()
    assert runner.graph_bytes > 0
    runner.close()
