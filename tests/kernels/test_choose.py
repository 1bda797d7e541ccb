"""Choosing tokens against plain torch, and the noise against `model/noise.py`."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from pie_async.cuda.kernels import sampling
from pie_async.cuda.kernels.sampling import choose, choose_reference
from pie_async.model import noise as noise_module
from pie_async.model.noise import seed_key, token_codes

INF, NAN = torch.inf, torch.nan
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def drawing(rows: int, vocab: int, device: torch.device, temperature=None) -> dict:
    """Random keyword arguments of `choose`; a third of the rows greedy."""
    if temperature is None:
        temperature = 2.0 * torch.rand(rows, device=device)
        temperature[::3] = 0.0
    return {
        "temperature": temperature,
        "keys": torch.tensor([seed_key(7 * row - 3) for row in range(rows)], device=device),
        "positions": torch.randint(2**20, (rows,), dtype=torch.int32, device=device),
        "codes": token_codes(vocab, device),
    }


@dtypes
@pytest.mark.parametrize(
    ("rows", "vocab", "apart"), [(1, 1, 0), (1, 5000, 0), (3, 999, 25), (9, 20000, 0), (10, 33, 1)]
)
def test_greedy(rows, vocab, apart, dtype, device) -> None:
    logits = torch.randn(rows, vocab + apart, device=device).to(dtype)[:, :vocab]
    actual = choose(logits, temperature=None)
    assert actual.dtype == torch.int64
    assert torch.equal(actual, choose_reference(logits, temperature=None))


@dtypes
@pytest.mark.parametrize(("rows", "vocab"), [(1, 3000), (6, 1500), (9, 4500)])
def test_drawn(rows, vocab, dtype, device) -> None:
    logits = (3.0 * torch.randn(rows, vocab, device=device)).to(dtype)
    how = drawing(rows, vocab, device)
    actual = choose(logits, **how)
    assert torch.equal(actual, choose_reference(logits, **how))
    greedy = choose(logits, temperature=None)
    assert torch.equal(actual[::3], greedy[::3])


@dtypes
@pytest.mark.parametrize(("rows", "vocab"), [(1, 3000), (6, 1500), (9, 4500), (12, 33)])
@pytest.mark.parametrize("draws", [False, True])
def test_under_masks(rows, vocab, draws, dtype, device) -> None:
    """A third of the rows has none; a bit beyond the vocabulary lets nothing be taken."""
    logits = (3.0 * torch.randn(rows, vocab, device=device)).to(dtype)
    how = drawing(rows, vocab, device) if draws else {"temperature": None}
    words = -(-vocab // 32)
    masks = torch.randint(-(2**31), 2**31, (2 * rows, words + 1), device=device).to(torch.int32)
    masks[:, :-1] &= masks[:, 1:]  # few are allowed
    slots = torch.randperm(2 * rows, device=device)[:rows]
    slots[1::3] = -1
    how |= {"masks": masks, "slots": slots}
    actual = choose(logits, **how)
    assert torch.equal(actual, choose_reference(logits, **how))
    for row, (token, slot) in enumerate(zip(actual.tolist(), slots.tolist(), strict=True)):
        word = int(masks[slot, token >> 5])
        assert slot < 0 or word >> (token & 31) & 1, f"row {row} took what its mask forbids"


def test_some_draws_differ_from_greedy(device) -> None:
    logits = torch.randn(8, 700, device=device)
    how = drawing(8, 700, device, torch.full((8,), 1.5, device=device))
    assert not torch.equal(choose(logits, **how), choose(logits, temperature=None))


@pytest.mark.parametrize("rows", [1, 9], ids=["small-chunks", "large-chunks"])
@pytest.mark.parametrize(
    ("at", "expected"),
    [
        pytest.param({}, 0, id="all equal"),
        pytest.param({4097: 1.0, 17: 1.0, 8000: 1.0}, 17, id="first of equals"),
        pytest.param({1023: 1.0, 1024: 1.0}, 1023, id="across chunks"),
        pytest.param({5: NAN, 6000: 0.5, 7000: NAN}, 6000, id="NaN loses"),
        pytest.param({3: INF, 9: INF, 2: NAN}, 3, id="infinite"),
        pytest.param({8191: 3.0}, 8191, id="last"),
    ],
)
def test_special_values(at, expected, rows, device) -> None:
    logits = torch.full((rows, 8192), -1.0, device=device)
    for token, value in at.items():
        logits[-1, token] = value
    assert choose(logits, temperature=None)[-1] == expected
    assert choose_reference(logits, temperature=None)[-1] == expected


@pytest.mark.parametrize("fill", [-INF, NAN, 0.0, INF])
@pytest.mark.parametrize("vocab", [1000, 1024, 5000])
def test_rows_of_one_value(fill, vocab, device) -> None:
    logits = torch.full((2, vocab), fill, device=device)
    assert choose(logits, temperature=None).tolist() == [0, 0]


def test_cut_tokens_are_never_drawn(device) -> None:
    logits = torch.full((4, 3000), -INF, device=device)
    logits[:, 2500] = NAN
    logits[range(4), [7, 1024, 2999, 0]] = torch.tensor([-50.0, 0.0, -1e30, 3.0], device=device)
    how = drawing(4, 3000, device, torch.full((4,), 2.0, device=device))
    assert choose(logits, **how).tolist() == [7, 1024, 2999, 0]
    logits = torch.full((1, 3000), -INF, device=device)
    how = drawing(1, 3000, device, torch.ones(1, device=device))
    assert choose(logits, **how).tolist() == [0]


def test_zeros_of_either_sign_are_equal(device) -> None:
    logits = torch.full((1, 3000), -1.0, device=device)
    logits[0, 100], logits[0, 2000] = -0.0, 0.0
    assert choose(logits, temperature=None).tolist() == [100]


def test_no_rows(device) -> None:
    logits = torch.empty(0, 50, device=device)
    assert choose(logits, temperature=None).shape == (0,)


@triton.jit
def _noise_kernel(words, codes, noise, block: tl.constexpr):
    ids = tl.arange(0, block)
    code = tl.load(codes + ids).to(tl.uint32, bitcast=True)
    row_words = tl.load(words).to(tl.uint64, bitcast=True)
    tl.store(noise + ids, sampling._gumbel(code, row_words))


@triton.jit
def _words_kernel(keys, positions, words, block: tl.constexpr):
    rows = tl.arange(0, block)
    mixed = sampling._mix64(tl.load(keys + rows), tl.load(positions + rows))
    tl.store(words + rows, mixed.to(tl.int64, bitcast=True))


def noise_of(words: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    noise = torch.empty(len(codes), device=codes.device)
    _noise_kernel[(1,)](words, codes, noise, len(codes))
    return noise


def test_row_words_are_the_models_to_the_bit(device) -> None:
    keys = torch.tensor([seed_key(seed * 2**57 - 3) for seed in range(64)], device=device)
    positions = torch.randint(2**40, (64,), device=device)
    words = torch.empty_like(keys)
    _words_kernel[(1,)](keys, positions, words, 64)
    assert torch.equal(words, noise_module._mix64(keys, positions))


@pytest.mark.parametrize("seed", [0, 1, -5, 2**63])
def test_noise_is_the_models(seed, device) -> None:
    key, position = torch.tensor([[seed_key(seed)], [17]], device=device)
    codes = token_codes(4096, device)
    noise = noise_of(noise_module._mix64(key, position), codes)
    expected = noise_module.gumbel_noise(key, position, codes)[0]
    torch.testing.assert_close(noise, expected, rtol=5e-7, atol=5e-7)


def code_for(bits: int) -> int:
    """The token code that a row with words 0 hashes to these bits: `gumbel_noise` backwards."""
    for shift, factor in ((16, 0x846CA68B), (15, 0x7FEB352D)):
        undone = bits
        for _ in range(2):  # two rounds recover what a shift by 15 or 16 mixed in
            undone = bits ^ (undone >> shift)
        bits = undone * pow(factor, -1, 2**32) % 2**32
    return bits - 2**32 if bits >= 2**31 else bits


def test_noise_over_its_whole_range(device) -> None:
    powers = [2**exponent for exponent in range(31)]
    ends = [n + step for n in powers for step in (-1, 0, 1)] + [0, 2**31 - 1, 2**31 - 65]
    bits = (ends + torch.randint(2**31, (1024,)).tolist())[:1024]
    codes = torch.tensor([code_for(each) for each in bits], dtype=torch.int32, device=device)
    noise = noise_of(torch.zeros(1, dtype=torch.int64, device=device), codes)
    uniform = ((torch.tensor(bits).float() + 0.5) * 2.0**-31).clamp(max=1.0 - 2.0**-24).double()
    expected = -torch.log(-torch.log1p(-uniform))
    torch.testing.assert_close(noise.double().cpu(), expected, rtol=3e-7, atol=3e-7)
