"""How much of everything there will be, from configuration and model shape alone."""

from __future__ import annotations

from typing import Protocol

from pie_async.assembly.parts import Limits
from pie_async.config import (
    DEVICE_KV_BYTES,
    MAX_STREAMED_BYTES,
    PEER_MAX_STREAMED_BYTES,
    EngineConfig,
    format_size,
    parse_pool,
)
from pie_async.core.layout import KvLayout, count_groups
from pie_async.core.token_budget import UNLIMITED_TOKENS
from pie_async.errors import ConfigError

FEWEST_DEVICE_SLOTS = 4
"""A tail block being written, the next one, and two on their way out."""
CPU_LAYER_GROUPS = 4
"""Layer groups that the CPU device stages one after the other, unless configured."""
GPU_LAYER_GROUPS = 8
"""Layer groups on a GPU, unless configured or measured. Fewer make the staging ring larger; more
cost time: every one is a graph and two waits."""
RING_DEPTH = 2
"""Layer groups in the staging ring, unless configured: one is read while the next is filled. A
third gains nothing: an H200's iterations were 1.044 instead of 1.033 to 1.039 of resident ones."""
SPARE_SLOTS = 3
"""Slots that one sequence alone cannot fill: its next block, and copies under way."""


def default_limits(config: EngineConfig) -> Limits:
    """What an iteration may hold: as configured, else what suits the device.

    An ITL target comes on top: it needs the card's measured rates.
    """
    is_gpu = config.device == "cuda"
    return Limits(
        token_budget=config.token_budget or (UNLIMITED_TOKENS if is_gpu else 512),
        max_running_sequences=config.max_running_sequences or (256 if is_gpu else 64),
    )


def compute_dtype(config: EngineConfig, model_dtype: str) -> str:
    """What the model computes in: as configured, else what suits the device."""
    if config.dtype != "auto":
        return config.dtype
    return model_dtype if config.device == "cuda" else "float32"


class _KvShape(Protocol):
    """The part of a model's sizes on which its KV depends."""

    @property
    def num_layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def model_layout(
    config: EngineConfig, shape: _KvShape, item_bytes: int, *, groups: int | None = None
) -> KvLayout:
    """How KV is cut up, on any device.

    Unless configured, layers are staged in a few groups: handing one over between threads costs
    the CPU as much as computing a small layer.

    Args:
        groups: what suits this device, if that was measured.
    """
    wanted = groups or (CPU_LAYER_GROUPS if config.device == "cpu" else GPU_LAYER_GROUPS)
    if config.layer_group is not None:
        wanted = -(-shape.num_layers // config.layer_group)
    ring_depth = config.ring_depth or RING_DEPTH
    num_groups = count_groups(shape.num_layers, wanted, ring_depth)
    return KvLayout(
        num_layers=shape.num_layers,
        block_tokens=config.block_tokens,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        item_bytes=item_bytes,
        num_groups=num_groups,
        ring_depth=min(ring_depth, num_groups),
    )


def count_device_slots(config: EngineConfig, layout: KvLayout) -> int:
    """Slots of a device arena whose size is set, or the default's.

    Raises:
        ConfigError: it holds too few blocks to run anything.
    """
    arena_bytes = config.device_kv_bytes or DEVICE_KV_BYTES
    device_slots = arena_bytes // layout.block_bytes
    if device_slots < FEWEST_DEVICE_SLOTS:
        least = FEWEST_DEVICE_SLOTS * layout.block_bytes
        raise ConfigError(
            f"device_kv_bytes is {format_size(arena_bytes)}, which holds "
            f"{device_slots} KV blocks of {format_size(layout.block_bytes)}; "
            f"give it at least {format_size(least)} or lower block_tokens",
            option="device_kv_bytes",
        )
    return device_slots


def count_host_slots(config: EngineConfig, layout: KvLayout) -> int:
    """Slots of the pool, in whichever memory it lies.

    Raises:
        ConfigError: it is less than one block.
    """
    host_slots = config.host_pool_bytes // layout.block_bytes
    if config.host_pool_bytes and not host_slots:
        raise ConfigError(
            f"host_pool_bytes is {format_size(config.host_pool_bytes)}, less than one KV block "
            f"of {format_size(layout.block_bytes)}; raise it, or set it to 0 to switch pooling off",
            option="host_pool_bytes",
        )
    return host_slots


def count_staging_slots(config: EngineConfig, layout: KvLayout, host_slots: int) -> int:
    """Blocks that one iteration on a GPU may stream.

    Raises:
        ConfigError: less than one block.
    """
    if config.max_streamed_bytes is not None:
        slots = config.max_streamed_bytes // layout.block_bytes
        if host_slots and not slots:
            raise ConfigError(
                f"max_streamed_bytes is {format_size(config.max_streamed_bytes)}, less than one "
                f"KV block of {format_size(layout.block_bytes)}; raise it, or set host_pool_bytes "
                "to 0 to switch pooling off",
                option="max_streamed_bytes",
            )
        return min(host_slots, slots)
    is_near = parse_pool(config.pool).peer is not None
    most_bytes = PEER_MAX_STREAMED_BYTES if is_near else MAX_STREAMED_BYTES
    slots = max(1, most_bytes // layout.block_bytes)
    if config.max_model_len is not None and config.device_kv_bytes is not None:
        longest = layout.blocks_for(config.max_model_len) + SPARE_SLOTS
        slots = max(slots, longest - count_device_slots(config, layout))
    return min(host_slots, slots)


def longest_sequence(config: EngineConfig, layout: KvLayout, max_positions: int, slots: int) -> int:
    """Most tokens a sequence may have: the model's limit, and what both memories hold.

    Args:
        slots: of the device arena, and of the host pool those that one iteration can stream.

    Raises:
        ConfigError: `max_model_len` asks for more than either allows.
    """
    fits = (slots - SPARE_SLOTS) * layout.block_tokens
    wanted = config.max_model_len
    if wanted is None:
        return min(max_positions, fits)
    if wanted > max_positions:
        raise ConfigError(
            f"max_model_len {wanted} is more than the model's {max_positions} positions",
            option="max_model_len",
        )
    if wanted > fits:
        raise ConfigError(
            f"max_model_len {wanted} does not fit: device and host pool together hold "
            f"{fits} tokens of one sequence; raise host_pool_bytes or device_kv_bytes, or on a "
            "GPU max_streamed_bytes",
            option="max_model_len",
        )
    return wanted
