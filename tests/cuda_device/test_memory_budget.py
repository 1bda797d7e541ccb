"""How the card's memory is shared out: arithmetic alone, and with a driver that stands in."""

from __future__ import annotations

import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.device_rigs import LAYOUT
from support.fake_cuda_driver import FakeDriver

from pie_async.assembly import on_cuda
from pie_async.config import GIB, MIB, EngineConfig
from pie_async.core.layout import KvLayout
from pie_async.cuda import rates
from pie_async.cuda.card_memory import CardMemory, MakeRunner
from pie_async.cuda.memory_budget import (
    GRAPHS_BYTES,
    SLACK_BYTES,
    Card,
    Demand,
    GpuMemory,
    paged,
    require_weights,
    share_out,
)
from pie_async.cuda.profiling import PLAIN, WIDEST
from pie_async.cuda.rates import measure_boundary, measure_rates
from pie_async.errors import ConfigError, DeviceFault
from pie_async.sampling_params import SamplingParams

PAGE = 2 * MIB
LLAMA = KvLayout(
    num_layers=32, block_tokens=16, kv_heads=8, head_dim=128, item_bytes=2,
    num_groups=32, ring_depth=3,
)  # fmt: skip
CARD = Card(total_bytes=140 * GIB, free_bytes=140 * GIB - 600 * MIB)


def demand(**changes) -> Demand:
    sizes = {
        "context_bytes": 600 * MIB,
        "weight_bytes": 15 * GIB,
        "activation_bytes": 2 * GIB,
        "graph_bytes": GIB,
        "staging_slots": 512,
    }
    return Demand(**{**sizes, **changes})


# --- the cap ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu_memory", "num_bytes"),
    [
        (0.9, int(0.9 * CARD.total_bytes)),
        ("0.5", 70 * GIB),
        ("50%", 70 * GIB),
        ("100%", 140 * GIB),
        (1, 140 * GIB),
        ("80GiB", 80 * GIB),
        (80 * GIB, 80 * GIB),
        (float(GIB), GIB),
    ],
)
def test_the_cap_is_a_size_or_a_share_of_the_card(gpu_memory, num_bytes):
    assert CARD.cap_bytes(gpu_memory) == num_bytes


def test_more_than_the_card_has_is_refused_with_both_sizes():
    with pytest.raises(ConfigError, match=r"200\.0 GiB, but the GPU has 140\.0 GiB") as caught:
        CARD.cap_bytes("200GiB")
    assert caught.value.option == "gpu_memory"


def test_memory_in_use_before_is_counted_as_ours_only_up_to_a_context():
    assert CARD.context_bytes == 600 * MIB
    shared = Card(total_bytes=140 * GIB, free_bytes=100 * GIB)
    assert shared.context_bytes == GIB
    assert shared.used_bytes(90 * GIB) == 11 * GIB
    assert shared.reach_bytes(126 * GIB) == 101 * GIB


# --- weights ----------------------------------------------------------------------------------


def weights(num_bytes: int, card: Card, cap_bytes: int) -> None:
    require_weights(num_bytes, card, cap_bytes, gpu="NVIDIA H200", dtype_name="bfloat16")


def test_weights_that_fit_are_accepted():
    weights(15 * GIB, CARD, 80 * GIB)


def test_weights_larger_than_the_free_memory_name_card_and_sizes():
    taken = Card(total_bytes=140 * GIB, free_bytes=10 * GIB)
    with pytest.raises(
        ConfigError, match=r"15\.0 GiB in bfloat16.*10\.0 GiB of 140\.0 GiB are free on NVIDIA H200"
    ) as caught:
        weights(15 * GIB, taken, 126 * GIB)
    assert caught.value.option == "model"


def test_weights_larger_than_the_cap_name_the_cap():
    with pytest.raises(ConfigError, match=r"gpu_memory is 15\.0 GiB; raise it") as caught:
        weights(15 * GIB, CARD, 15 * GIB)
    assert caught.value.option == "gpu_memory"


