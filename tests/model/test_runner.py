"""What a ModelRunner reports: tokens, logprobs, scores of prompts fed in chunks."""

from __future__ import annotations

import pytest
import torch

from pie_async.messages import Row, RunIteration, decode, encode
from pie_async.model.config import read_config
from pie_async.model.weights import load_model
from pie_async.sampling_params import SamplingParams
from tests.support.checkpoints import greedy, write_checkpoint
from tests.support.direct_runner import GREEDY, DirectRunner

CPU = torch.device("cpu")
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]
SCORED = SamplingParams(temperature=0.0, prompt_logprobs=2)


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("runner"), "qwen3")
    path = checkpoint.path
    return load_model(path, read_config(path), torch.float32, CPU), checkpoint.model


def expected_logprobs(model, prompt):
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)


def scores_in_chunks(runner, chunks, *, lane=0):
    """Feed the prompt in chunks of these sizes; all scored (position, token) pairs in order."""
    binding = runner.submit(lane, PROMPT, SCORED)
    entries = []
    for number, chunk in enumerate(chunks):
        _, scores = runner.iterate([lane], bindings=[] if number else [binding], chunk=chunk)
        for entry in scores:
            entries += enumerate(entry.tokens, entry.first)
    return entries


@pytest.mark.parametrize("chunks", [[11], [1] * 11, [4, 4, 4], [10, 1], [1, 10]], ids=str)
def test_every_prompt_token_but_the_first_is_scored_across_chunk_borders(peer, chunks):
    decoder, model = peer
    entries = scores_in_chunks(DirectRunner(decoder), chunks)
    assert [position for position, _ in entries] == list(range(1, len(PROMPT)))
    logprobs = expected_logprobs(model, PROMPT)
    for position, score in entries:
        row = logprobs[position - 1]
        assert score.token == PROMPT[position]
        assert score.logprob == pytest.approx(float(row[score.token]), abs=1e-4)
        assert score.rank == int((row > row[score.token]).sum()) + 1
        assert [token for token, _ in score.top] == row.topk(2).indices.tolist()


def test_output_tokens_fed_again_are_not_scored_as_prompt(peer):
    """As when a preempted sequence is recomputed: its output is fed like a prompt."""
    decoder, _ = peer
    runner = DirectRunner(decoder)
    binding = runner.submit(0, PROMPT, SCORED)
    binding = type(binding)(
        lane=0, sequence=100, sampling=SCORED, seed=0, stop_ids=(), prompt_len=6
    )
    _, (entry,) = runner.iterate([0], bindings=[binding])
    assert (entry.first, len(entry.tokens)) == (1, 5)


def test_sequence_that_changes_lanes_between_chunks_is_scored_without_a_gap(peer):
    decoder, _ = peer
    whole = scores_in_chunks(DirectRunner(decoder), [11])
    runner = DirectRunner(decoder)
    binding = runner.submit(0, PROMPT, SCORED)
    _, first = runner.iterate([0], bindings=[binding], chunk=4)
    runner._running[5] = runner._running.pop(0)
    row, tables = runner.row(5)
    moved = type(binding)(
        lane=5, sequence=100, sampling=SCORED, seed=0, stop_ids=(), prompt_len=len(PROMPT)
    )
    slots = tuple(runner._running[5].slots)
    command = RunIteration(
        iteration=1,
        rows=(Row(100, 5, row.start, row.tokens, True),),
        bindings=(moved,),
        tables=(type(tables[0])(5, 0, slots),),
    )
    forward = runner.runner.begin(command)
    runner.runner.run_layers(forward, range(3))
    runner.runner.sample(forward)
    forward.collect()
    entries = [
        pair
        for entry in (*first, *forward.prompt_logprobs)
        for pair in enumerate(entry.tokens, entry.first)
    ]
    assert [position for position, _ in entries] == [position for position, _ in whole]
    for (_, score), (_, expected) in zip(entries, whole, strict=True):
        assert score.logprob == pytest.approx(expected.logprob, abs=1e-4)


def test_only_rows_that_asked_get_logprobs(peer):
    decoder, _ = peer
    runner = DirectRunner(decoder)
    asking = SamplingParams(temperature=0.0, logprobs=3)
    bindings = [runner.submit(lane, PROMPT, p) for lane, p in enumerate((GREEDY, asking))]
    (quiet, told), scores = runner.iterate([0, 1], bindings=bindings)
    assert scores == ()
    assert quiet.token == told.token
    assert (quiet.logprob, quiet.rank, quiet.top) == (0.0, 0, ())
    assert told.rank == 1
    assert len(told.top) == 3
    assert told.top[0] == (told.token, told.logprob)
    logprobs = runner.logits[1][0].log_softmax(-1)
    assert told.logprob == pytest.approx(float(logprobs[told.token]), abs=1e-5)


def test_reports_survive_the_wire(peer):
    decoder, _ = peer
    runner = DirectRunner(decoder)
    asking = SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1)
    sampled, scores = runner.iterate([0], bindings=[runner.submit(0, PROMPT, asking)])
    from pie_async.messages import IterationRan

    fact = IterationRan(
        iteration=0, sampled=sampled, prompt_logprobs=scores, compute_s=0.0, stall_s=0.0
    )
    assert decode(encode(fact)) == fact


def test_rows_in_any_order_are_told_apart_by_sequence(peer):
    """Decode rows are moved before prompts inside; tokens must not change owners."""
    decoder, model = peer
    runner = DirectRunner(decoder)
    prompts = [PROMPT, PROMPT[:3], PROMPT[4:]]
    expected = [greedy(model, prompt, 3)[0] for prompt in prompts]
    bindings = [runner.submit(lane, prompt) for lane, prompt in enumerate(prompts)]
    outputs = {100 + lane: [] for lane in range(3)}
    for number, lanes in enumerate([(1,), (0, 1), (2, 1, 0), (0, 2), (2,)]):
        wanted = [binding for binding in bindings if binding.lane in lanes] if number < 3 else []
        wanted = [binding for binding in wanted if not outputs[binding.sequence]]
        for token in runner.iterate(lanes, bindings=wanted)[0]:
            outputs[token.sequence].append(token.token)
    assert list(outputs.values()) == expected


def test_penalties_see_history_and_sampled_tokens(peer):
    decoder, model = peer
    runner = DirectRunner(decoder)
    params = SamplingParams(temperature=0.0, repetition_penalty=1.8)
    bindings = [runner.submit(0, PROMPT, params)]
    tokens = []
    for _ in range(4):
        (sampled,), _ = runner.iterate([0], bindings=bindings, chunk=None)
        bindings = []
        row = expected_logits(model, PROMPT + tokens)
        seen = torch.tensor(PROMPT + tokens)
        row[seen] = torch.where(row[seen] > 0, row[seen] / 1.8, row[seen] * 1.8)
        assert sampled.token == int(row.argmax())
        tokens.append(sampled.token)


def expected_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1].float()


def test_nothing_sampled_is_an_iteration_too(peer):
    decoder, _ = peer
    runner = DirectRunner(decoder)
    sampled, scores = runner.iterate([0], bindings=[runner.submit(0, PROMPT)], chunk=4)
    assert (sampled, scores) == ((), ())
