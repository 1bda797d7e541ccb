"""The CPU device with a model on it."""

from __future__ import annotations

import os

import torch

from pie_async.assembly.loading import (
    load,
    make_parts,
    most_blocks,
    read_files,
    refuse_quantization,
    size_up,
)
from pie_async.assembly.parts import Parts, Progress
from pie_async.assembly.sizing import count_device_slots, default_limits, model_layout
from pie_async.config import EngineConfig
from pie_async.device.cpu import CpuDevice
from pie_async.hardware import require_memory
from pie_async.model.guides import mask_shape
from pie_async.model.runner import ModelRunner


def assemble_cpu(config: EngineConfig, progress: Progress | None) -> Parts:
    """See `assemble`."""
    refuse_quantization(config)
    require_memory(config.host_pool_bytes, option="host_pool_bytes")
    require_memory(config.device_kv_bytes or 0, option="device_kv_bytes")
    files = read_files(config)
    limits = default_limits(config)
    dtype: torch.dtype = getattr(torch, files.dtype_name)
    layout = model_layout(config, files.config, dtype.itemsize)
    sizes = size_up(config, files, layout, count_device_slots(config, layout))
    decoder = load(config, files, dtype, torch.device("cpu"), progress)
    device = CpuDevice(
        layout,
        device_slots=sizes.device_slots,
        host_slots=sizes.host_slots,
        dtype=dtype,
        link_bytes_per_s=config.link_bytes_per_s,
        threads=config.cpu_threads or default_threads(),
        poisons=config.debug and not config.exchange,
        checks_copies=config.check_copies,
    )
    runner = ModelRunner(
        decoder,
        device.arena.layers,
        lanes=limits.max_running_sequences,
        max_blocks=most_blocks(sizes),
        block_tokens=config.block_tokens,
    )
    masks = torch.zeros(
        mask_shape(limits.max_running_sequences, files.config.vocab_size), dtype=torch.int32
    )
    runner.use_masks(masks)
    device.load(runner)
    return make_parts(config, files, sizes, limits, device, masks.numpy())


def default_threads() -> int:
    """All cores but one, which is left to the copy streams and the event loop.

    A torch operation is as slow as the slowest of its threads, so one that shares its core
    costs more than it adds.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) - 1)
