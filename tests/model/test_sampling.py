from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reference_sampler import edited_logits, next_token

from pie_async.ids import Lane, SequenceId
from pie_async.messages import LaneBinding
from pie_async.model.sampling import LaneSampler, Needs, token_logprobs
from pie_async.sampling_params import SamplingParams

VOCAB = 300
CPU = torch.device("cpu")


class Sequenced:
    """One sequence under test: what it was bound with and what it has sampled."""

    def __init__(self, params: SamplingParams, seed: int, prompt: Sequence[int]) -> None:
        self.params = params
        self.seed = seed
        self.prompt = list(prompt)
        self.output: list[int] = []
        self.stop_ids = (0, 7)

    def binding(self, lane: int) -> LaneBinding:
        history = (*self.prompt, *self.output) if self.params.counts_tokens else ()
        return LaneBinding(
            lane=Lane(lane),
            sequence=SequenceId(lane),
            sampling=self.params,
            seed=self.seed,
            stop_ids=self.stop_ids,
            prompt_len=len(self.prompt),
            history=history,
        )

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.output)

    def reference(self, logits: torch.Tensor) -> int:
        edited = edited_logits(
            logits.tolist(), self.params, self.stop_ids, self.prompt, self.output
        )
        return next_token(edited, self.params, self.seed, self.position)


def sampler(lanes: int = 4, vocab_size: int = VOCAB) -> LaneSampler:
    return LaneSampler(lanes=lanes, vocab_size=vocab_size, device=CPU)


def sample(
    lane_sampler: LaneSampler,
    logits: torch.Tensor,
    lanes: Sequence[int],
    batch: Sequence[Sequenced],
) -> list[int]:
    """One call for these lanes; the sampled tokens join the sequences' outputs."""
    sampled = lane_sampler.sample(
        logits.clone(),
        torch.tensor(lanes),
        torch.tensor([sequence.position for sequence in batch]),
        lane_sampler.needs(lanes),
    )
    tokens: list[int] = sampled.tokens.tolist()
    for sequence, token in zip(batch, tokens, strict=True):
        sequence.output.append(token)
    return tokens


def sample_one(logits: Sequence[float], **options: Any) -> int:
    only = Sequenced(SamplingParams(**options), seed=3, prompt=[1, 2])
    lane_sampler = sampler(1, len(logits))
    only.stop_ids = (0,)
    lane_sampler.bind(only.binding(0))
    return sample(lane_sampler, torch.tensor([logits]), [0], [only])[0]


def random_params(rng: random.Random) -> SamplingParams:
    def maybe(name: str, value: Any) -> dict[str, Any]:
        return {name: value} if rng.random() < 0.4 else {}

    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7]),
        max_tokens=None,
        **maybe("top_k", rng.choice([1, 5, 40, VOCAB, 10 * VOCAB, -1])),
        **maybe("top_p", rng.choice([1e-9, 0.3, 0.9, 0.99, 1.0])),
        **maybe("min_p", rng.choice([0.01, 0.2, 1.0])),
        **maybe("presence_penalty", rng.uniform(-2, 2)),
        **maybe("frequency_penalty", rng.uniform(-2, 2)),
        **maybe("repetition_penalty", rng.uniform(0.5, 2)),
        **maybe("min_tokens", rng.randrange(6)),
        **maybe(
            "logit_bias",
            {rng.randrange(VOCAB): rng.uniform(-20, 20) for _ in range(rng.randrange(1, 9))},
        ),
    )


def random_sequence(rng: random.Random) -> Sequenced:
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12))]
    return Sequenced(random_params(rng), seed=rng.randrange(-(2**63), 2**63), prompt=prompt)


