"""A decoder with random weights: for measurements, where time does not depend on what they are."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pie_async.model.config import ModelConfig
from pie_async.model.decoder import Decoder
from pie_async.model.fp8 import FP8

STANDARD_DEVIATION = 0.02
"""What most families are initialised with (`initializer_range`); logits stay finite."""


def random_model(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, *, seed: int = 0
) -> Decoder:
    """A decoder ready to run; the same seed, dtype and kind of device give the same weights.

    Cost: one pass over the parameters' memory, on the device.
    """
    decoder = Decoder(config, dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    for name in decoder.parameters.by_name:
        decoder.parameters.fill(name, partial(_fill, name, generator))
    decoder.finish()
    return decoder


def _fill(name: str, generator: torch.Generator, parameter: Tensor) -> None:
    """Matrices random, norms one, biases zero."""
    if name.endswith(".bias"):
        parameter.zero_()
    elif name.endswith(".weight_scale"):
        parameter.fill_(STANDARD_DEVIATION)
    elif parameter.dtype == FP8:  # stored so, beside its scales
        wide = torch.empty(parameter.shape, device=parameter.device)
        parameter.copy_(wide.normal_(generator=generator))
    elif parameter.dim() == 1:
        parameter.fill_(1.0)
    else:
        parameter.normal_(0.0, STANDARD_DEVIATION, generator=generator)
