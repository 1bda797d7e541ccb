"""The CUDA device with a model on it: measured first, then given the memory that is left."""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import msgspec

from pie_async.assembly.loading import (
    Files,
    Sizes,
    load,
    make_parts,
    most_blocks,
    read_files,
    size_up,
)
from pie_async.assembly.parts import Limits, Parts, Progress
from pie_async.assembly.sizing import (
    count_device_slots,
    count_host_slots,
    count_staging_slots,
    default_limits,
    model_layout,
)
from pie_async.config import EngineConfig, parse_pool
from pie_async.core.batch_shapes import buckets
from pie_async.core.layout import KvLayout, affordable_groups
from pie_async.core.token_budget import IterationCost, tokens_within
from pie_async.errors import ConfigError, DeviceFault
from pie_async.hardware import require_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pie_async.cuda.attention_choice import Attention
    from pie_async.cuda.card_memory import CardMemory
    from pie_async.cuda.driver import Driver
    from pie_async.cuda.flashinfer_attention import Heads
    from pie_async.cuda.fused_decoder import Product
    from pie_async.cuda.fused_runner import FusedRunner
    from pie_async.cuda.plain_runner import PlainRunner
    from pie_async.model.config import ModelConfig
    from pie_async.model.decoder import Decoder

_log = logging.getLogger(__name__)

LARGEST_HEAD_DIM = 256


def assemble_cuda(config: EngineConfig, progress: Progress | None) -> Parts:
    """See `assemble`. When it fails, everything it took is given back first."""
    from pie_async.cuda.errors import require_cuda

    require_cuda(config.quantization)  # before cuda-python is imported, which may be missing
    import torch

    from pie_async.cuda.driver import Driver
    from pie_async.cuda.peer_arena import open_peer

    place = parse_pool(config.pool)
    if place.peer is None:
        require_memory(config.host_pool_bytes, option="host_pool_bytes")
    files = read_files(config)
    require_cuda("fp8" if files.config.quantization else None)  # the checkpoint's own
    check_kernels(config, files.config)
    dtype: torch.dtype = getattr(torch, files.dtype_name)
    check_attention(config, files.config, dtype)
    driver = Driver(torch.device("cuda"))
    undo = ExitStack()
    undo.callback(driver.close)
    try:
        if place.peer is not None:
            open_peer(driver, place.peer, config.host_pool_bytes)
        return _assemble_on(driver, config, files, dtype, progress, undo)
    except BaseException as error:
        _forget_locals(error)
        # A context that is lost refuses to free what is lost with it.
        with suppress(DeviceFault, RuntimeError):
            undo.close()
        raise


def _assemble_on(
    driver: Driver,
    config: EngineConfig,
    files: Files,
    dtype: torch.dtype,
    progress: Progress | None,
    undo: ExitStack,
) -> Parts:
    """Fill the card.

    Args:
        undo: closes what is open, on failure; the driver at first.
    """
    import torch

    from pie_async.cuda.card_memory import CardMemory
    from pie_async.cuda.device import CudaDevice
    from pie_async.model.guides import mask_shape

    memory = CardMemory(driver, config.gpu_memory)
    memory.require_weights(files.config.weight_bytes(dtype.itemsize), files.dtype_name)
    limits = _cuda_limits(config, files, dtype, driver, memory)
    decoder = load(config, files, dtype, driver.device, progress)
    layout = msgspec.structs.replace(
        _layout(config, files, dtype, driver),
        is_stacked=config.kernels != "torch",  # which wants a layer's slots contiguous
    )
    product = _tuned(config, limits, decoder)
    attention = _attention(config, files.config, dtype, driver.device)
    staging_slots = count_staging_slots(config, layout, count_host_slots(config, layout))
    device_slots = _cuda_slots(
        config, files, layout, dtype, decoder, memory, limits, product, attention, staging_slots
    )
    sizes = size_up(config, files, layout, device_slots, staging_slots=staging_slots)
    device = CudaDevice(
        driver,
        layout,
        device_slots=sizes.device_slots,
        host_slots=sizes.host_slots,
        staging_slots=sizes.staging_slots,
        dtype=dtype,
        poisons=config.debug and not config.exchange,
        checks_copies=config.check_copies,
        in_neighbour=parse_pool(config.pool).peer is not None,
    )
    undo.pop_all()  # the device closes the driver
    undo.callback(device.close)
    runner = _cuda_runner(config, limits, sizes, decoder, product, attention, device.arena.layers)
    masks = torch.zeros(
        mask_shape(limits.max_running_sequences, files.config.vocab_size),
        dtype=torch.int32,
        pin_memory=driver.device.type == "cuda",  # else a driver of a test stands in
    )
    runner.use_masks(masks)
    with ExitStack() as until_loaded:
        until_loaded.callback(runner.close)
        device.load(runner)
        until_loaded.pop_all()  # the device closes the runner
    memory.settle(runner)
    parts = make_parts(config, files, sizes, limits, device, masks.numpy())
    return msgspec.structs.replace(
        parts,
        decode_floor_s=memory.report(runner).weight_bytes / driver.memory_bytes_per_s,
        gpu_memory=lambda: memory.report(runner),
    )


