"""The simulated device: no weights, a named shape's costs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pie_async.assembly.byte_tokenizer import ByteTokenizer
from pie_async.assembly.loading import refuse_quantization
from pie_async.assembly.parts import Parts
from pie_async.assembly.sizing import (
    count_device_slots,
    count_host_slots,
    count_staging_slots,
    default_limits,
    longest_sequence,
    model_layout,
)
from pie_async.config import BUILTIN_MODEL, EngineConfig
from pie_async.core.batch_shapes import batch_shape
from pie_async.device.cost_model import (
    CostModel,
    ModelShape,
    gpu_named,
    link_named,
    shape_named,
)
from pie_async.device.protocol import MemoryPlan, chunk_slots_of
from pie_async.device.sim import SimDevice
from pie_async.model.guides import GuideCompiler, GuideRoom, TimedGuides, mask_shape
from pie_async.model_info import ModelInfo

if TYPE_CHECKING:
    from pie_async.model.config import ModelConfig

SIM_MODEL = "llama-3.1-8b"
"""The shape that stands for "builtin" on the simulated device."""
SIM_POSITIONS = 131_072


def sim_shape(model: str) -> tuple[str, ModelShape]:
    """A model's name and sizes: a named shape, or that of a directory's config.json.

    Raises:
        ConfigError, ModelError: there is no such shape, or the directory holds no supported model.
    """
    if not Path(model).is_dir():
        name = SIM_MODEL if model == BUILTIN_MODEL else model
        return name, shape_named(name)
    from pie_async.model.config import read_config

    read = read_config(Path(model))
    weight_item_bytes = 2 if read.quantization is None else 1
    return Path(model).resolve().name, shape_of(read, weight_item_bytes=weight_item_bytes)


def shape_of(
    model: ModelConfig, *, weight_item_bytes: int = 2, kv_item_bytes: int = 2
) -> ModelShape:
    """The sizes of a model that the cost model asks for."""
    return ModelShape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        intermediate_size=model.intermediate_size,
        vocab_size=model.vocab_size,
        is_gated=model.is_gated,
        weight_item_bytes=weight_item_bytes,
        kv_item_bytes=kv_item_bytes,
    )


def assemble_sim(config: EngineConfig) -> Parts:
    """See `assemble`."""
    refuse_quantization(config)
    name, shape = sim_shape(config.model)
    layout = model_layout(config, shape, shape.kv_item_bytes)
    device_slots = count_device_slots(config, layout)
    host_slots = count_host_slots(config, layout)
    # All of the pool, unless told: a ring that limits what is streamed is a card's affair.
    staging_slots = host_slots
    if config.max_streamed_bytes is not None:
        staging_slots = count_staging_slots(config, layout, host_slots)
    memory = MemoryPlan(
        layout=layout,
        device_slots=device_slots,
        first_staging_slot=device_slots,
        staging_slots=staging_slots,
        host_slots=host_slots,
        first_host_slots=host_slots,
        chunk_slots=chunk_slots_of(layout, host_slots),
    )
    cost = CostModel(gpu=gpu_named(config.sim_gpu), link=link_named(config.sim_link), shape=shape)
    info = ModelInfo(
        name=name,
        family="simulated",
        dtype="bfloat16",
        vocab_size=shape.vocab_size,
        max_model_len=longest_sequence(config, layout, SIM_POSITIONS, device_slots + staging_slots),
        num_parameters=shape.weight_bytes // shape.weight_item_bytes,
        weight_bytes=shape.weight_bytes,
    )
    limits = default_limits(config)
    device = SimDevice(
        memory=memory,
        cost=cost,
        seed=config.seed,
        checked=config.debug,
        checks_copies=config.check_copies,
        padded=partial(
            batch_shape,
            largest=limits.max_running_sequences if config.cuda_graphs else 0,
            max_tokens=limits.token_budget,
        ),
    )
    tokenizer = ByteTokenizer(shape.vocab_size)
    compiler = GuideCompiler(tokenizer, shape.vocab_size, (), is_inline=True)
    masks = np.zeros(mask_shape(limits.max_running_sequences, shape.vocab_size), np.int32)
    device.use_masks(masks)
    return Parts(
        device=device,
        tokenizer=tokenizer,
        model=info,
        eos_ids=frozenset(),
        limits=limits,
        guides=TimedGuides(GuideRoom(compiler, masks)),
        compiler=compiler,
        decode_floor_s=shape.weight_bytes / cost.gpu.hbm_bytes_per_s,
    )
