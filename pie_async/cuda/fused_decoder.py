"""The decoder's forward pass made of fused kernels, over the same parameters.

What a pre-norm layer does between its four products is three kernels: residual sum and norm,
split and rotation and KV write, gate. `model/decoder.py` is the reference it is tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from torch.nn import functional

from pie_async.cuda.kernels.activation import activate
from pie_async.cuda.kernels.embedding import embed
from pie_async.cuda.kernels.norm import add_norm, norm
from pie_async.cuda.kernels.qkv import rotate_and_store
from pie_async.cuda.tuning import product
from pie_async.model.config import OPT_POSITION_OFFSET
from pie_async.model.decoder import Decoder, DecoderLayer
from pie_async.model.layers import Linear, Norm

Product = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""x [n, in], weight [out, in], bias [out] or None, scale [out] of an FP8 weight or None ->
[n, out]."""


class Step(Protocol):
    """What all layers of an iteration share."""

    positions: Tensor
    """[n] int32; -1: padding."""
    places: Tensor
    """[n] int64, where each token's KV goes; -1: nowhere."""
    rotation: tuple[Tensor, Tensor] | None
    """Cosines and sines of `Rotary.factors`."""

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        """[n, heads * head_dim] from [n, heads, head_dim], over KV that is already written."""


class Hidden:
    """The hidden state between two kernels: a sum that the next norm carries out.

    Attributes:
        residual: [n, hidden]; added to in place.
        pending: [n, hidden] still to be added; None: nothing.
    """

    def __init__(self, residual: Tensor) -> None:
        self.residual = residual
        self.pending: Tensor | None = None

    def rows(self, some: Callable[[Tensor], Tensor]) -> Hidden:
        """Some rows, copied."""
        part = Hidden(some(self.residual))
        part.pending = None if self.pending is None else some(self.pending)
        return part

    def sum(self) -> Tensor:
        """[n, hidden] as the reference decoder has it after a layer."""
        return self.residual if self.pending is None else self.residual + self.pending

    def normed(self, by: Norm) -> Tensor:
        """Carry the sum out and norm it."""
        if self.pending is None:
            return norm(self.residual, by.weight, by.bias, eps=by.eps, is_rms=by.is_rms)
        pending, self.pending = self.pending, None
        return add_norm(pending, self.residual, by.weight, by.bias, eps=by.eps, is_rms=by.is_rms)


class FusedDecoder:
    """Embedding, layers and head of a decoder whose parameters are filled.

    Args:
        decoder: the model, on the GPU.
        kv: per layer, [slots, 2, kv_heads, block_tokens, head_dim].
        product: the linear layers' product.
    """

    def __init__(self, decoder: Decoder, kv: list[Tensor], product: Product = product) -> None:
        self._decoder = decoder
        self._kv = kv
        self._product = product

    def embed(self, token_ids: Tensor, positions: Tensor) -> Hidden:
        """From [n] int64 token ids and [n] int32 positions."""
        decoder = self._decoder
        if decoder.project_in is None:
            if decoder.positions is None:
                return Hidden(embed(token_ids, decoder.embedding))
            offset = OPT_POSITION_OFFSET
            return Hidden(embed(token_ids, decoder.embedding, positions, decoder.positions, offset))
        x = embed(token_ids, decoder.embedding)
        x = self._linear(x, decoder.project_in)
        assert decoder.positions is not None
        return Hidden(x + functional.embedding(positions + OPT_POSITION_OFFSET, decoder.positions))

    def run_layers(self, layers: range, hidden: Hidden, step: Step) -> None:
        """Write the tokens' KV and advance the hidden state through these layers."""
        for number in layers:
            layer = self._decoder.layers[number]
            if layer.is_pre_norm:
                x = self._attend(number, layer, hidden.normed(layer.attention_norm), step)
                hidden.pending = x
                hidden.pending = self._mlp(layer, hidden.normed(layer.mlp_norm))
            else:
                hidden.pending = self._attend(number, layer, hidden.residual, step)
                hidden.residual = hidden.normed(layer.attention_norm)
                hidden.pending = self._mlp(layer, hidden.residual)
                hidden.residual = hidden.normed(layer.mlp_norm)

    def head_input(self, hidden: Hidden) -> Tensor:
        """[n, width] what the head takes after the last layer; `hidden` is used up."""
        decoder = self._decoder
        x = hidden.sum() if decoder.final_norm is None else hidden.normed(decoder.final_norm)
        return x if decoder.project_out is None else self._linear(x, decoder.project_out)

    def logits(self, head_input: Tensor) -> Tensor:
        """[n, vocab] in the model's dtype."""
        return self._product(head_input, self._decoder.head, None, None)

    def _linear(self, x: Tensor, layer: Linear) -> Tensor:
        return self._product(x, layer.weight, layer.bias, layer.scale)

    def _attend(self, number: int, layer: DecoderLayer, x: Tensor, step: Step) -> Tensor:
        q_norm, k_norm = layer.q_norm, layer.k_norm
        queries = rotate_and_store(
            self._linear(x, layer.qkv),
            step.places,
            self._kv[number],
            num_heads=self._decoder.config.num_heads,
            rotation=step.rotation,
            q_norm=None if q_norm is None else q_norm.weight,
            k_norm=None if k_norm is None else k_norm.weight,
            eps=self._decoder.config.norm_eps,
        )
        return self._linear(step.attend(number, queries), layer.out)

    def _mlp(self, layer: DecoderLayer, x: Tensor) -> Tensor:
        mlp = layer.mlp
        inner = activate(self._linear(x, mlp.up), mlp.activation, mlp.is_gated)
        return self._linear(inner, mlp.down)
