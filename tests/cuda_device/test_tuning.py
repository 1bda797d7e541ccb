"""What the tuner chooses and remembers, with a timer that stands in for the card's."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from pie_async.cuda import choice_file
from pie_async.cuda.kernels.linear import TORCH

tuning = pytest.importorskip("pie_async.cuda.tuning", reason="Triton is not published here")

FAST, SLOW, BROKEN, WRONG = ("rows", 4), ("rows", 8), ("rows", 16), ("rows", 32)
WEIGHT = torch.randn(24, 16).to(torch.bfloat16)


class Bench:
    """Times by choice, and what was asked for."""

    def __init__(self, monkeypatch, path, **seconds: float) -> None:
        self.seconds = {"torch": 1.0, "fast": 0.5, "slow": 1.5, **seconds}
        self.runs: list[str] = []
        self.path = path
        self._running = ""
        monkeypatch.setattr(tuning, "linear", self.linear)

    def tuner(self, *, machine: str = "card A"):
        return tuning.Tuner(
            self.path, machine=machine, timer=self.time, propose=lambda *_: list(NAMES)
        )

    def linear(self, x, weight, bias=None, *, choice=TORCH):
        self._running = NAMES[choice]
        if choice == BROKEN:
            raise RuntimeError("out of shared memory")
        product = torch.nn.functional.linear(x, weight, bias)
        return product + 1 if choice == WRONG else product

    def time(self, run, weights) -> float:
        run(weights[0])
        self.runs.append(self._running)
        return self.seconds[self._running]


NAMES = {TORCH: "torch", FAST: "fast", SLOW: "slow", BROKEN: "broken", WRONG: "wrong"}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    return Bench(monkeypatch, tmp_path / "some" / "tuning.json")


def test_the_fastest_that_works_and_is_right_is_chosen(bench) -> None:
    assert bench.tuner().choose(WEIGHT, 3) == FAST
    assert bench.runs == ["torch", "fast", "slow"]


@pytest.mark.parametrize(("seconds", "choice"), [(0.98, TORCH), (0.96, FAST)])
def test_torch_is_replaced_for_three_percent(bench, seconds, choice) -> None:
    bench.seconds["fast"] = seconds
    assert bench.tuner().choose(WEIGHT, 3) == choice


def test_a_shape_is_measured_once_per_bucket(bench) -> None:
    tuner = bench.tuner()
    tuner.prepare([WEIGHT, WEIGHT.clone()], tokens=[3, 4, 4, 500])
    assert len(bench.runs) == 3
    tuner.choose(WEIGHT, 5)
    assert len(bench.runs) == 6


def test_what_is_not_known_is_torchs_and_not_measured(bench) -> None:
    tuner = bench.tuner()
    assert tuner.known(WEIGHT, 3) == TORCH
    tuner(torch.randn(3, 16).to(torch.bfloat16), WEIGHT)
    tuner.choose(WEIGHT, 3)
    assert tuner.known(WEIGHT, 4) == FAST
    assert tuner.known(WEIGHT, 5) == TORCH
    assert len(bench.runs) == 3


def test_calling_the_tuner_multiplies_by_the_choice(bench) -> None:
    tuner = bench.tuner()
    tuner.choose(WEIGHT, 3)
    x = torch.randn(3, 16).to(torch.bfloat16)
    assert torch.equal(tuner(x, WEIGHT), torch.nn.functional.linear(x, WEIGHT))
    assert bench._running == "fast"


@pytest.mark.parametrize(
    ("weight", "m"), [(WEIGHT.float(), 3), (WEIGHT, 0), (WEIGHT, 257), (WEIGHT, 8192)]
)
def test_other_dtypes_and_many_tokens_are_torchs_without_measuring(bench, weight, m) -> None:
    assert bench.tuner().choose(weight, m) == TORCH
    assert not bench.runs


def test_choices_are_read_back_by_the_next_engine(bench) -> None:
    bench.tuner().choose(WEIGHT, 3)
    again = bench.tuner()
    assert again.choose(WEIGHT, 3) == FAST
    assert again.known(WEIGHT, 3) == FAST
    assert len(bench.runs) == 3


def test_choices_of_another_machine_are_kept_and_not_used(bench) -> None:
    bench.tuner().choose(WEIGHT, 3)
    bench.seconds["fast"] = 2.0
    assert bench.tuner(machine="card B").choose(WEIGHT, 3) == TORCH
    assert bench.tuner().choose(WEIGHT, 3) == FAST


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"version": 1, "machines": [3]}',
        '{"version": 1, "machines": {"card A": 3}}',
        '{"version": 1, "machines": {"card A": {"key": 3}}}',
    ],
)
def test_a_damaged_file_costs_one_line_and_is_replaced(bench, content, caplog) -> None:
    bench.path.parent.mkdir()
    bench.path.write_text(content)
    tuner = bench.tuner()
    assert tuner.choose(WEIGHT, 3) == FAST
    assert tuner.choose(WEIGHT, 9) == FAST
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(bench.path) in caplog.text
    assert len(json.loads(bench.path.read_bytes())["machines"]["card A"]) == 2


def test_a_file_of_another_version_is_replaced(bench, caplog) -> None:
    bench.path.parent.mkdir()
    bench.path.write_text('{"version": 0, "machines": {"card A": 3}}')
    assert bench.tuner().choose(WEIGHT, 3) == FAST
    assert not caplog.records
    assert bench.tuner().choose(WEIGHT, 3) == FAST
    assert len(bench.runs) == 3


def test_an_unwritable_place_costs_one_line(bench, caplog) -> None:
    bench.path.parent.write_text("a file where the directory should be")
    tuner = bench.tuner()
    assert tuner.choose(WEIGHT, 3) == FAST
    assert tuner.choose(WEIGHT, 9) == FAST
    assert len(caplog.records) == 1


def test_the_cache_is_where_the_user_wants_caches(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choice_file.default_path() == tmp_path / "pie_async" / "tuning.json"


def test_fp8_weights_have_candidates_and_defaults_of_their_own(monkeypatch, tmp_path) -> None:
    weight, x = WEIGHT.to(torch.float8_e4m3fn), torch.randn(3, 16).to(torch.bfloat16)
    scale = torch.rand(24)
    ran = []

    def linear_fp8(x, weight, scale, bias=None, *, choice):
        ran.append(choice)
        return torch.nn.functional.linear(x, weight.to(x.dtype) * scale.to(x.dtype)[:, None])

    monkeypatch.setattr(tuning, "linear_fp8", linear_fp8)
    for quantizes, default in ((True, tuning.SCALED), (False, tuning.WIDENED)):
        tuner = tuning.Tuner(
            tmp_path / "tuning.json",
            machine="card A",
            quantizes_activations=quantizes,
            timer=lambda run, weights: float(ran[-1][0] != "split"),
        )
        tuner(x, weight, None, scale)
        assert ran[-1] == default
        assert tuner.choose(weight, 3)[0] == "split"
        tuner(x, weight, None, scale)
        assert ran[-1][0] == "split"
        assert tuner.choose(weight, 1000) == default


@pytest.mark.gpu
def test_measuring_on_the_card_finds_a_choice_no_slower_than_torch(tmp_path) -> None:
    weight = torch.randn(4096, 4096, device="cuda").to(torch.bfloat16)
    tuner = tuning.Tuner(tmp_path / "tuning.json")
    tuner.prepare([weight], tokens=[1, 64])
    for m in (1, 64):
        x = torch.randn(m, 4096, device="cuda").to(torch.bfloat16)
        expected = torch.nn.functional.linear(x, weight).float()
        assert (tuner(x, weight).float() - expected).norm() < 0.01 * expected.norm()
    assert tuning.Tuner(tmp_path / "tuning.json").choose(weight, 64) == tuner.choose(weight, 64)
