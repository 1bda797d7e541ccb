from __future__ import annotations

import math

import pytest
import torch
from reference_sampler import distribution

from pie_async.ids import Lane, SequenceId
from pie_async.messages import LaneBinding
from pie_async.model.noise import gumbel_noise, seed_key, token_codes
from pie_async.model.sampling import LaneSampler
from pie_async.sampling_params import SamplingParams

CPU = torch.device("cpu")
DRAWS = 20_000


def chi_square_z(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """How many standard deviations the chi-square statistic is above what chance gives."""
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = expected.numel() - 1
    # Wilson and Hilferty's cube root makes it nearly normal.
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def keys(*seeds: int) -> torch.Tensor:
    return torch.tensor([seed_key(seed) for seed in seeds])


def draws_over_positions(seed: int, logits: torch.Tensor, count: int = DRAWS) -> torch.Tensor:
    positions = torch.arange(count)
    noise = gumbel_noise(keys(seed).expand(count), positions, token_codes(len(logits), CPU))
    return (logits + noise).argmax(-1)


def draws_over_seeds(position: int, logits: torch.Tensor, first_seed: int = 0) -> torch.Tensor:
    noise = gumbel_noise(
        keys(*range(first_seed, first_seed + DRAWS)),
        torch.full((DRAWS,), position),
        token_codes(len(logits), CPU),
    )
    return (logits + noise).argmax(-1)


LOGITS = torch.linspace(2.0, -3.0, 23)
EXPECTED = LOGITS.double().softmax(-1) * DRAWS


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 12345])
def test_positions_of_one_seed_draw_from_the_distribution(seed: int) -> None:
    counts = draws_over_positions(seed, LOGITS).bincount(minlength=len(LOGITS))
    assert abs(chi_square_z(counts, EXPECTED)) < 4.5


@pytest.mark.parametrize("position", [0, 1, 77, 100_000])
def test_neighbouring_seeds_draw_from_the_distribution(position: int) -> None:
    counts = draws_over_seeds(position, LOGITS).bincount(minlength=len(LOGITS))
    assert abs(chi_square_z(counts, EXPECTED)) < 4.5


def pair_z(first: torch.Tensor, second: torch.Tensor, size: int) -> float:
    pairs = (first * size + second).bincount(minlength=size * size)
    return chi_square_z(pairs, torch.full((size * size,), first.numel() / size**2))


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    flat = torch.zeros(12)
    by_position = draws_over_positions(7, flat)
    assert abs(pair_z(by_position[:-1], by_position[1:], 12)) < 4.5
    assert abs(pair_z(by_position[:-16], by_position[16:], 12)) < 4.5
    other_seed = draws_over_positions(8, flat)
    assert abs(pair_z(by_position, other_seed, 12)) < 4.5
    assert abs(pair_z(by_position[1:], other_seed[:-1], 12)) < 4.5
    here, next_position = draws_over_seeds(5, flat), draws_over_seeds(6, flat)
    assert abs(pair_z(here, next_position, 12)) < 4.5


def test_noise_of_neighbouring_tokens_is_independent_and_gumbel() -> None:
    noise = gumbel_noise(keys(*range(64)), torch.arange(64), token_codes(8192, CPU)).double()
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    uniform = torch.exp(-torch.exp(-noise))
    counts = (uniform * 1000).long().clamp(max=999).flatten().bincount(minlength=1000)
    assert abs(chi_square_z(counts, torch.full((1000,), noise.numel() / 1000.0))) < 4.5
    for lag in (1, 2, 64, 4096):
        cells = (uniform * 16).long().clamp(max=15)
        assert abs(pair_z(cells[:, :-lag].flatten(), cells[:, lag:].flatten(), 16)) < 4.5


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    logits = torch.zeros(2)
    logits[1] = math.log(1e-3)
    hits = int(draws_over_positions(3, logits, count=400_000).sum())
    expected = 400_000 * 1e-3 / (1 + 1e-3)
    assert abs(hits - expected) < 4.5 * math.sqrt(expected)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6, top_p=0.9),
        SamplingParams(temperature=1.6, top_k=9),
        SamplingParams(temperature=1.2, min_p=0.05, top_p=0.97, top_k=20),
    ],
)
def test_sampled_frequencies_match_the_exact_distribution(params: SamplingParams) -> None:
    lane_sampler = LaneSampler(lanes=DRAWS, vocab_size=len(LOGITS), device=CPU)
    for lane in range(DRAWS):
        lane_sampler.bind(
            LaneBinding(
                lane=Lane(lane),
                sequence=SequenceId(lane),
                sampling=params,
                seed=lane,
                stop_ids=(),
                prompt_len=0,
            )
        )
    tokens = lane_sampler.sample(
        LOGITS.repeat(DRAWS, 1), torch.arange(DRAWS), torch.arange(DRAWS) % 50
    ).tokens
    exact = torch.tensor(distribution(LOGITS.tolist(), params))
    counts = tokens.bincount(minlength=len(LOGITS))
    assert counts[exact == 0].sum() == 0
    kept = exact > 0
    assert abs(chi_square_z(counts[kept], exact[kept] * DRAWS)) < 4.5


def test_noise_of_an_entry_depends_on_nothing_else() -> None:
    codes = token_codes(500, CPU)
    block = gumbel_noise(keys(*range(9)), torch.arange(9), codes)
    single = gumbel_noise(keys(4), torch.tensor([4]), codes)
    assert torch.equal(block[4], single[0])
    assert torch.equal(
        gumbel_noise(keys(4), torch.tensor([4]), token_codes(100, CPU))[0], single[0, :100]
    )