def random_logits(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("seed", range(8))
def test_mixed_batches_agree_with_the_plain_reference(seed: int) -> None:
    rng = random.Random(seed)
    lanes = rng.sample(range(20), 12)
    batch = [random_sequence(rng) for _ in lanes]
    lane_sampler = sampler(20)
    for lane, sequence in zip(lanes, batch, strict=True):
        lane_sampler.bind(sequence.binding(lane))
    for step in range(8):
        logits = random_logits(len(batch), seed * 100 + step)
        expected = [sequence.reference(row) for sequence, row in zip(batch, logits, strict=True)]
        assert sample(lane_sampler, logits, lanes, batch) == expected


@pytest.mark.parametrize("seed", range(4))
def test_a_row_samples_the_same_alone_and_in_a_batch_of_32(seed: int) -> None:
    together = [random_sequence(random.Random(100 * seed + row)) for row in range(32)]
    alone = [random_sequence(random.Random(100 * seed + row)) for row in range(32)]
    crowd = sampler(32)
    singles = [sampler(1) for _ in alone]
    for row in range(32):
        crowd.bind(together[row].binding(row))
        singles[row].bind(alone[row].binding(0))
    for step in range(6):
        logits = random_logits(32, 1000 * seed + step)
        tokens = sample(crowd, logits, list(range(32)), together)
        assert tokens == [
            sample(singles[row], logits[row : row + 1], [0], [alone[row]])[0] for row in range(32)
        ]


def test_without_needs_everything_runs_with_the_same_result() -> None:
    batch = [random_sequence(random.Random(row)) for row in range(16)]
    narrow, wide = sampler(16), sampler(16)
    for lane, sequence in enumerate(batch):
        narrow.bind(sequence.binding(lane))
        wide.bind(sequence.binding(lane))
    lanes = torch.arange(8)
    positions = torch.tensor([sequence.position for sequence in batch[:8]])
    logits = random_logits(8, 5)
    expected = narrow.sample(logits.clone(), lanes, positions, narrow.needs(range(8)))
    assert wide.sample(logits.clone(), lanes, positions).tokens.tolist() == (
        expected.tokens.tolist()
    )


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999])
def test_long_nuclei_are_cut_like_short_ones(top_p: float) -> None:
    vocab_size = 2000
    flat = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(1)) * 0.3
    peaked = flat.clone()
    peaked[0, 77] = 9.0
    logits = torch.cat((flat, peaked))
    batch = [
        Sequenced(SamplingParams(top_p=top_p, max_tokens=None), seed=row, prompt=[1])
        for row in range(2)
    ]
    lane_sampler = sampler(2, vocab_size)
    for lane, sequence in enumerate(batch):
        lane_sampler.bind(sequence.binding(lane))
    for _ in range(40):
        expected = [sequence.reference(row) for sequence, row in zip(batch, logits, strict=True)]
        assert sample(lane_sampler, logits, [0, 1], batch) == expected


def test_a_resumed_sequence_goes_on_as_if_it_had_never_left() -> None:
    params = SamplingParams(
        presence_penalty=1.5, frequency_penalty=0.7, repetition_penalty=1.3, min_tokens=9
    )
    stayed, left = (Sequenced(params, seed=4, prompt=[5, 6, 6]) for _ in range(2))
    one, other = sampler(), sampler()
    one.bind(stayed.binding(0))
    other.bind(left.binding(0))
    for step in range(10):
        if step == 5:
            other.bind(left.binding(2))
        logits = random_logits(1, step)
        lane = 2 if step >= 5 else 0
        assert sample(other, logits, [lane], [left]) == sample(one, logits, [0], [stayed])


def test_a_lane_forgets_its_previous_sequence() -> None:
    busy = random_sequence(random.Random(1))
    busy.params = SamplingParams(
        temperature=1.0,
        presence_penalty=2.0,
        repetition_penalty=2.0,
        logit_bias={3: 100.0},
        min_tokens=5,
    )
    lane_sampler = sampler(1)
    lane_sampler.bind(busy.binding(0))
    sample(lane_sampler, random_logits(1, 0), [0], [busy])
    plain = Sequenced(SamplingParams(temperature=0.0), seed=0, prompt=[3])
    lane_sampler.bind(plain.binding(0))
    logits = random_logits(1, 1)
    assert sample(lane_sampler, logits, [0], [plain]) == [int(logits.argmax())]
    again = Sequenced(SamplingParams(temperature=0.0, presence_penalty=2.0), seed=0, prompt=[3, 4])
    lane_sampler.bind(again.binding(0))
    expected = again.reference(logits[0])
    assert sample(lane_sampler, logits, [0], [again]) == [expected]


