"""Assembly on a GPU that fails, wherever it does: everything that it took is given back."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import pytest
from support.fake_cuda_driver import FakeDriver, assemble_with

from pie_async import EngineConfig
from pie_async.assembly import assemble, on_cuda
from pie_async.cuda import card_memory
from pie_async.cuda.device import CudaDevice
from pie_async.cuda.errors import CudaFault
from pie_async.cuda.plain_runner import PlainRunner
from pie_async.errors import ConfigError

pytestmark = pytest.mark.realtime

MIB = 2**20
NEIGHBOUR_BYTES = 2**30

STEPS = (
    "allocate_in_neighbour",
    "create_memory",
    "limit_torch",
    "map",
    "neighbour_free_bytes",
    "open_neighbour",
    "pin",
    "reserve",
    "total_bytes",
)
"""The driver's calls that fail in these tests: but for those that need a context which is lost to
fail, with all that could be given back."""


class FailingDriver(FakeDriver):
    """Counts its calls, and refuses one of them."""

    def __init__(self) -> None:
        super().__init__(links={1: "nvlink"}, neighbour_bytes=NEIGHBOUR_BYTES)
        self.calls: list[str] = []
        self.refused: int | None = None
        for name in STEPS:
            setattr(self, name, functools.partial(self._call, name, getattr(self, name)))

    def _call(self, name: str, function: Callable[..., object], *values: object) -> object:
        self.calls.append(name)
        if len(self.calls) - 1 == self.refused:
            raise CudaFault(name, "CUDA_ERROR_UNKNOWN", "as the test asked")
        return function(*values)

    def assert_given_back(self) -> None:
        assert self.leftovers() == []
        assert self.num_closed == 1
        assert (self.streams, self.neighbour) == ({}, None)
        assert self._free_bytes == self._total_bytes


@pytest.fixture
def driver(monkeypatch) -> FailingDriver:
    """What assembly opens."""
    driver = FailingDriver()
    assemble_with(driver, monkeypatch)
    return driver


def config(**options) -> EngineConfig:
    return EngineConfig(
        **{
            "model": "builtin",
            "device": "cuda",
            "kernels": "torch",
            "device_kv_bytes": MIB,
            "host_pool_bytes": MIB,
            "max_model_len": 64,
            "token_budget": 16,
            "layer_group": 2,  # what a boundary costs is measured elsewhere
            "max_running_sequences": 2,
        }
        | options
    )


def num_calls(driver: FailingDriver, how: EngineConfig) -> int:
    """Of an assembly that succeeds."""
    assemble(how).device.close()
    driver.assert_given_back()
    calls = len(driver.calls)
    driver.calls.clear()
    return calls


@pytest.mark.parametrize("pool", ["host", "peer:1"])
def test_whichever_call_of_the_driver_fails_everything_is_given_back(driver, pool: str):
    how = config(pool=pool)
    calls = num_calls(driver, how)
    reached = set()
    for number in range(calls):
        driver.refused, driver.num_closed = number, 0
        driver.calls.clear()
        try:
            parts = assemble(how)
        except (CudaFault, ConfigError):
            driver.assert_given_back()
        else:
            parts.device.close()  # the rest of the calls are those of closing
            break
        reached.add(driver.calls[number])
    assert {"reserve", "create_memory", "map", "limit_torch"} <= reached
    pools = {"host": {"pin"}, "peer:1": {"open_neighbour", "allocate_in_neighbour"}}
    assert pools[pool] <= reached


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (on_cuda, "load"),
        (on_cuda, "_cuda_limits"),
        (PlainRunner, "profile"),
        (on_cuda, "size_up"),
        (CudaDevice, "load"),
        (PlainRunner, "warm_up"),
        (card_memory.CardMemory, "settle"),
        (on_cuda, "make_parts"),
    ],
)
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_whichever_step_fails_everything_is_given_back(driver, monkeypatch, owner, name, failure):
    def fail(*_: object, **__: object) -> None:
        raise failure("as the test asked")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(failure, match="as the test asked"):
        assemble(config())
    driver.assert_given_back()


def test_the_error_does_not_keep_the_weights(driver, monkeypatch):
    """They go before the driver is closed: it gives torch's unused memory back to the card."""
    weights, alive = [], []

    def load(*values: object) -> object:
        decoder = loaded(*values)
        weights.extend(weakref.ref(weight) for weight in decoder.typical_weights)
        return decoder

    def close() -> None:
        alive.append(sum(weight() is not None for weight in weights))
        closed()

    def fail(*_: object) -> None:
        raise RuntimeError("as the test asked")

    loaded, closed = on_cuda.load, driver.close
    monkeypatch.setattr(on_cuda, "load", load)
    monkeypatch.setattr(on_cuda, "make_parts", fail)
    monkeypatch.setattr(driver, "close", close)
    with pytest.raises(RuntimeError, match="as the test asked"):
        assemble(config())
    assert weights
    assert alive == [0]