# --- the arena --------------------------------------------------------------------------------


def test_the_arena_gets_what_is_left_and_nothing_exceeds_the_cap():
    shares = share_out(80 * GIB, demand(), LLAMA, page_bytes=PAGE)
    assert shares.ring_bytes == 3 * 512 * 64 * 1024
    assert shares.arena_bytes == shares.device_slots * LLAMA.block_bytes
    # Less than one page per layer is lost, and the reserve stays.
    assert SLACK_BYTES <= shares.free_bytes < SLACK_BYTES + 32 * PAGE
    parts = 15 * GIB + 2 * GIB + GIB + 600 * MIB + shares.ring_bytes + shares.arena_bytes
    assert parts + shares.free_bytes == 80 * GIB


def test_an_arena_of_a_given_size_is_kept_and_the_rest_stays_free():
    shares = share_out(80 * GIB, demand(), LLAMA, page_bytes=PAGE, device_slots=1000)
    assert shares.device_slots == 1000
    assert shares.arena_bytes == 32 * paged(1000, LLAMA, PAGE)
    assert shares.free_bytes > 50 * GIB


@pytest.mark.parametrize("how", [{}, {"device_slots": 4}])
def test_with_nothing_left_the_error_says_what_everything_takes(how):
    with pytest.raises(ConfigError) as caught:
        share_out(18 * GIB, demand(), LLAMA, page_bytes=PAGE, **how)
    message = str(caught.value)
    for part in (
        "18.0 GiB under gpu_memory 0 B are left for KV",
        "weights 15.0 GiB",
        "activations 2.0 GiB",
        "CUDA graphs 1.0 GiB",
        "lower token_budget",
    ):
        assert part in message
    assert caught.value.option == "gpu_memory"


def test_an_arena_larger_than_what_is_left_is_refused():
    with pytest.raises(ConfigError, match=r"which needs 100\.0 GiB at least"):
        share_out(80 * GIB, demand(), LLAMA, page_bytes=PAGE, device_slots=50 * 1024)


def test_the_table_adds_up_for_people():
    lines = list(share_out(80 * GIB, demand(), LLAMA, page_bytes=PAGE).lines())
    assert any("weights" in line and "15.0 GiB" in line for line in lines)
    assert any("free below the cap" in line for line in lines)


# --- measured ---------------------------------------------------------------------------------


class StandInRunner:
    """Takes memory of a stand-in driver as a runner takes the card's."""

    graph_bytes = 3 * MIB

    def __init__(self, driver: FakeDriver, kept_bytes: int, per_token_bytes: int) -> None:
        self._driver = driver
        self._kept_bytes, self._per_token_bytes = kept_bytes, per_token_bytes
        self._driver.torch_holds(kept_bytes)
        self.profiled: list[tuple[int, SamplingParams]] = []

    def profile(self, num_tokens: int, sampling: SamplingParams) -> int:
        self.profiled.append((num_tokens, sampling))
        peak = num_tokens * self._per_token_bytes
        self._driver.torch_holds(self._kept_bytes + peak)
        return peak


class CountingDriver(FakeDriver):
    """A driver that also counts what torch holds."""

    def __init__(self, memory_bytes: int) -> None:
        super().__init__(memory_bytes=memory_bytes)
        self._entered = {threading.get_ident()}
        self.weight_bytes = self.held_bytes = self.kept_bytes = 0

    def enter_thread(self) -> None:
        self._entered.add(threading.get_ident())

    def free_bytes(self) -> int:
        assert threading.get_ident() in self._entered, "CUDA_ERROR_INVALID_CONTEXT"
        return super().free_bytes() - self.weight_bytes - self.held_bytes

    def torch_bytes(self) -> int:
        return self.weight_bytes + self.held_bytes

    def torch_kept_bytes(self) -> int:
        return self.kept_bytes

    def torch_holds(self, num_bytes: int) -> None:
        self.held_bytes = max(self.held_bytes, num_bytes)

    def trim(self) -> None:
        self.held_bytes = 0


