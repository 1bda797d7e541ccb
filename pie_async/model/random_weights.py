"""A decoder with random weights: for measurements, where time does not depend on what they are."""

from __future__ import annotations

import torch
from torch import Tensor

from pie_async.model.config import ModelConfig
from pie_async.model.decoder import Decoder

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
    for name, parameter in decoder.parameters.by_name.items():
        _fill(name, parameter, generator)
    decoder.finish()
    return decoder


def _fill(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Matrices random, norms one, biases zero."""
    if name.endswith(".bias"):
        parameter.zero_()
    elif parameter.dim() == 1:
        parameter.fill_(1.0)
    else:
        parameter.normal_(0.0, STANDARD_DEVIATION, generator=generator)
