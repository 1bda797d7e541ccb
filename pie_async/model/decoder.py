"""One decoder for all families; what differs between them is in `ModelConfig`."""

from __future__ import annotations

from typing import Protocol

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from pie_async.model.config import OPT_POSITION_OFFSET, ModelConfig
from pie_async.model.layers import Linear, Mlp, Norm, PackedLinear, Parameters, pack_linear
from pie_async.model.rope import Rotary, rotate

_SMALL_HEAD_BYTES = 32 * 2**20


class LayerAttention(Protocol):
    """Attention of one iteration's tokens in one layer, over KV kept elsewhere."""

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Keep the tokens' keys and values, attend, return [n, heads * head_dim].

        Args:
            queries: [n, heads, head_dim].
            keys, values: [n, kv_heads, head_dim].
        """


class _Names(msgspec.Struct, frozen=True):
    """What a family's checkpoints call things; "{}" stands for the layer's number."""

    embedding: str
    positions: str
    layer: str
    q: str
    k: str
    v: str
    out: str
    attention_norm: str
    mlp_norm: str
    up: tuple[str, ...]
    down: str
    final_norm: str
    project_in: str = ""
    project_out: str = ""
    head: str = "lm_head"


_LLAMA_NAMES = _Names(
    embedding="model.embed_tokens",
    positions="",
    layer="model.layers.{}.",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out="self_attn.o_proj",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    final_norm="model.norm",
)
_OPT_NAMES = _Names(
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    layer="model.decoder.layers.{}.",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out="self_attn.out_proj",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    up=("fc1",),
    down="fc2",
    final_norm="model.decoder.final_layer_norm",
    project_in="model.decoder.project_in",
    project_out="model.decoder.project_out",
)


class DecoderLayer:
    """Attention and MLP with their norms and residual sums."""

    def __init__(
        self, parameters: Parameters, config: ModelConfig, names: _Names, layer: int
    ) -> None:
        prefix = names.layer.format(layer)
        hidden, dim = config.hidden_size, config.head_dim
        self._heads = [config.num_heads, config.kv_heads, config.kv_heads]
        self._num_rotated = config.num_heads + config.kv_heads
        self.is_pre_norm = config.is_pre_norm
        self.attention_norm = Norm(parameters, prefix + names.attention_norm, hidden, config)
        self.qkv = Linear(
            parameters,
            [
                (prefix + name, heads * dim)
                for name, heads in zip((names.q, names.k, names.v), self._heads, strict=True)
            ],
            hidden,
            has_bias=config.has_qkv_bias,
        )
        self.q_norm = self.k_norm = None
        if config.has_qk_norm:
            self.q_norm = Norm(parameters, prefix + "self_attn.q_norm", dim, config)
            self.k_norm = Norm(parameters, prefix + "self_attn.k_norm", dim, config)
        self.out = Linear(
            parameters,
            [(prefix + names.out, hidden)],
            config.num_heads * dim,
            has_bias=config.has_out_bias,
        )
        self.mlp_norm = Norm(parameters, prefix + names.mlp_norm, hidden, config)
        up = [prefix + name for name in names.up]
        self.mlp = Mlp(parameters, config, up, prefix + names.down)

    def pack(self) -> None:
        """See `Linear.pack`."""
        self.qkv.pack()
        self.out.pack()
        self.mlp.pack()

    def __call__(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, attention: LayerAttention
    ) -> Tensor:
        """[n, hidden] -> [n, hidden]; rotation: cosines and sines, None without RoPE."""
        if self.is_pre_norm:
            x = x + self._attend(self.attention_norm(x), rotation, attention)
            return x.add_(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self._attend(x, rotation, attention))
        return self.mlp_norm(x + self.mlp(x))

    def _attend(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, attention: LayerAttention
    ) -> Tensor:
        heads = self.qkv(x).view(len(x), sum(self._heads), -1)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys, values = torch.split(heads, self._heads, 1)
            heads = torch.cat((self.q_norm(queries), self.k_norm(keys), values), 1)
        if rotation is None:
            queries, keys, values = torch.split(heads, self._heads, 1)
        else:
            rotated = rotate(heads[:, : self._num_rotated], *rotation)
            queries, keys = torch.split(rotated, self._heads[:2], 1)
            values = heads[:, self._num_rotated :]
        return self.out(attention(queries, keys, values))


class Decoder:
    """A decoder-only language model, without KV: attention comes from the caller.

    Its parameters are uninitialised until `weights.load_model` fills them.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self.parameters = parameters = Parameters(dtype, device, config.quantization)
        names = _OPT_NAMES if config.family == "opt" else _LLAMA_NAMES
        hidden, width = config.hidden_size, config.embedding_size
        self.embedding = parameters.one(f"{names.embedding}.weight", config.vocab_size, width)
        self.rotary = self.positions = None
        if config.rope is None:
            rows = config.max_positions + OPT_POSITION_OFFSET
            self.positions = parameters.one(f"{names.positions}.weight", rows, hidden)
        elif device.type != "meta":
            self.rotary = Rotary(config.rope, config.head_dim, dtype, device)
        self.project_in = self.project_out = None
        if width != hidden:
            self.project_in = Linear(parameters, [(names.project_in, hidden)], width)
            self.project_out = Linear(parameters, [(names.project_out, width)], hidden)
        self.layers = [
            DecoderLayer(parameters, config, names, layer) for layer in range(config.num_layers)
        ]
        self.final_norm = None
        if config.has_final_norm:
            self.final_norm = Norm(parameters, names.final_norm, hidden, config)
        self.head = self.embedding
        if not config.is_tied:
            self.head = parameters.one(f"{names.head}.weight", config.vocab_size, width)
        self._packed_head: PackedLinear | None = None

    def finish(self) -> None:
        """All parameters are filled: lay them out for speed, one after the other."""
        self.parameters.by_name.clear()
        for layer in self.layers:
            layer.pack()
        # A tied output layer must stay readable as the embedding; only a small one is worth a copy.
        if not self.config.is_tied or self.head.nbytes <= _SMALL_HEAD_BYTES:
            self._packed_head = pack_linear(self.head, None)
        if not self.config.is_tied and self._packed_head is not None:
            self.head = self.head[:0]

    @property
    def typical_weights(self) -> list[Tensor]:
        """A weight of every shape that a pass multiplies with."""
        layer = self.layers[0]
        linears = (layer.qkv, layer.out, layer.mlp.up, layer.mlp.down)
        return [*(linear.weight for linear in linears), self.head]

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[n, hidden] from [n] token ids and [n] positions, both int64."""
        x = functional.embedding(tokens, self.embedding)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.positions is not None:
            x = x + functional.embedding(positions + OPT_POSITION_OFFSET, self.positions)
        return x

    def run_layer(
        self,
        layer: int,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        attention: LayerAttention,
    ) -> Tensor:
        """[n, hidden] -> [n, hidden]."""
        return self.layers[layer](x, rotation, attention)

    def logits(self, x: Tensor) -> Tensor:
        """[n, vocab] float32 from the last layer's [n, hidden]."""
        if self.final_norm is not None:
            x = self.final_norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        if self._packed_head is not None:
            return self._packed_head(x)
        return functional.linear(x, self.head).float()