def planned(memory: CardMemory, make_runner: MakeRunner, **changes) -> GpuMemory:
    """The plan for a small load and as many slots as there is room for, but for the changes."""
    sizes = {"device_slots": None, "staging_slots": 0, "token_budget": 512, "decode_rows": 64}
    return memory.plan(make_runner, LAYOUT, torch.float32, **(sizes | changes))


def test_a_runner_is_profiled_and_the_arena_takes_what_is_left():
    driver = CountingDriver(memory_bytes=4 * GIB)
    memory = CardMemory(driver, "3GiB")
    driver.weight_bytes = GIB
    runner = StandInRunner(driver, 16 * MIB, 1000)
    shares = planned(
        memory, lambda layers: runner, staging_slots=16, token_budget=8192, decode_rows=256
    )
    assert shares.weight_bytes == GIB
    assert shares.activation_bytes == 16 * MIB + 8192 * 1000
    assert shares.graph_bytes == GRAPHS_BYTES + 256 * 1000
    assert shares.arena_bytes > GIB
    assert runner.profiled == [(256, PLAIN), (8192, WIDEST), (8192, WIDEST)]
    assert driver.leftovers() == [], "the small arena is given back"
    driver.close()


def test_what_torch_keeps_of_an_engine_before_is_not_given_out_twice():
    driver = CountingDriver(memory_bytes=4 * GIB)
    driver.torch_holds(2 * GIB)
    memory = CardMemory(driver, "3GiB")
    driver.weight_bytes = GIB
    shares = planned(memory, lambda layers: StandInRunner(driver, 16 * MIB, 1000))
    assert shares.weight_bytes == GIB
    assert shares.arena_bytes < 2 * GIB
    driver.close()


def test_weights_that_fit_beside_tensors_of_an_engine_before_are_counted():
    class Untrimmable(CountingDriver):
        def trim(self) -> None:
            """There is a tensor in every segment that torch holds."""

    driver = Untrimmable(memory_bytes=4 * GIB)
    driver.held_bytes, driver.kept_bytes = 64 * MIB, 40 * MIB
    memory = CardMemory(driver, "3GiB")
    driver.kept_bytes -= 11 * MIB  # the weights; the driver's free memory stays as it was
    shares = planned(memory, lambda layers: StandInRunner(driver, 16 * MIB, 1000), device_slots=100)
    assert shares.weight_bytes == 11 * MIB
    driver.close()


def test_an_iteration_that_does_not_fit_under_the_cap_is_an_error_of_the_configuration():
    class TooLarge(StandInRunner):
        def profile(self, num_tokens: int, sampling: SamplingParams) -> int:
            # In the cap's own terms: what torch may still take when it is asked for an iteration.
            limits.append(driver.torch_limit_bytes)
            raise torch.OutOfMemoryError("as the test asked")

    limits: list[int] = []
    driver = CountingDriver(memory_bytes=4 * GIB)
    memory = CardMemory(driver, "3GiB")
    driver.weight_bytes = GIB
    with pytest.raises(
        ConfigError, match=r"8192 tokens does not fit into the 2\.0 GiB that gpu_memory 3\.0 GiB"
    ) as caught:
        planned(
            memory,
            lambda layers: TooLarge(driver, 0, 0),
            staging_slots=16,
            token_budget=8192,
            decode_rows=256,
        )
    assert caught.value.option == "token_budget"
    assert limits[0] <= 3 * GIB
    assert driver.leftovers() == [], "the small arena is given back"
    driver.close()


