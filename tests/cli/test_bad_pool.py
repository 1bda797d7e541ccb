"""A pool that cannot be had is refused before weights are loaded, in a line that names the flag."""

from __future__ import annotations

import pytest
from support.fake_cuda_driver import FakeDriver, assemble_with

from pie_async.__main__ import main
from pie_async.assembly import on_cpu, on_cuda
from pie_async.cli.options import SETTINGS

pytestmark = pytest.mark.realtime  # the commands start loops of their own

CPU = ["--device", "cpu"]
CUDA = ["--device", "cuda", "--kernels", "torch", "--device-kv", "1MiB", "--max-model-len", "64"]


@pytest.fixture(autouse=True)
def loads_nothing(monkeypatch):
    """A machine with two GPUs beside the first, one of them out of reach; loading fails."""

    def load(*_: object) -> None:
        raise AssertionError("weights were loaded")

    driver = FakeDriver(links={1: "nvlink", 2: "none"}, neighbour_bytes=2**20)
    assemble_with(driver, monkeypatch)
    monkeypatch.setattr(on_cpu, "load", load)
    monkeypatch.setattr(on_cuda, "load", load)
    for flag in SETTINGS.values():
        monkeypatch.delenv(flag.variable, raising=False)


@pytest.mark.parametrize(
    ("flags", "flag", "says"),
    [
        ([*CUDA, "--host-pool", "4000TiB"], "--host-pool", "of memory are free"),
        ([*CUDA, "--pool", "peer:7"], "--pool", "possible here: host, peer:1"),
        ([*CUDA, "--pool", "peer:2"], "--pool", "possible here: host, peer:1"),
        ([*CUDA, "--pool", "peer:0"], "--pool", "the one that computes"),
        ([*CUDA, "--pool", "peer:1", "--host-pool", "1GiB"], "--host-pool", "1.0 MiB are free"),
        ([*CPU, "--host-pool", "4000TiB"], "--host-pool", "of memory are free"),
        ([*CPU, "--device-kv", "4000TiB"], "--device-kv", "of memory are free"),
        ([*CPU, "--pool", "disk"], "--pool", "peer:N"),
        ([*CPU, "--pool", "peer:1"], "--pool", "device cuda"),
        ([*CPU, "--host-pool", "-1"], "--host-pool", "64MiB"),
        ([*CPU, "--host-pool", "1KiB"], "--host-pool", "less than one KV block"),
        ([*CPU, "--device-kv", "1KiB"], "--device-kv", "give it at least"),
        ([*CPU, "--ring-depth", "1"], "--ring-depth", "2"),
    ],
)
def test_it_is_refused_by_its_flag(flags, flag, says, capsys):
    assert main(["generate", "-p", "A", "-n", "1", *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert flag in lines[0] and says in lines[0]


def test_a_good_pool_gets_as_far_as_the_weights(capsys):
    assert main(["generate", "-p", "A", "-n", "1", *CPU, "--host-pool", "0"]) != 0
    assert "weights were loaded" in capsys.readouterr().err