def test_observed_prompt_tokens_count_for_repetition_only() -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0, presence_penalty=2.0)
    sequence = Sequenced(params, seed=0, prompt=[])
    lane_sampler = sampler(2, 4)
    sequence.stop_ids = ()
    lane_sampler.bind(sequence.binding(1))
    lane_sampler.observe(torch.tensor([1, 1]), torch.tensor([2, 2]))
    # 4 / 2 = 2 is still the largest; with a presence penalty it would be 0.
    assert sample(lane_sampler, torch.tensor([[1.0, 1.0, 4.0, 1.5]]), [1], [sequence]) == [2]
    # Now it is output too: 4 / 2 - 2 = 0.
    assert sample(lane_sampler, torch.tensor([[1.0, 1.0, 4.0, 1.5]]), [1], [sequence]) == [3]


def test_stop_ids_are_masked_until_min_tokens_exist() -> None:
    sequence = Sequenced(
        SamplingParams(temperature=0.0, min_tokens=3, max_tokens=9), seed=0, prompt=[1, 2]
    )
    lane_sampler = sampler(1)
    lane_sampler.bind(sequence.binding(0))
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 9] = 5.0, 4.0
    tokens = [sample(lane_sampler, logits, [0], [sequence])[0] for _ in range(5)]
    assert tokens == [9, 9, 9, 7, 7]


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": dict.fromkeys(range(8), -100.0)},
        {"logit_bias": dict.fromkeys(range(8), -100.0), "top_p": 0.5, "top_k": 3, "min_p": 0.1},
        {"top_p": 1e-12},
        {"top_k": 1},
        {"min_p": 1.0},
        {"temperature": 1e-30, "top_p": 0.9},
        {"temperature": 0.0, "top_p": 0.1, "top_k": 2},
    ],
)
def test_extreme_settings_still_choose_the_likeliest_or_a_likely_token(
    options: dict[str, Any],
) -> None:
    logits = [0.0, 1.0, 2.0, 30.0, 2.0, 1.0, 0.0, -5.0]
    assert sample_one(logits, **options) == 3


def test_top_k_beyond_the_vocabulary_keeps_everything() -> None:
    logits = [0.5] * 6
    assert sample_one(logits, top_k=1000, top_p=0.99) == sample_one(logits)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5, "top_k": 2}, {"temperature": 0.0}])
def test_masked_logits_are_never_chosen(options: dict[str, Any]) -> None:
    logits = [-math.inf] * 8
    logits[5] = -300.0
    assert sample_one(logits, **options) == 5


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5, "top_k": 2, "min_p": 0.1}])
def test_a_row_with_everything_masked_gives_some_token(options: dict[str, Any]) -> None:
    assert 0 <= sample_one([-math.inf] * 8, **options) < 8


def test_greedy_ties_go_to_the_first_token() -> None:
    assert sample_one([1.0, 3.0, 3.0, 3.0], temperature=0.0) == 1


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}])
def test_tokens_as_likely_as_the_last_one_kept_are_kept(options: dict[str, Any]) -> None:
    lane_sampler = sampler(1, 6)
    drawn = set()
    for seed in range(60):
        sequence = Sequenced(SamplingParams(**options), seed=seed, prompt=[])
        lane_sampler.bind(sequence.binding(0))
        drawn.update(
            sample(lane_sampler, torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0, -1.0]]), [0], [sequence])
        )
    assert drawn == {1, 3, 4}


def test_logprobs_are_of_the_raw_distribution() -> None:
    sequence = Sequenced(
        SamplingParams(temperature=0.0, logprobs=3, logit_bias={4: 50.0}), seed=0, prompt=[1]
    )
    lane_sampler = sampler(1)
    lane_sampler.bind(sequence.binding(0))
    logits = random_logits(1, 3)
    raw = logits.log_softmax(-1)
    sampled = lane_sampler.sample(logits, torch.tensor([0]), torch.tensor([1]))
    assert sampled.tokens.tolist() == [4]
    assert sampled.logprobs is not None
    assert sampled.logprobs.logprobs.tolist() == [raw[0, 4].item()]
    assert sampled.logprobs.ranks.tolist() == [1 + int((raw[0] > raw[0, 4]).sum())]
    assert torch.equal(sampled.logprobs.top_logprobs, raw.sort(descending=True).values[:, :3])
    assert torch.equal(raw.gather(1, sampled.logprobs.top_ids), sampled.logprobs.top_logprobs)