def test_torch_is_kept_below_the_cap_and_the_report_follows_the_driver():
    driver = CountingDriver(memory_bytes=4 * GIB)
    memory = CardMemory(driver, 0.75)
    driver.weight_bytes = GIB
    runner = StandInRunner(driver, 16 * MIB, 1000)
    planned(memory, lambda layers: runner, device_slots=100)
    arena = driver.create_memory(512 * MIB)
    memory.settle(runner)
    assert driver.torch_limit_bytes == 3 * GIB - 512 * MIB - SLACK_BYTES
    report = memory.report(runner)
    assert report.used_bytes == GIB + 512 * MIB
    assert report.graph_bytes == 3 * MIB
    assert report.cap_bytes == 3 * GIB
    with ThreadPoolExecutor(1) as another:  # the event loop's, which has no GPU of its own yet
        assert another.submit(memory.report, runner).result() == report
    driver.release_memory(arena)
    driver.close()


def test_graphs_get_the_room_that_the_largest_iteration_leaves():
    driver = CountingDriver(memory_bytes=4 * GIB)
    memory = CardMemory(driver, "3GiB")
    runner = StandInRunner(driver, 0, 1 * MIB)
    planned(memory, lambda layers: runner, device_slots=100)
    memory.settle(runner)
    assert runner.has_room()
    graphs = driver.create_memory(5 * GIB // 2)
    assert not runner.has_room(), "an iteration takes 512 MiB"
    driver.held_bytes = driver.kept_bytes = 256 * MIB
    assert not runner.has_room()
    driver.release_memory(graphs)
    graphs = driver.create_memory(5 * GIB // 2 - 64 * MIB)
    assert runner.has_room(), "some of which torch has already"
    driver.release_memory(graphs)
    driver.close()


def test_rates_are_measured_on_the_drivers_device():
    driver = FakeDriver()
    measured = measure_rates(driver, torch.float32, size=64, copy_bytes=2**16)
    assert measured.flops_per_s > 0
    assert measured.read_bytes_per_s > 0
    driver.close()


def test_a_boundary_between_layer_groups_is_measured_and_everything_given_back():
    driver = FakeDriver()
    boundary_s = measure_boundary(driver)
    assert 0 < boundary_s < 1
    assert driver.leftovers() == []
    assert driver.streams == {}


def test_a_fault_while_a_boundary_is_measured_is_raised_and_everything_given_back():
    driver = FakeDriver()
    driver.failing = "as the test asked"
    with pytest.raises(DeviceFault):
        measure_boundary(driver)
    assert driver.leftovers() == []
    assert driver.streams == {}


def layout_of(driver: FakeDriver, weight_bytes: float, **options) -> KvLayout:
    """Of a 64-layer model with so many weights; the stand-in reads 1 TB/s."""
    model = types.SimpleNamespace(
        num_layers=64, kv_heads=8, head_dim=128, weight_bytes=lambda item_bytes: weight_bytes
    )
    files = types.SimpleNamespace(config=model)
    config = EngineConfig(device="cuda", **options)
    return on_cuda._layout(config, files, torch.bfloat16, driver)


def test_layer_groups_are_as_many_as_boundaries_allow(monkeypatch, caplog):
    monkeypatch.setattr(rates, "measure_boundary", lambda driver: 4.3e-6)
    caplog.set_level("INFO")
    assert layout_of(FakeDriver(), 2.6e9).num_groups == 6
    assert layout_of(FakeDriver(), 65e9).num_groups == 8
    assert layout_of(FakeDriver(), 1e8).num_groups == 4
    assert "6 layer groups, 2 of them in the staging ring: a boundary" in caplog.text
    assert "4.3 us, the shortest iteration 2.60 ms" in caplog.text


@pytest.mark.parametrize("options", [{"layer_group": 8}, {"host_pool_bytes": 0}])
def test_nothing_is_measured_where_it_decides_nothing(monkeypatch, options: dict):
    monkeypatch.setattr(rates, "measure_boundary", lambda driver: pytest.fail("measured"))
    assert layout_of(FakeDriver(), 65e9, **options).num_groups == 8
