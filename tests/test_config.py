"""Options that cannot work are refused by name; sizes are read as people write them."""

from __future__ import annotations

import math

import pytest

from pie_async.assembly.sizing import (
    count_staging_slots,
    default_limits,
    model_layout,
)
from pie_async.config import (
    GIB,
    KIB,
    MAX_STREAMED_BYTES,
    MIB,
    PEER_MAX_STREAMED_BYTES,
    EngineConfig,
    format_size,
    parse_pool,
    parse_size,
)
from pie_async.errors import ConfigError


def test_the_defaults_are_valid_and_frozen():
    config = EngineConfig()
    with pytest.raises(AttributeError):
        config.seed = 3


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("device_kv_bytes", 0),
        ("max_streamed_bytes", 0),
        ("host_pool_bytes", -1),
        ("block_tokens", 0),
        ("max_running_sequences", 0),
        ("token_budget", 0),
        ("layer_group", 0),
        ("ring_depth", 1),
        ("max_queued_requests", 0),
        ("max_model_len", 0),
        ("cpu_threads", 0),
        ("streamed_blocks", -1),
        ("iterations_in_flight", 0),
        ("iterations_in_flight", 3),
        ("link_bytes_per_s", 0.0),
        ("link_bytes_per_s", -1.0),
        ("link_bytes_per_s", math.nan),
    ],
)
def test_an_impossible_value_is_refused_and_names_its_option(option: str, value: float):
    with pytest.raises(ConfigError, match=option) as refused:
        EngineConfig(**{option: value})
    assert refused.value.option == option


@pytest.mark.parametrize("option", ["host_pool_bytes", "streamed_blocks"])
def test_zero_switches_pooling_off(option: str):
    assert getattr(EngineConfig(**{option: 0}), option) == 0


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError):
        EngineConfig(devise="cpu")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("1024", 1024),
        ("64MiB", 64 * MIB),
        ("1.5 GiB", 3 * GIB // 2),
        ("500MB", 500_000_000),
        ("2k", 2000),
        (" 3 Ki ", 3 * KIB),
        ("1gib", GIB),
        ("7B", 7),
    ],
)
def test_sizes_are_read(text: str, num_bytes: int):
    assert parse_size(text, option="device_kv") == num_bytes


@pytest.mark.parametrize("text", ["", "MiB", "-1GiB", "1 XiB", "1e9", "1.GiB", "many"])
def test_what_is_no_size_is_refused_and_names_the_option(text: str):
    with pytest.raises(ConfigError, match=r"device_kv is not a size.*64MiB") as refused:
        parse_size(text, option="device_kv")
    assert refused.value.option == "device_kv"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (64 * MIB, "64.0 MiB"), (3 * GIB, "3.0 GiB")],
)
def test_sizes_are_written_for_people(num_bytes: int, text: str):
    assert format_size(num_bytes) == text


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("device", "gpu"),
        ("dtype", "fp16"),
        ("device_kv_bytes", "64MiB"),
        ("device_kv_bytes", 2e6),
        ("debug", "yes"),
        ("seed", None),
    ],
)
def test_a_value_that_is_no_choice_or_of_the_wrong_type_is_refused_by_name(option, value):
    with pytest.raises(ConfigError, match=option) as refused:
        EngineConfig(**{option: value})
    assert refused.value.option == option


def test_the_model_may_be_a_path(tmp_path):
    assert EngineConfig(model=tmp_path).model == str(tmp_path)


def test_streaming_without_a_pool_is_refused():
    with pytest.raises(ConfigError, match="host_pool_bytes is 0") as refused:
        EngineConfig(host_pool_bytes=0, streamed_blocks=5)
    assert refused.value.option == "streamed_blocks"


@pytest.mark.parametrize("value", [0.9, 1, "0.5", "90%", "80GiB", 80 * GIB, "500MB"])
def test_gpu_memory_is_a_share_or_a_size(value):
    assert EngineConfig(gpu_memory=value).gpu_memory == value


@pytest.mark.parametrize(
    "value", [0, 0.0, "0", "0%", "150%", "1.5", 1.5, -1, "-1GiB", "abc", "", "12", 1e300 * 1e10]
)
def test_gpu_memory_that_is_nonsense_is_refused(value):
    with pytest.raises(ConfigError, match=r"gpu_memory must be a share .* or a size") as refused:
        EngineConfig(gpu_memory=value)
    assert refused.value.option == "gpu_memory"
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("target", [0.0, -1.0, float("inf"), float("nan")])
def test_an_itl_limit_is_a_time(target):
    with pytest.raises(ConfigError) as refused:
        EngineConfig(itl_limit_s=target)
    assert refused.value.option == "itl_limit_s"