def test_logprobs_are_computed_only_when_asked_for() -> None:
    lane_sampler = sampler(2)
    plain = Sequenced(SamplingParams(), seed=0, prompt=[1])
    asking = Sequenced(SamplingParams(logprobs=0), seed=0, prompt=[1])
    lane_sampler.bind(plain.binding(0))
    lane_sampler.bind(asking.binding(1))
    one = torch.tensor([0]), torch.tensor([1])
    assert lane_sampler.sample(random_logits(1, 0), *one, lane_sampler.needs([0])).logprobs is None
    both = torch.tensor([0, 1]), torch.tensor([1, 1])
    logprobs = lane_sampler.sample(random_logits(2, 0), *both).logprobs
    assert logprobs is not None
    assert logprobs.top_ids.shape == (2, 0)


def test_prompt_logprobs_give_rank_and_leaders_of_each_target() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.0, -math.inf]])
    result = token_logprobs(logits, torch.tensor([1, 1]), 20)
    assert result.ranks.tolist() == [2, 1]
    assert result.logprobs.tolist() == pytest.approx([-1.40760596, -math.log(2)])
    assert result.top_ids[0].tolist() == [2, 1, 0]
    assert result.top_logprobs.shape == (2, 3)


def test_an_all_greedy_batch_needs_nothing() -> None:
    lane_sampler = sampler(3)
    greedy = SamplingParams(temperature=0.0, top_p=0.5, top_k=4, min_p=0.1)
    for lane, params in enumerate([greedy, greedy, SamplingParams(top_p=0.5)]):
        lane_sampler.bind(Sequenced(params, seed=0, prompt=[1]).binding(lane))
    assert lane_sampler.needs([0, 1]) == Needs()
    assert lane_sampler.needs([0, 2]) == Needs(draws=True, top_p=True)


def test_sequences_bound_together_sample_as_those_bound_one_by_one():
    """Whatever was in their lanes before."""
    before = [
        SamplingParams(temperature=1.0, logit_bias={3: 50.0}, repetition_penalty=2.0),
        SamplingParams(temperature=0.7, min_tokens=12, stop_token_ids=[1, 2]),
        SamplingParams(temperature=0.0),
    ]
    after = [
        SamplingParams(temperature=0.9, min_tokens=3, stop_token_ids=[4, 5, 6]),
        SamplingParams(temperature=1.2, logit_bias={7: 50.0}, min_tokens=6, frequency_penalty=1.0),
        SamplingParams(temperature=0.8, top_k=5),
    ]

    def bindings(wishes: list[SamplingParams]) -> list[LaneBinding]:
        sequences = [Sequenced(each, seed=lane, prompt=[9]) for lane, each in enumerate(wishes)]
        if wishes is after:
            sequences[1].stop_ids = ()  # it may sample 7 at once, unlike who was there before
        return [sequence.binding(lane) for lane, sequence in enumerate(sequences)]

    def tokens(lane_sampler: LaneSampler) -> list[list[int]]:
        draw = torch.Generator().manual_seed(5)
        found = []
        for position in range(1, 8):
            logits = 3 * torch.randn(3, VOCAB, generator=draw)
            positions = torch.full((3,), position)
            found.append(lane_sampler.sample(logits, torch.arange(3), positions).tokens.tolist())
        return found

    together, one_by_one, alone = sampler(), sampler(), sampler()
    for wishes in (before, after):
        together.bind(*bindings(wishes))
        for binding in bindings(wishes):
            one_by_one.bind(binding)
    alone.bind(*bindings(after))
    together.bind()  # nobody
    assert tokens(together) == tokens(one_by_one) == tokens(alone)
