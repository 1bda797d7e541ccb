"""What is missing for the CUDA device is said in one line that names what is there."""

from __future__ import annotations

import pytest
import torch

from pie_async import LLM, EngineConfig
from pie_async.assembly.on_cuda import check_kernels
from pie_async.cuda import errors
from pie_async.errors import ConfigError
from pie_async.model.config import config_of
from pie_async.model.named_shapes import NAMED_SHAPES

pytestmark = pytest.mark.realtime


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A function that makes everything look installed, with a GPU of this capability."""

    def look_like(capability: tuple[int, int] | None, name: str = "") -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(errors, "_has_bindings", lambda: True)
        monkeypatch.setattr(errors, "_has_triton", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)

    return look_like


def refused(match: str, quantization: str | None = None) -> ConfigError:
    with pytest.raises(ConfigError, match=match) as caught:
        errors.require_cuda(quantization)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_torch_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="built without CUDA; install a CUDA build") as caught:
        LLM(device="cuda")
    assert caught.value.option == "device"
    assert "\n" not in str(caught.value)


def test_missing_cuda_python_names_the_extra(machine, monkeypatch):
    machine((9, 0))
    monkeypatch.setattr(errors, "_has_bindings", lambda: False)
    refused(r"pip install 'pie-async\[cuda\]'")


def test_missing_triton_says_how_to_install_it(machine, monkeypatch):
    machine((9, 0))
    monkeypatch.setattr(errors, "_has_triton", lambda: False)
    refused(r"Triton is missing.*pip install 'triton")


def test_no_gpu_says_where_to_look(machine):
    machine(None)
    refused(r"no NVIDIA GPU is visible; look at nvidia-smi .* CUDA 13\.0")


@pytest.mark.parametrize(
    ("capability", "name"), [((6, 1), "Tesla P40"), ((7, 5), "Tesla T4"), ((7, 0), "Tesla V100")]
)
def test_a_gpu_that_is_too_old_is_named(machine, capability, name):
    machine(capability, name)
    major, minor = capability
    refused(rf"{name} has compute capability {major}\.{minor}, and 8\.0 is the least")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)])
def test_newer_gpus_will_do(machine, capability):
    machine(capability)
    errors.require_cuda()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6)])
def test_fp8_on_a_gpu_without_it_names_both(machine, capability):
    machine(capability, "NVIDIA A100")
    error = refused(r"needs compute capability 8\.9, and NVIDIA A100 has .* 8\.[06]", "fp8")
    assert error.option == "quantization"


@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
def test_fp8_on_a_gpu_that_has_it_is_accepted(machine, capability):
    machine(capability)
    errors.require_cuda("fp8")


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_quantization_without_a_gpu_is_refused(device):
    with pytest.raises(ConfigError, match=f"fp8 needs device cuda, not {device}") as caught:
        LLM(device=device, quantization="fp8")
    assert caught.value.option == "quantization"


@pytest.mark.parametrize(
    ("shape", "options", "option", "match"),
    [
        ({}, {"block_tokens": 24}, "block_tokens", "power of two on the GPU, not 24"),
        ({"head_dim": 320}, {}, "kernels", "heads of 320 are too large"),
    ],
)
def test_what_the_kernels_cannot_do_is_said_before_loading(shape, options, option, match):
    model = config_of({**NAMED_SHAPES["llama-3.1-8b"], **shape}, "a model")
    with pytest.raises(ConfigError, match=match) as caught:
        check_kernels(EngineConfig(device="cuda", **options), model)
    assert caught.value.option == option
    check_kernels(EngineConfig(device="cuda", kernels="torch", **options), model)
