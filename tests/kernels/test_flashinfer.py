"""FlashInfer for prompts: its plans, when it is chosen, what happens when it fails.

Without a GPU a stand-in computes in its place; with one, and the package, its own kernels do.
"""

from __future__ import annotations

import importlib
import json
import logging
import random
import time

import pytest
import torch

from pie_async.assembly.on_cuda import check_attention
from pie_async.config import EngineConfig
from pie_async.core.layout import KvLayout
from pie_async.cuda import attention_choice, flashinfer_attention, fused_decoder
from pie_async.cuda.attention_choice import MEASURED, choose_attention, measure
from pie_async.cuda.choice_file import ChoiceFile
from pie_async.cuda.flashinfer_attention import FlashInferAttention, Heads, pays, refusal
from pie_async.cuda.fused_runner import FusedRunner
from pie_async.cuda.kernels.attention_reference import prefill_attention_reference
from pie_async.errors import ConfigError
from pie_async.model.config import config_of
from pie_async.model.decoder import Decoder
from pie_async.model.named_shapes import NAMED_SHAPES
from pie_async.model.random_weights import random_model
from tests.kernels.test_attention import Cache, assert_close, strided
from tests.support.direct_runner import DirectRunner
from tests.support.stand_in_flashinfer import StandIn

pytestmark = pytest.mark.filterwarnings("ignore")  # of a package that is not ours

CPU = torch.device("cpu")
SMALL = Heads(4, 2, 16, 4, torch.float32)
HEADS = Heads(32, 8, 128, 16, torch.bfloat16)
HOPPER, AMPERE = (9, 0), (8, 0)


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(3)
    torch.manual_seed(3)


@pytest.fixture
def package(monkeypatch) -> StandIn:
    """Installed, on a Hopper GPU."""
    stand_in = StandIn()
    stand_in.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: HOPPER)
    monkeypatch.setattr(attention_choice, "this_machine", lambda: "card A")
    return stand_in


@pytest.fixture
def missing(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: HOPPER)


@pytest.fixture
def heads(device, monkeypatch) -> Heads:
    """Of the package's kernels on a GPU, of a stand-in elsewhere."""
    if device.type == "cuda":
        pytest.importorskip("flashinfer", exc_type=ImportError)
        return HEADS
    StandIn().install(monkeypatch)
    return SMALL


def random_chunks(count: int, most: int) -> list[tuple[int, int]]:
    """Of (start, number of tokens)."""
    return [
        (
            random.choice([0, random.randrange(most)]),
            random.choice([2, 16, random.randint(2, most)]),
        )
        for _ in range(count)
    ]


class Iteration:
    """Chunks over poisoned KV, their queries between those of other tokens."""

    def __init__(self, heads: Heads, chunks: list[tuple[int, int]], device) -> None:
        self.cache = Cache(
            [start + num_tokens for start, num_tokens in chunks],
            kv_heads=heads.kv_heads,
            head_dim=heads.head_dim,
            block_tokens=heads.block_tokens,
            dtype=heads.dtype,
            device=device,
        )
        self.dtype = heads.dtype
        lanes = random.sample(range(len(chunks)), len(chunks))
        self.chunks = [(lane, chunks[lane][1], chunks[lane][0]) for lane in lanes]
        self.total = sum(num_tokens for _, num_tokens, _ in self.chunks)
        n, width = self.total + 5, heads.heads * heads.head_dim
        self.queries = torch.randn(n, heads.heads, heads.head_dim, dtype=heads.dtype, device=device)
        self.out = strided(n, width, heads.dtype, device)

    def attend(self, attention: FlashInferAttention) -> None:
        plan = attention.plan(self.chunks, self.cache.tables)
        assert plan.num_tokens == self.total
        tokens = slice(3, 3 + self.total)
        plan.run(self.queries[tokens], self.cache.kv, self.out[tokens])

    def check(self) -> None:
        rows, first = [], 3
        for lane, num_tokens, start in self.chunks:
            rows.append((lane, first, num_tokens, start))
            first += num_tokens
        expected = prefill_attention_reference(
            self.queries.double(), self.cache.kv.double(), self.cache.tables, rows, window=None
        )
        assert_close(self.out[3:first], expected[3:first], self.dtype)
        assert self.out[:3].isnan().all() and self.out[first:].isnan().all()


@pytest.mark.parametrize("count", [1, 2, 7])
def test_chunks_attend_as_the_reference(count, heads, device) -> None:
    attention = FlashInferAttention(heads, device)
    for most in (20, 70) if device.type == "cpu" else (20, 70, 300, 1500):
        iteration = Iteration(heads, random_chunks(count, most), device)
        iteration.attend(attention)
        iteration.check()


