"""What the hardware needs at best for what a row measures."""

from __future__ import annotations

from typing import NamedTuple

from pie_async.assembly.loading import read_model
from pie_async.assembly.on_sim import shape_of as sizes_of
from pie_async.config import EngineConfig
from pie_async.device.cost_model import GPUS, LINKS, CostModel, ModelShape, Work

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Roofline(NamedTuple):
    """One model on one card."""

    shape: ModelShape
    read_bytes_per_s: float
    flops_per_s: float
    """Of a large dense product, as measured here."""

    def decode_s(self, batch: int, context: int) -> float:
        """Weights and KV, read once."""
        model = CostModel(gpu=GPUS["h200"], link=LINKS["pcie5"], shape=self.shape)
        seconds = model.roofline_s(Work.decode(batch, context))
        return seconds * GPUS["h200"].hbm_bytes_per_s / self.read_bytes_per_s

    def prefill_flops(self, batch: int, tokens: int) -> float:
        """Of prompts of so many tokens: products, causal attention and one row of logits each."""
        shape = self.shape
        matrices = 2 * shape.num_layers * shape.layer_parameters * batch * tokens
        pairs = batch * tokens * (tokens + 1) / 2
        attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * pairs
        return matrices + attention + 2 * shape.head_parameters * batch

    def prefill_s(self, batch: int, tokens: int) -> float:
        return self.prefill_flops(batch, tokens) / self.flops_per_s

    def attention_s(self, batch: int, context: int) -> float:
        """One layer's decode attention: its KV, read once."""
        return batch * context * self.shape.token_layer_kv_bytes / self.read_bytes_per_s


def shape_of(config: EngineConfig, dtype: str) -> ModelShape:
    """The sizes of the model that an engine of this configuration runs."""
    _, model = read_model(config)
    item_bytes = ITEM_BYTES[dtype]
    return sizes_of(model, weight_item_bytes=item_bytes, kv_item_bytes=item_bytes)
