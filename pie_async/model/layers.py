"""The pieces of a decoder layer that are not attention, and where their numbers live."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pie_async.errors import UnsupportedModel
from pie_async.model.config import Activation, ModelConfig
from pie_async.model.fp8 import FP8, quantize, widen
from pie_async.model.quantization import Quantization


class Parameters:
    """Allocates parameters and knows which checkpoint tensor fills which part of them.

    Fused parameters are filled slice by slice, so a checkpoint is never held twice.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization | None = None,
    ) -> None:
        self._dtype = dtype
        self._device = device
        self._quantization = quantization
        self._scales: dict[str, Tensor] = {}
        """By checkpoint name of a weight to quantise, or of a scale to spread: [rows] of scales."""
        self.by_name: dict[str, Tensor] = {}
        """Tensors by checkpoint name, of the stored shape; `fill` writes the parameter."""

    def fill(self, name: str, write: Callable[[Tensor], None]) -> None:
        """Have a checkpoint tensor's numbers written, and what follows from them.

        Args:
            write: given a tensor of the stored shape, puts the numbers there.
        """
        target, scales = self.by_name[name], self._scales.get(name)
        if scales is None:
            write(target)
        elif target.dtype == FP8:
            whole = torch.empty(target.shape, dtype=self._dtype, device=self._device)
            write(whole)
            numbers, exact = quantize(whole)
            target.copy_(numbers)
            scales.copy_(exact)
        else:
            write(target)
            scales.copy_(target.expand_as(scales))

    def one(self, name: str, *shape: int) -> Tensor:
        """An uninitialised parameter that one checkpoint tensor fills."""
        return self.stacked([(name, shape[0])], *shape[1:])

    def stacked(self, parts: Sequence[tuple[str, int]], *trailing: int) -> Tensor:
        """A parameter whose rows are several checkpoint tensors, one below the other.

        Args:
            parts: (checkpoint name, rows).
            trailing: the other dimensions.
        """
        rows = sum(count for _, count in parts)
        whole = torch.empty(rows, *trailing, dtype=self._dtype, device=self._device)
        first = 0
        for name, count in parts:
            self.by_name[name] = whole[first : first + count]
            first += count
        return whole

    def matrix(
        self, parts: Sequence[tuple[str, int]], columns: int
    ) -> tuple[Tensor, Tensor | None]:
        """The weight of a linear layer, in FP8 with [rows] scales if the model is quantised.

        Args:
            parts: (checkpoint name of a layer, rows), one below the other.

        Raises:
            UnsupportedModel: only some of the parts are quantised.
        """
        weights = [(f"{name}.weight", rows) for name, rows in parts]
        quantization = self._quantization
        included = [quantization is not None and quantization.includes(name) for name, _ in parts]
        if quantization is None or not any(included):
            return self.stacked(weights, columns), None
        if not all(included):
            names = ", ".join(name for name, _ in parts)
            raise UnsupportedModel("ignore", f"quantising only some of {names} is not supported")
        rows = sum(count for _, count in parts)
        whole = torch.empty(rows, columns, dtype=FP8, device=self._device)
        scale = torch.empty(rows, dtype=torch.float32, device=self._device)
        first = 0
        for name, count in parts:
            part = scale[first : first + count]
            self.by_name[f"{name}.weight"] = whole[first : first + count]
            if quantization.scales is None:
                self._scales[f"{name}.weight"] = part
            elif quantization.scales == "channel":
                self.by_name[f"{name}.weight_scale"] = part[:, None]
            else:
                self.by_name[f"{name}.weight_scale"] = part.new_empty(1)
                self._scales[f"{name}.weight_scale"] = part
            first += count
        return whole, scale


class Linear:
    """x -> x W^T + b; several checkpoint layers of the same input may be stacked into one."""

    def __init__(
        self,
        parameters: Parameters,
        parts: Sequence[tuple[str, int]],
        in_features: int,
        *,
        has_bias: bool = False,
    ) -> None:
        biases = [(f"{name}.bias", rows) for name, rows in parts]
        self.weight, self.scale = parameters.matrix(parts, in_features)
        self.bias = parameters.stacked(biases) if has_bias else None
        self._packed: PackedLinear | None = None

    def pack(self) -> None:
        """Trade the filled weight for one laid out for this processor, where there is such."""
        self._packed = pack_linear(self.weight, self.bias)
        if self._packed is not None:
            self.weight = self.weight[:0]

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            return self._packed(x)
        weight = self.weight
        if self.scale is not None:
            weight = widen(weight, self.scale, x.dtype)
        return functional.linear(x, weight, self.bias)


PackedLinear = Callable[[Tensor], Tensor]


def pack_linear(weight: Tensor, bias: Tensor | None) -> PackedLinear | None:
    """A linear layer on a copy of the weight in oneDNN's own layout; None where that is not to be.

    torch's compiler uses the same operators. Against functional.linear, float32, 2 cores, 16
    rows: 82 us for 137 at 256 x 1408, 870 us for 2200 at 2048 x 2048.
    """
    operators = torch.ops.mkldnn
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    has_onednn = torch.backends.mkldnn.is_available()
    if not (has_onednn and hasattr(operators, "_linear_pointwise")):
        return None
    packed = operators._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
    multiply = operators._linear_pointwise

    def linear(x: Tensor) -> Tensor:
        product: Tensor = multiply(x, packed, bias, "none", (), "")
        return product

    return linear


_PACKED_FOR_ROWS = 16
"""A hint; any number of rows works."""


class Norm:
    """RMS norm or layer norm over the last dimension."""

    def __init__(self, parameters: Parameters, name: str, size: int, config: ModelConfig) -> None:
        self.eps = config.norm_eps
        self.weight = self.bias = None
        if config.is_norm_affine:
            self.weight = parameters.one(f"{name}.weight", size)
            if config.norm == "layer":
                self.bias = parameters.one(f"{name}.bias", size)
        self.is_rms = config.norm == "rms"

    def __call__(self, x: Tensor) -> Tensor:
        if not self.is_rms:
            return functional.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)
        # Like transformers: the statistics in float32, the weight applied in the model's dtype.
        # Written out because F.rms_norm on the CPU (torch 2.13) takes a third longer.
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        normed = (wide * scale).to(x.dtype)
        return normed if self.weight is None else normed.mul_(self.weight)


class Mlp:
    """The feed-forward half of a layer, gated or plain."""

    def __init__(
        self, parameters: Parameters, config: ModelConfig, up: Sequence[str], down: str
    ) -> None:
        inner, has_bias = config.intermediate_size, config.has_mlp_bias
        parts = [(name, inner) for name in up]
        self.up = Linear(parameters, parts, config.hidden_size, has_bias=has_bias)
        self.down = Linear(parameters, [(down, config.hidden_size)], inner, has_bias=has_bias)
        self.activation = config.activation
        self._activate = _ACTIVATIONS[config.activation]
        self._inner = inner
        self.is_gated = config.is_gated

    def pack(self) -> None:
        """See `Linear.pack`."""
        self.up.pack()
        self.down.pack()

    def __call__(self, x: Tensor) -> Tensor:
        inner = self.up(x)
        if self.is_gated:
            gate, up = torch.split(inner, self._inner, -1)
            return self.down(self._activate(gate).mul_(up))
        return self.down(self._activate(inner))


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": _gelu_tanh,
}