@pytest.mark.gpu
def test_plans_wait_for_nothing_and_none_disturbs_the_one_before_it(heads) -> None:
    """Two iterations are laid out and run while the GPU is busy with something else."""
    device = torch.device("cuda")
    attention = FlashInferAttention(HEADS, device)
    with torch.cuda.stream(torch.cuda.Stream()):
        Iteration(HEADS, random_chunks(5, 400), device).attend(attention)  # loads the kernels
        for _ in range(4):
            iterations = [Iteration(HEADS, random_chunks(5, 400), device) for _ in range(2)]
            torch.cuda.synchronize()
            torch.cuda._sleep(2**29)  # some 0.3 s
            began_s = time.perf_counter()
            for iteration in iterations:
                iteration.attend(attention)
            took_s = time.perf_counter() - began_s
            assert not torch.cuda.current_stream().query()
            torch.cuda.synchronize()
            assert took_s < 0.1
            for iteration in iterations:
                iteration.check()


def test_a_plan_says_which_blocks_each_chunk_sees(package) -> None:
    attention = FlashInferAttention(SMALL, CPU)
    tables = torch.arange(50, dtype=torch.int32).view(5, 10)
    attention.plan([(3, 6, 0), (0, 4, 4), (4, 9, 12)], tables)
    (plan,) = package.plans
    assert plan["tokens"] == [0, 6, 10, 19]
    assert plan["blocks"] == [0, 2, 4, 10]
    assert plan["in_last_block"] == [2, 4, 1]
    assert plan["slots"].tolist() == [30, 31, 0, 1, 40, 41, 42, 43, 44, 45]
    assert plan["slots"].dtype == torch.int32
    assert plan["shape"] == (4, 2, 16, 4)
    assert plan["options"] == {
        "causal": True,
        "q_data_type": torch.float32,
        "kv_data_type": torch.float32,
    }


def test_iterations_in_flight_have_plans_of_their_own(package) -> None:
    attention = FlashInferAttention(SMALL, CPU)
    tables = torch.zeros(2, 10, dtype=torch.int32)
    for _ in range(4):
        attention.plan([(0, 6, 0)], tables)
    wrappers = [plan["wrapper"] for plan in package.plans]
    assert wrappers[0] is wrappers[2] and wrappers[1] is wrappers[3]
    assert wrappers[0] is not wrappers[1]


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([], False),
        ([(0, 2048, 0)], True),
        ([(0, 1024, 0)], False),
        ([(lane, 1024, 0) for lane in range(8)], True),
        ([(0, 512, 8192)], True),
        ([(lane, 16, 4096) for lane in range(100)], False),
        ([(0, 64, 9000), (1, 3000, 0), (2, 33, 0)], True),
    ],
)
def test_only_long_rows_are_worth_a_plan(chunks, expected) -> None:
    assert pays(chunks) is expected


@pytest.mark.parametrize(
    ("changes", "capability", "says"),
    [
        ({}, AMPERE, "needs a Hopper GPU"),
        ({"dtype": torch.float32}, HOPPER, "float16 and bfloat16, not torch.float32"),
        ({"head_dim": 80}, HOPPER, "heads of 64, 128 and 256, not 80"),
    ],
)
def test_what_it_cannot_do_is_known_beforehand(package, changes, capability, says) -> None:
    assert refusal(HEADS, HOPPER) is None
    reason = refusal(HEADS._replace(**changes), capability)
    assert reason is not None and says in reason


class Timer:
    """Times by turn: Triton, FlashInfer, of one case after the other."""

    def __init__(self, *seconds: float) -> None:
        self._seconds = iter(seconds)

    def __call__(self, run, tensors) -> float:
        return next(self._seconds)


BF16 = Heads(4, 2, 64, 16, torch.bfloat16)


@pytest.fixture
def file(tmp_path, monkeypatch) -> ChoiceFile:
    # Without a GPU: so that measuring takes no time.
    monkeypatch.setattr(attention_choice, "MEASURED", [[(0, 20, 0)], [(0, 4, 30)]])
    return ChoiceFile(tmp_path / "tuning.json")


def choose(wanted="auto", heads=BF16, **how):
    return choose_attention(wanted, heads, CPU, **how)


@pytest.mark.parametrize(
    ("seconds", "choice"),
    [
        ((1.0, 0.5, 1.0, 0.9), "flashinfer"),
        ((1.0, 1.5, 1.0, 1.1), "triton"),
        ((1.0, 0.5, 1.0, 1.1), "triton"),
        ((1.0, 0.98, 1.0, 0.98), "triton"),
    ],
)
def test_the_faster_one_is_taken_and_remembered(
    package, file, seconds, choice, caplog, monkeypatch
) -> None:
    caplog.set_level(logging.INFO)
    assert choose(file=file, timer=Timer(*seconds)) == choice
    assert choose(file=file, timer=Timer()) == choice
    says = {"flashinfer": "FlashInfer 9.9", "triton": "Triton"}[choice]
    assert caplog.messages == [f"attention of prompts: {says}, measured faster on this card"] * 2
    package.install(monkeypatch, "10.0")
    assert choose(file=file, timer=Timer(1.0, 2.0, 1.0, 2.0)) == "triton"


