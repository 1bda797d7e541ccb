"""What the CUDA driver reports, in the project's own words; and whether CUDA is here at all."""

from __future__ import annotations

import importlib.util

import torch

from pie_async.errors import ConfigError, DeviceFault

LEAST_CAPABILITY = (8, 0)
"""Ampere: bfloat16 in hardware, which the kernels are written for."""
FP8_CAPABILITY = (8, 9)
"""Ada: the first with FP8 in hardware."""


class CudaFault(DeviceFault):
    """A call to the CUDA driver failed.

    Attributes:
        name: the driver's name of the error, for example "CUDA_ERROR_OUT_OF_MEMORY".
    """

    def __init__(self, doing: str, name: str, explanation: str) -> None:
        self.name = name
        super().__init__(f"CUDA failed while {doing}: {name} ({explanation})")

    @property
    def is_out_of_memory(self) -> bool:
        return self.name == "CUDA_ERROR_OUT_OF_MEMORY"


def require_cuda(quantization: str | None = None) -> None:
    """Say in one line what is missing for device "cuda".

    Args:
        quantization: `EngineConfig.quantization`.

    Raises:
        ConfigError: torch was built without CUDA, cuda-python or Triton is missing, there is no
            GPU, or it is too old.
    """
    if torch.version.cuda is None:
        raise _unusable(
            f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch"
        )
    if not _has_bindings():
        raise _unusable("cuda-python is missing; pip install 'pie-async[cuda]'")
    if not _has_triton():
        raise _unusable(
            "Triton is missing, which the kernels are written in; pip install 'triton>=3.5'"
        )
    if not torch.cuda.is_available():
        raise _unusable(
            "no NVIDIA GPU is visible; look at nvidia-smi and CUDA_VISIBLE_DEVICES, and whether "
            f"the driver is recent enough for CUDA {torch.version.cuda}"
        )
    _require_capability(quantization)


def _require_capability(quantization: str | None) -> None:
    capability = torch.cuda.get_device_capability()
    has = f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}"
    if capability < LEAST_CAPABILITY:
        major, minor = LEAST_CAPABILITY
        raise _unusable(f"{has}, and {major}.{minor} is the least that works")
    if quantization == "fp8" and capability < FP8_CAPABILITY:
        major, minor = FP8_CAPABILITY
        raise ConfigError(
            f"quantization fp8 needs compute capability {major}.{minor}, and {has}; leave "
            "quantization out, or use a newer GPU",
            option="quantization",
        )


def _has_bindings() -> bool:
    has_package = importlib.util.find_spec("cuda") is not None
    return has_package and importlib.util.find_spec("cuda.bindings") is not None


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _unusable(reason: str) -> ConfigError:
    return ConfigError(f"device cuda cannot be used: {reason}, or use device cpu", option="device")