def _forget_locals(error: BaseException) -> None:
    """Let go of what the calls that failed still hold, above all the weights: whoever keeps the
    error keeps them, and torch cannot give their memory back to the card."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__context__
    gc.collect()


def check_kernels(config: EngineConfig, model: ModelConfig) -> None:
    """Refuse what the Triton kernels cannot do before anything is loaded.

    Raises:
        ConfigError: names the option.
    """
    if config.kernels != "triton":
        return
    if config.block_tokens & (config.block_tokens - 1):
        raise ConfigError(
            f"block_tokens must be a power of two on the GPU, not {config.block_tokens}; "
            "or use kernels torch, which is slow",
            option="block_tokens",
        )
    if model.head_dim > LARGEST_HEAD_DIM:
        raise ConfigError(
            f"heads of {model.head_dim} are too large for the attention kernels, which take up to "
            f"{LARGEST_HEAD_DIM}; use kernels torch, which is slow",
            option="kernels",
        )


def check_attention(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> None:
    """Refuse a FlashInfer that is asked for and cannot be used, before anything is loaded.

    Raises:
        ConfigError: says why.
    """
    if config.attention != "flashinfer":
        return
    import torch

    from pie_async.cuda.flashinfer_attention import refusal

    reason = refusal(_heads(config, model, dtype), torch.cuda.get_device_capability())
    if config.kernels == "torch":
        reason = "kernels torch computes everything with torch"
    elif None not in model.windows:
        reason = f"{config.model} attends within a window in every layer, which Triton computes"
    if reason is not None:
        raise ConfigError(f"attention flashinfer cannot be used: {reason}", option="attention")


def _heads(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> Heads:
    from pie_async.cuda.flashinfer_attention import Heads

    return Heads(model.num_heads, model.kv_heads, model.head_dim, config.block_tokens, dtype)


def _cuda_limits(
    config: EngineConfig, files: Files, dtype: torch.dtype, driver: Driver, memory: CardMemory
) -> Limits:
    """As configured, or with the token budget that the ITL target allows on this card."""
    limits = default_limits(config)
    if config.itl_target_s is None:
        return limits
    from pie_async.cuda.rates import measure_rates

    model, rates = files.config, measure_rates(driver, dtype)
    weight_bytes = model.weight_bytes(dtype.itemsize)
    cost = IterationCost(
        weight_bytes=weight_bytes,
        # The arena is seldom full of what one iteration reads.
        kv_bytes=max(0, memory.kv_room_bytes - weight_bytes) // 2,
        flops_per_token=2.0 * model.num_parameters,
        read_bytes_per_s=rates.read_bytes_per_s,
        flops_per_s=rates.flops_per_s,
    )
    rows = limits.max_running_sequences
    budget = tokens_within(config.itl_target_s, cost, decode_rows=rows)
    _log.info("token budget for an ITL of %g s: %d", config.itl_target_s, budget)
    return limits._replace(token_budget=budget)


def _layout(config: EngineConfig, files: Files, dtype: torch.dtype, driver: Driver) -> KvLayout:
    """In as many layer groups as configured, or as this card passes through at little cost."""
    model = files.config
    if not config.host_pool_bytes or config.layer_group is not None:
        return model_layout(config, model, dtype.itemsize)
    from pie_async.cuda.rates import measure_boundary

    boundary_s = measure_boundary(driver)
    floor_s = model.weight_bytes(dtype.itemsize) / driver.memory_bytes_per_s
    groups = affordable_groups(boundary_s, floor_s)
    layout = model_layout(config, model, dtype.itemsize, groups=groups)
    _log.info(
        "%d layer groups, %d of them in the staging ring: a boundary between two takes %.1f us, "
        "the shortest iteration %.2f ms",
        layout.num_groups,
        layout.ring_depth,
        boundary_s * 1e6,
        floor_s * 1e3,
    )
    return layout


def _cuda_slots(
    config: EngineConfig,
    files: Files,
    layout: KvLayout,
    dtype: torch.dtype,
    decoder: Decoder,
    memory: CardMemory,
    limits: Limits,
    product: Product | None,
    attention: Attention,
    staging_slots: int,
) -> int:
    """Slots of the arena: as configured, or what is left under the cap."""
    wanted = None if config.device_kv_bytes is None else count_device_slots(config, layout)
    longest = config.max_model_len or files.config.max_positions
    profiled = Sizes(layout, 0, 0, staging_slots, longest, 0)
    return memory.plan(
        lambda layers: _cuda_runner(config, limits, profiled, decoder, product, attention, layers),
        layout,
        dtype,
        device_slots=wanted,
        staging_slots=staging_slots,
        token_budget=limits.token_budget,
        decode_rows=limits.max_running_sequences,
    ).device_slots


def _tuned(config: EngineConfig, limits: Limits, decoder: Decoder) -> Product | None:
    """The fastest products for this model on this card; None where torch's own are asked for."""
    if config.kernels == "torch":
        return None
    from pie_async.cuda.tuning import Tuner

    quantization = decoder.config.quantization
    tuner = Tuner(quantizes_activations=quantization is None or quantization.quantizes_activations)
    tuner.prepare(decoder.typical_weights, buckets(limits.max_running_sequences))
    return tuner


def _attention(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Attention:
    """What attention of prompts is computed with, in layers without a window."""
    if config.kernels == "torch" or None not in model.windows:
        return "triton"
    from pie_async.cuda.attention_choice import choose_attention

    return choose_attention(config.attention, _heads(config, model, dtype), device)


def _cuda_runner(
    config: EngineConfig,
    limits: Limits,
    sizes: Sizes,
    decoder: Decoder,
    product: Product | None,
    attention: Attention,
    layers: Sequence[Tensor],
) -> PlainRunner | FusedRunner:
    from pie_async.cuda.plain_runner import PlainRunner

    lanes, max_blocks = limits.max_running_sequences, most_blocks(sizes)
    if product is None:
        return PlainRunner(
            decoder,
            layers,
            lanes=lanes,
            max_blocks=max_blocks,
            block_tokens=config.block_tokens,
        )
    from pie_async.cuda.fused_runner import FusedRunner

    return FusedRunner(
        decoder,
        layers,
        sizes.layout,
        lanes=lanes,
        max_blocks=max_blocks,
        max_tokens=limits.token_budget,
        product=product,
        streams=sizes.staging_slots > 0,
        uses_graphs=config.cuda_graphs,
        uses_flashinfer=attention == "flashinfer",
    )