def test_choices_of_products_are_kept_beside(package, file, tmp_path) -> None:
    file.write("card A", {"a product": ("lt", 3)})
    choose(file=file, timer=Timer(1.0, 0.5, 1.0, 0.5))
    machines = json.loads((tmp_path / "tuning.json").read_bytes())["machines"]
    assert machines["card A"] == {"a product": ["lt", 3]}
    ((key, choice),) = machines["card A, flashinfer 9.9"].items()
    assert "4 heads, 2 KV heads of 64, blocks of 16, torch.bfloat16" in key
    assert choice == ["flashinfer"]


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        ("plan", "RuntimeError: no room for the plan"),
        ("run", "RuntimeError: no kernel image is available"),
        ("result", "ArithmeticError: its result is wrong by"),
    ],
)
def test_a_package_that_does_not_work_costs_one_line(package, file, fails, says, caplog) -> None:
    package.fails = fails
    assert choose(file=file, timer=Timer()) == "triton"
    (line,) = caplog.messages
    assert says in line and "\n" not in line
    with pytest.raises(ConfigError, match=says) as caught:
        choose("flashinfer", file=file, timer=Timer())
    assert caught.value.option == "attention"


def test_without_the_package_nothing_is_said(missing, file, caplog) -> None:
    assert choose(file=file, timer=Timer()) == "triton"
    assert not caplog.messages


def test_what_is_wanted_is_taken_without_measuring(package, file) -> None:
    assert choose("flashinfer", file=file, timer=Timer()) == "flashinfer"
    assert choose("triton", file=file, timer=Timer()) == "triton"


LLAMA = {**NAMED_SHAPES["llama-3.1-8b"], "num_hidden_layers": 2}
MISTRAL = {**LLAMA, "model_type": "mistral", "rope_scaling": None, "sliding_window": 100}


@pytest.mark.parametrize(
    ("model", "dtype", "options", "says"),
    [
        (LLAMA, torch.float32, {}, "not torch.float32"),
        (LLAMA, torch.bfloat16, {"kernels": "torch"}, "kernels torch"),
        (MISTRAL, torch.bfloat16, {}, "within a window in every layer"),
    ],
)
def test_asking_for_it_in_vain_is_refused_before_loading(package, model, dtype, options, says):
    shape = config_of(model, "a model")
    config = EngineConfig(device="cuda", attention="flashinfer", **options)
    with pytest.raises(ConfigError, match=says) as caught:
        check_attention(config, shape, dtype)
    assert caught.value.option == "attention"
    check_attention(EngineConfig(device="cuda", **options), shape, dtype)


def test_asking_for_it_without_the_package_names_the_extra(missing) -> None:
    config = EngineConfig(device="cuda", attention="flashinfer")
    with pytest.raises(ConfigError, match=r"not installed; pip install 'pie-async\[flashinfer\]'"):
        check_attention(config, config_of(LLAMA, "a model"), torch.bfloat16)


def test_an_unknown_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match="auto, triton, flashinfer"):
        EngineConfig(attention="torch")


# --- the runner ------------------------------------------------------------------------------


@pytest.fixture
def any_length(monkeypatch) -> None:
    """Short rows are planned too."""
    monkeypatch.setattr(flashinfer_attention, "LEAST_PAIRS", 1)
    monkeypatch.setattr(flashinfer_attention, "LEAST_FILLED", 0)


PROMPTS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46], [7], list(range(2, 23))]
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
}


def runner_of(decoder: Decoder, *, uses_flashinfer: bool, block_tokens: int = 4) -> DirectRunner:
    def make_runner(decoder, kv, *, lanes, max_blocks, block_tokens):
        config = decoder.config
        layout = KvLayout(
            num_layers=config.num_layers, block_tokens=block_tokens, kv_heads=config.kv_heads,
            head_dim=config.head_dim, item_bytes=4, num_groups=config.num_layers, ring_depth=2,
        )  # fmt: skip
        return FusedRunner(
            decoder, kv, layout, lanes=lanes, max_blocks=max_blocks, max_tokens=1024,
            uses_graphs=False, uses_flashinfer=uses_flashinfer,
        )  # fmt: skip

    return DirectRunner(decoder, make_runner=make_runner, block_tokens=block_tokens)


@pytest.fixture
def tiny(monkeypatch) -> Decoder:
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled on this machine")
    for name in ("decoder", "layers"):  # what oneDNN packs, the kernels could not read
        module = importlib.import_module(f"pie_async.model.{name}")
        monkeypatch.setattr(module, "pack_linear", lambda weight, bias: None)
    return random_model(config_of({**LLAMA, **TINY}, "tiny"), torch.float32, CPU)


