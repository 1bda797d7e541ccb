"""What an engine would set aside for a model, worked out before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from pie_async.assembly.loading import read_model, refuse_quantization, served_name
from pie_async.assembly.sizing import (
    FEWEST_DEVICE_SLOTS,
    compute_dtype,
    count_device_slots,
    count_host_slots,
    count_staging_slots,
    longest_sequence,
    model_layout,
)
from pie_async.config import (
    DEVICE_KV_BYTES,
    GIB,
    MIB,
    EngineConfig,
    format_size,
    parse_pool,
)
from pie_async.core.layout import KvLayout
from pie_async.hardware import read_hardware, usable_bytes

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Where the bytes go. Tokens are counted over all sequences together."""

    model: str
    family: str
    dtype: str
    num_parameters: int
    weight_bytes: int
    num_layers: int
    block_tokens: int
    block_bytes: int
    """One block in all layers."""
    token_bytes: int
    device_kv_bytes: int
    is_on_gpu: bool
    """Weights and arena; the host pool never is."""
    is_estimated: bool
    """Whether the arena gets what is left on the GPU, which only loading the model can tell."""
    device_blocks: int
    device_tokens: int
    pool: str
    """`EngineConfig.pool`."""
    host_pool_bytes: int
    host_blocks: int
    host_tokens: int
    staging_bytes: int
    """Most that the staging ring takes; it grows to that only on the CPU."""
    slack_bytes: int | None
    """What stays free of the memory that weights and arena are in, about; None: not told."""
    max_model_len: int
    sequences: dict[int, tuple[int, int]]
    """By length in tokens: how many such sequences the arena holds, and arena and pool."""


def memory_plan(config: EngineConfig) -> MemoryPlan:
    """The plan for a configuration; reads the model's config.json, never its weights.

    Raises:
        ConfigError, ModelError: as the engine itself would, before it loads anything.
    """
    if config.device != "cuda":
        refuse_quantization(config)
    shape = _sim_shape(config) if config.device == "sim" else _model_shape(config)
    layout = shape.layout
    host_blocks = count_host_slots(config, layout)
    device_blocks = _device_blocks(config, shape)
    longest = longest_sequence(config, layout, shape.max_positions, device_blocks + host_blocks)
    return MemoryPlan(
        model=shape.name,
        family=shape.family,
        dtype=shape.dtype,
        num_parameters=shape.num_parameters,
        weight_bytes=shape.weight_bytes,
        num_layers=layout.num_layers,
        block_tokens=layout.block_tokens,
        block_bytes=layout.block_bytes,
        token_bytes=layout.block_bytes // layout.block_tokens,
        device_kv_bytes=(
            device_blocks * layout.block_bytes
            if _is_left_over(config)
            else config.device_kv_bytes or DEVICE_KV_BYTES
        ),
        is_on_gpu=config.device == "cuda",
        is_estimated=_is_left_over(config),
        device_blocks=device_blocks,
        device_tokens=device_blocks * layout.block_tokens,
        pool=config.pool,
        host_pool_bytes=config.host_pool_bytes,
        host_blocks=host_blocks,
        host_tokens=host_blocks * layout.block_tokens,
        staging_bytes=_staging_bytes(config, layout, host_blocks),
        slack_bytes=_slack_bytes(config, shape, device_blocks, host_blocks),
        max_model_len=longest,
        sequences={
            length: (
                device_blocks // layout.blocks_for(length),
                (device_blocks + host_blocks) // layout.blocks_for(length),
            )
            for length in (512, 1024, 4096, 16384, 65536)
            if length <= longest
        },
    )


def plan_lines(plan: MemoryPlan) -> Iterator[str]:
    """The plan in a few lines for people."""
    yield (
        f"{plan.model}: {plan.family}, {plan.num_parameters / 1e6:,.1f}M parameters in "
        f"{plan.dtype} ({format_size(plan.weight_bytes)}), context {plan.max_model_len:,} tokens"
    )
    yield (
        f"one KV block: {plan.block_tokens} tokens, {format_size(plan.block_bytes)} over "
        f"{plan.num_layers} layers ({format_size(plan.token_bytes)} per token)"
    )
    about = "about " if plan.is_estimated else ""
    flag = "--gpu-memory" if plan.is_estimated else "--device-kv"
    yield (
        f"device arena {about}{format_size(plan.device_kv_bytes)}: {plan.device_blocks:,} blocks, "
        f"{plan.device_tokens:,} tokens resident ({flag})"
    )
    if plan.host_blocks:
        yield (
            f"{_pool(plan)} up to {format_size(plan.host_pool_bytes)}: "
            f"{plan.host_blocks:,} blocks, {plan.host_tokens:,} more tokens (--host-pool)"
        )
    else:
        yield f"{_pool(plan)} off: what does not fit is recomputed (--host-pool)"
    staging = f"staging up to {format_size(plan.staging_bytes)}, " if plan.staging_bytes else ""
    slack = f"; {format_size(plan.slack_bytes)} of memory to spare" if plan.slack_bytes else ""
    yield (
        f"in all: weights {format_size(plan.weight_bytes)}, KV {about}"
        f"{format_size(plan.device_kv_bytes)}, {staging}"
        f"pool up to {format_size(plan.host_pool_bytes)}{slack}"
    )