def test_an_itl_limit_and_a_fixed_number_of_streamed_blocks_exclude_each_other():
    with pytest.raises(ConfigError, match="itl_limit_s is for the governor"):
        EngineConfig(itl_limit_s=0.05, streamed_blocks=3)


@pytest.mark.parametrize("target", [0.0, -1.0, math.inf, math.nan])
def test_an_itl_target_is_a_time(target):
    with pytest.raises(ConfigError, match="above 0") as refused:
        EngineConfig(itl_target_s=target)
    assert refused.value.option == "itl_target_s"


def test_a_token_budget_and_a_target_for_it_contradict_each_other():
    with pytest.raises(ConfigError, match="give one of them"):
        EngineConfig(itl_target_s=0.05, token_budget=512)


@pytest.mark.parametrize(
    ("device", "limits"), [("cpu", (512, 64)), ("sim", (512, 64)), ("cuda", (8192, 256))]
)
def test_limits_suit_the_device_unless_they_are_set(device, limits):
    assert default_limits(EngineConfig(device=device)) == limits
    given = EngineConfig(device=device, token_budget=100, max_running_sequences=7)
    assert default_limits(given) == (100, 7)


@pytest.mark.parametrize(
    ("text", "peer"),
    [("host", None), (" host ", None), ("peer:0", 0), ("peer:1", 1), ("peer:12", 12)],
)
def test_a_pools_place_is_the_host_or_a_numbered_gpu(text: str, peer: int | None):
    place = parse_pool(text)
    assert place.peer == peer
    assert str(place) == text.strip()
    assert EngineConfig(device="cuda", pool=text).pool == text


@pytest.mark.parametrize(
    "text", ["", "peer", "peer:", "peer:-1", "peer:1.5", "peer:x", "Host", "gpu:1"]
)
def test_another_pools_name_is_refused_with_what_is_possible(text: str):
    with pytest.raises(ConfigError, match=r"pool must be host .* or peer:N") as refused:
        EngineConfig(device="cuda", pool=text)
    assert refused.value.option == "pool"


@pytest.mark.parametrize(
    ("device", "says"),
    [("cpu", "device is cpu; use pool host or device cuda$"), ("sim", "sim_link nvlink simulates")],
)
def test_a_peer_pool_needs_gpus(device: str, says: str):
    with pytest.raises(ConfigError, match=says) as refused:
        EngineConfig(device=device, pool="peer:1")
    assert refused.value.option == "pool"


class TestStagingSlots:
    """How many blocks one iteration on a GPU may stream."""

    class Shape:
        num_layers, kv_heads, head_dim = 32, 8, 128

    BLOCK_BYTES = 2 * MIB

    def count(self, host_slots=10_000, **options):
        config = EngineConfig(device="cuda", **options)
        layout = model_layout(config, self.Shape, 2)
        assert layout.block_bytes == self.BLOCK_BYTES
        return count_staging_slots(config, layout, host_slots)

    def test_the_default_is_what_a_link_moves_in_an_iteration(self):
        assert self.count() == MAX_STREAMED_BYTES // self.BLOCK_BYTES

    def test_a_faster_link_moves_more_of_it(self):
        slots = self.count(pool="peer:1")
        assert slots == PEER_MAX_STREAMED_BYTES // self.BLOCK_BYTES > self.count()

    def test_no_more_than_the_pool_has(self):
        assert self.count(host_slots=3) == 3
        assert self.count(host_slots=0) == 0

    def test_a_size_that_is_set_counts(self):
        assert self.count(max_streamed_bytes=10 * self.BLOCK_BYTES + 5) == 10

    def test_a_context_that_is_set_fits_beside_the_arena(self):
        longest = 16 * 4000
        slots = self.count(device_kv_bytes=1000 * self.BLOCK_BYTES, max_model_len=longest)
        assert slots == 4000 + 3 - 1000

    def test_less_than_a_block_is_refused_by_name(self):
        with pytest.raises(ConfigError, match=r"max_streamed_bytes is .* less than one KV block"):
            self.count(max_streamed_bytes=self.BLOCK_BYTES - 1)

    def test_the_gpu_stages_in_eight_groups_and_two_are_in_the_ring(self):
        layout = model_layout(EngineConfig(device="cuda"), self.Shape, 2)
        assert (layout.num_groups, layout.ring_layers) == (8, 8)