def test_the_runner_uses_it_for_prompts_alone(package, tiny, any_length) -> None:
    expected = runner_of(tiny, uses_flashinfer=False).generate(PROMPTS, 2, chunk=8)
    assert not package.plans
    assert runner_of(tiny, uses_flashinfer=True).generate(PROMPTS, 2, chunk=8) == expected
    # Chunks of 8 and 8 tokens, of 3 and 8, of 5: never rows of one token.
    assert [plan["tokens"] for plan in package.plans] == [[0, 8, 16], [0, 3, 11], [0, 5]]
    assert package.runs == [0, 0, 1, 1, 2, 2]


def test_an_iteration_that_streams_does_not_use_it(package, tiny, any_length) -> None:
    runner = runner_of(tiny, uses_flashinfer=True)
    bindings = [runner.submit(0, PROMPTS[0])]
    runner.iterate([0], bindings=bindings, chunk=5, is_staged=True)
    assert not package.plans
    runner.iterate([0], chunk=5)
    assert len(package.plans) == 1


def test_layers_with_a_window_do_not_use_it(package, tiny, any_length) -> None:
    windowed = config_of({**MISTRAL, **TINY, "sliding_window": 5}, "tiny")
    decoder = random_model(windowed, torch.float32, CPU)
    expected = runner_of(decoder, uses_flashinfer=False).generate(PROMPTS, 2, chunk=8)
    assert runner_of(decoder, uses_flashinfer=True).generate(PROMPTS, 2, chunk=8) == expected
    assert not package.runs


def test_a_plan_that_fails_leaves_the_rest_to_triton(package, tiny, any_length, caplog) -> None:
    expected = runner_of(tiny, uses_flashinfer=False).generate(PROMPTS, 2, chunk=8)
    package.fails = "plan"
    assert runner_of(tiny, uses_flashinfer=True).generate(PROMPTS, 2, chunk=8) == expected
    assert caplog.messages == [
        "attention of prompts: Triton from now on: RuntimeError: no room for the plan"
    ]


# --- on a card -------------------------------------------------------------------------------


@pytest.mark.gpu
def test_it_is_measured_on_the_card(heads, tmp_path) -> None:
    file = ChoiceFile(tmp_path / "tuning.json")
    device = torch.device("cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        choice = choose_attention("auto", HEADS, device, file=file)
        assert choose_attention("auto", HEADS, device, file=file) == choice
        prompts = measure(HEADS, MEASURED[0], device)
    assert choice == "triton" or prompts["flashinfer"] < prompts["triton"]


@pytest.mark.gpu
def test_logits_with_it_are_as_close_to_float32_as_without(heads, any_length, monkeypatch) -> None:
    """Prompts in chunks; what is sampled is never fed, so that all see the same tokens."""
    shape = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2,
             "intermediate_size": 1024, "vocab_size": 4000, "num_hidden_layers": 4}  # fmt: skip
    config, device = config_of({**LLAMA, **shape}, "small"), torch.device("cuda")
    prompts = [[random.randrange(4000) for _ in range(n)] for n in (700, 5, 333, 64)]
    kept: list[torch.Tensor] = []
    plain = fused_decoder.FusedDecoder.logits
    monkeypatch.setattr(
        fused_decoder.FusedDecoder, "logits", lambda *a: kept.append(plain(*a)) or kept[-1]
    )

    def logits_of(decoder: Decoder, *, uses_flashinfer: bool = False) -> torch.Tensor:
        kept.clear()
        runner = runner_of(decoder, uses_flashinfer=uses_flashinfer, block_tokens=16)
        bindings = [runner.submit(lane, prompt) for lane, prompt in enumerate(prompts)]
        for fed in (0, 200, 400, 600):
            lanes = [lane for lane, prompt in enumerate(prompts) if len(prompt) > fed]
            runner.iterate(lanes, bindings=bindings, chunk=200)
            bindings = []
        return torch.cat(kept).float()

    with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode():
        decoder, exact_model = (Decoder(config, t, device) for t in (torch.bfloat16, torch.float32))
        for name, parameter in decoder.parameters.by_name.items():
            parameter.fill_(1) if "norm" in name else parameter.normal_(std=0.02)
            exact_model.parameters.by_name[name].copy_(parameter)
        decoder.finish()
        exact_model.finish()
        with_it, without = logits_of(decoder, uses_flashinfer=True), logits_of(decoder)
        exact = logits_of(exact_model)
    assert len(exact) == len(prompts) and not torch.equal(with_it, without)
    error, error_without = [(x - exact).norm() / exact.norm() for x in (with_it, without)]
    assert 0 < error < 1.5 * error_without