def _staging_bytes(config: EngineConfig, layout: KvLayout, host_blocks: int) -> int:
    """Of the ring: `ring_layers` one-layer buffers of all blocks that an iteration may stream."""
    slots = host_blocks
    if config.device == "cuda" or config.max_streamed_bytes is not None:
        slots = count_staging_slots(config, layout, host_blocks)
    return slots * layout.ring_layers * layout.layer_block_bytes


def _slack_bytes(
    config: EngineConfig, shape: _Shape, device_blocks: int, host_blocks: int
) -> int | None:
    usable = usable_bytes(read_hardware())
    if config.device != "cpu" or usable is None:
        return None  # a GPU's is measured once the model is loaded
    layout = shape.layout
    taken = shape.weight_bytes + (device_blocks + host_blocks) * layout.block_bytes
    return max(0, usable - taken - _staging_bytes(config, layout, host_blocks))


def _pool(plan: MemoryPlan) -> str:
    peer = parse_pool(plan.pool).peer
    return "host pool" if peer is None else f"pool in the memory of GPU {peer}"


def _is_left_over(config: EngineConfig) -> bool:
    return config.device == "cuda" and config.device_kv_bytes is None


def _device_blocks(config: EngineConfig, shape: _Shape) -> int:
    """Of the arena; where it gets what is left on the GPU, about as many as that will be.

    Raises:
        ConfigError: the weights do not fit, or the arena is too small.
    """
    if not _is_left_over(config):
        return count_device_slots(config, shape.layout)
    import torch

    from pie_async.cuda.errors import require_cuda
    from pie_async.cuda.memory_budget import Card, require_weights

    require_cuda(config.quantization)
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    card = Card(total_bytes=total_bytes, free_bytes=total_bytes - _CONTEXT_BYTES)
    cap_bytes = card.cap_bytes(config.gpu_memory)
    require_weights(
        shape.weight_bytes,
        card,
        cap_bytes,
        gpu=torch.cuda.get_device_name(0),
        dtype_name=shape.dtype,
    )
    left_bytes = cap_bytes - card.context_bytes - shape.weight_bytes - _WORK_BYTES
    return max(FEWEST_DEVICE_SLOTS, left_bytes // shape.layout.block_bytes)


_CONTEXT_BYTES = 600 * MIB
_WORK_BYTES = 3 * GIB
"""Activations, graphs and the like; the engine measures them."""


class _Shape(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    family: str
    dtype: str
    num_parameters: int
    weight_bytes: int
    max_positions: int
    layout: KvLayout


def _model_shape(config: EngineConfig) -> _Shape:
    _, model = read_model(config)
    dtype = compute_dtype(config, model.dtype)
    return _Shape(
        name=served_name(config.model),
        family=model.family,
        dtype=dtype,
        num_parameters=model.num_parameters,
        weight_bytes=model.num_parameters * ITEM_BYTES[dtype],
        max_positions=model.max_positions,
        layout=model_layout(config, model, ITEM_BYTES[dtype]),
    )


def _sim_shape(config: EngineConfig) -> _Shape:
    from pie_async.assembly.on_sim import SIM_POSITIONS, sim_shape  # loads numpy

    name, shape = sim_shape(config.model)
    return _Shape(
        name=name,
        family="simulated",
        dtype="bfloat16",
        num_parameters=shape.weight_bytes // shape.weight_item_bytes,
        weight_bytes=shape.weight_bytes,
        max_positions=SIM_POSITIONS,
        layout=model_layout(config, shape, shape.kv_item_bytes),
    )


def memory_warning(plan: MemoryPlan) -> str | None:
    """What to lower if the plan exceeds this machine's memory; None if it fits."""
    usable = usable_bytes(read_hardware())
    if plan.family == "simulated" or usable is None:
        return None
    wanted = plan.host_pool_bytes if parse_pool(plan.pool).peer is None else 0
    if not plan.is_on_gpu:
        wanted += plan.weight_bytes + plan.device_kv_bytes
    if wanted <= usable:
        return None
    parts = "the pool" if plan.is_on_gpu else "weights, arena and pool"
    flags = "--host-pool" if plan.is_on_gpu else "--host-pool or --device-kv"
    return (
        f"warning: {parts} may take {format_size(wanted)}, but {format_size(usable)} of memory "
        f"are free; lower {flags}"
    )
