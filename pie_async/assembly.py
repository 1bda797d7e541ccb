"""Builds what an engine is made of from its configuration: model, tokenizer, device."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from pie_async.config import BUILTIN_MODEL, DEVICE_KV_BYTES, EngineConfig, format_size
from pie_async.core.layout import KvLayout
from pie_async.core.token_budget import UNLIMITED_TOKENS, IterationCost, tokens_within
from pie_async.cuda.memory_budget import GpuMemory
from pie_async.device.protocol import Device, MemoryPlan
from pie_async.errors import ConfigError, ModelError
from pie_async.model_info import ModelInfo
from pie_async.request_stream import TextDecoder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pie_async.cuda.card_memory import CardMemory
    from pie_async.cuda.driver import Driver
    from pie_async.cuda.fused_decoder import Product
    from pie_async.cuda.fused_runner import FusedRunner
    from pie_async.cuda.plain_runner import PlainRunner
    from pie_async.device.cost_model import ModelShape
    from pie_async.model.config import ModelConfig
    from pie_async.model.decoder import Decoder
    from pie_async.model.runner import ModelRunner

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Told (bytes loaded, bytes in all)."""

ChatMessage = Mapping[str, str]

FEWEST_DEVICE_SLOTS = 4
"""A tail block being written, the next one, and two on their way out."""
CPU_LAYER_GROUPS = 3
"""Layer groups that the CPU device stages one after the other, unless configured."""
SPARE_SLOTS = 3
"""Slots that one sequence alone cannot fill: its next block, and copies under way."""


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer (`model/tokenizer.py`)."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...
    def token_text(self, token: int) -> str: ...
    def detokenizer(
        self, prompt_tokens: Sequence[int], *, skip_special_tokens: bool = True
    ) -> TextDecoder: ...


class Limits(NamedTuple):
    """What an iteration may hold at most."""

    token_budget: int
    max_running_sequences: int


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded model on a device that is not started yet."""

    device: Device
    tokenizer: Tokenizer
    model: ModelInfo
    eos_ids: frozenset[int]
    limits: Limits
    gpu_memory: Callable[[], GpuMemory] | None = None
    """Where the card's memory is, as of the call; None without a card."""


def assemble(config: EngineConfig, *, progress: Progress | None = None) -> Parts:
    """Load the model and set the device's memory aside. Blocks for as long as that takes.

    Raises:
        ConfigError: memory sizes that cannot work, naming the option.
        ModelError: the model is missing, damaged or not supported.
    """
    if config.device == "sim":
        return _assemble_sim(config)
    if config.device == "cuda":
        return _assemble_cuda(config, progress)
    return _assemble_cpu(config, progress)


def _assemble_cpu(config: EngineConfig, progress: Progress | None) -> Parts:
    import torch  # torch takes a second to import; `import pie_async` must not pay for it

    from pie_async.device.cpu import CpuDevice

    refuse_quantization(config)
    files = _read_files(config)
    limits = default_limits(config)
    dtype: torch.dtype = getattr(torch, files.dtype_name)
    layout = model_layout(config, files.config, dtype.itemsize)
    sizes = _size_up(config, files, layout, count_device_slots(config, layout))
    decoder = _load(config, files, dtype, torch.device("cpu"), progress)
    device = CpuDevice(
        layout,
        device_slots=sizes.device_slots,
        host_slots=sizes.host_slots,
        dtype=dtype,
        link_bytes_per_s=config.link_bytes_per_s,
        threads=config.cpu_threads or default_threads(),
        poisons=config.debug,
    )
    device.load(_runner(config, limits, sizes, decoder, device.arena.layers))
    return _parts(config, files, sizes, limits, device)


def refuse_quantization(config: EngineConfig) -> None:
    if config.quantization is not None:
        raise ConfigError(
            f"quantization {config.quantization} needs device cuda, not {config.device}",
            option="quantization",
        )


def _load(
    config: EngineConfig,
    files: _Files,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None,
) -> Decoder:
    """The model, its parameters filled as configured."""
    if config.load_format == "random":
        from pie_async.model.random_weights import random_model

        return random_model(files.config, dtype, device, seed=config.seed)
    from pie_async.model.weights import load_model

    assert files.path is not None
    return load_model(files.path, files.config, dtype, device, progress=progress)


# --- the CUDA device ------------------------------------------------------------------------


def _assemble_cuda(config: EngineConfig, progress: Progress | None) -> Parts:
    from pie_async.cuda.errors import require_cuda

    require_cuda(config.quantization)  # before cuda-python is imported, which may be missing
    import torch

    from pie_async.cuda.card_memory import CardMemory
    from pie_async.cuda.device import CudaDevice
    from pie_async.cuda.driver import Driver

    files = _read_files(config)
    dtype: torch.dtype = getattr(torch, files.dtype_name)
    driver = Driver(torch.device("cuda"))
    memory = CardMemory(driver, config.gpu_memory)
    memory.require_weights(files.config.weight_bytes(dtype.itemsize), files.dtype_name)
    limits = _cuda_limits(config, files, dtype, driver, memory)
    decoder = _load(config, files, dtype, driver.device, progress)
    layout = model_layout(config, files.config, dtype.itemsize)
    product = _tuned(config, limits, decoder)
    device_slots = _cuda_slots(config, files, layout, dtype, decoder, memory, limits, product)
    sizes = _size_up(config, files, layout, device_slots)
    device = CudaDevice(
        driver,
        layout,
        device_slots=sizes.device_slots,
        host_slots=sizes.host_slots,
        dtype=dtype,
        poisons=config.debug,
    )
    runner = _cuda_runner(config, limits, sizes, decoder, product, device.arena.layers)
    device.load(runner)
    memory.settle(runner)
    parts = _parts(config, files, sizes, limits, device)
    return msgspec.structs.replace(parts, gpu_memory=lambda: memory.report(runner))


def _cuda_limits(
    config: EngineConfig, files: _Files, dtype: torch.dtype, driver: Driver, memory: CardMemory
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


def _cuda_slots(
    config: EngineConfig,
    files: _Files,
    layout: KvLayout,
    dtype: torch.dtype,
    decoder: Decoder,
    memory: CardMemory,
    limits: Limits,
    product: Product | None,
) -> int:
    """Slots of the arena: as configured, or what is left under the cap."""
    wanted = None if config.device_kv_bytes is None else count_device_slots(config, layout)
    host_slots = count_host_slots(config, layout)
    longest = config.max_model_len or files.config.max_positions
    profiled = _Sizes(layout, 0, host_slots, longest, 0)
    return memory.plan(
        lambda layers: _cuda_runner(config, limits, profiled, decoder, product, layers),
        layout,
        dtype,
        device_slots=wanted,
        host_slots=host_slots,
        token_budget=limits.token_budget,
        decode_rows=limits.max_running_sequences,
    ).device_slots


def _tuned(config: EngineConfig, limits: Limits, decoder: Decoder) -> Product | None:
    """The fastest products for this model on this card; None where torch's own are asked for."""
    if config.kernels == "torch":
        return None
    from pie_async.cuda.graphs import buckets
    from pie_async.cuda.tuning import Tuner

    quantization = decoder.config.quantization
    tuner = Tuner(quantizes_activations=quantization is None or quantization.quantizes_activations)
    tuner.prepare(decoder.typical_weights, buckets(limits.max_running_sequences))
    return tuner


def _cuda_runner(
    config: EngineConfig,
    limits: Limits,
    sizes: _Sizes,
    decoder: Decoder,
    product: Product | None,
    layers: Sequence[Tensor],
) -> PlainRunner | FusedRunner:
    from pie_async.cuda.plain_runner import PlainRunner

    lanes, max_blocks = limits.max_running_sequences, _most_blocks(sizes)
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
        uses_graphs=config.cuda_graphs,
    )


class _Files(NamedTuple):
    """What is known of a model before its weights are read."""

    path: Path | None
    """None: a named shape, which has no directory."""
    config: ModelConfig
    tokenizer: Tokenizer
    dtype_name: str


class _Sizes(NamedTuple):
    """How much of everything there will be."""

    layout: KvLayout
    device_slots: int
    host_slots: int
    max_model_len: int
    weight_bytes: int


def read_model(config: EngineConfig) -> tuple[Path | None, ModelConfig]:
    """A model's directory and what its config.json says; named shapes have no directory.

    Raises:
        ModelError: there is no such model, or it is not supported.
    """
    from pie_async.model.checkpoint import resolve_model
    from pie_async.model.config import config_of, read_config
    from pie_async.model.named_shapes import NAMED_SHAPES

    shape = None if Path(config.model).is_dir() else NAMED_SHAPES.get(config.model)
    if shape is None:
        path = resolve_model(config.model)
        return path, read_config(path)
    if config.load_format != "random":
        raise ModelError(
            f"{config.model} is the name of a shape, without weights; add --load-format random, "
            "or give a model directory"
        )
    return None, config_of(shape, config.model)


def _read_files(config: EngineConfig) -> _Files:
    path, model = read_model(config)
    dtype_name = compute_dtype(config, model.dtype)
    if config.quantization is not None and model.quantization is None:
        from pie_async.model.quantization import WHILE_LOADING

        model = msgspec.structs.replace(model, quantization=WHILE_LOADING)
    return _Files(path, model, _read_tokenizer(config, path, model.vocab_size), dtype_name)


def _read_tokenizer(config: EngineConfig, path: Path | None, vocab_size: int) -> Tokenizer:
    is_random = config.load_format == "random"
    if path is None or (is_random and not (path / "tokenizer.json").is_file()):
        return ByteTokenizer(vocab_size)
    from pie_async.model.tokenizer import Tokenizer as ModelTokenizer

    return ModelTokenizer.from_directory(path)


def _size_up(config: EngineConfig, files: _Files, layout: KvLayout, device_slots: int) -> _Sizes:
    host_slots = count_host_slots(config, layout)
    return _Sizes(
        layout=layout,
        device_slots=device_slots,
        host_slots=host_slots,
        max_model_len=longest_sequence(
            config, layout, files.config.max_positions, device_slots + host_slots
        ),
        weight_bytes=files.config.weight_bytes(layout.item_bytes),
    )


def _runner(
    config: EngineConfig,
    limits: Limits,
    sizes: _Sizes,
    decoder: Decoder,
    layers: Sequence[Tensor],
) -> ModelRunner:
    from pie_async.model.runner import ModelRunner

    return ModelRunner(
        decoder,
        layers,
        lanes=limits.max_running_sequences,
        max_blocks=_most_blocks(sizes),
        block_tokens=config.block_tokens,
    )


def _most_blocks(sizes: _Sizes) -> int:
    """Longest block table."""
    return sizes.layout.blocks_for(sizes.max_model_len) + 1


def _parts(
    config: EngineConfig, files: _Files, sizes: _Sizes, limits: Limits, device: Device
) -> Parts:
    info = ModelInfo(
        name=served_name(config.model),
        family=files.config.family,
        dtype=files.dtype_name,
        vocab_size=files.config.vocab_size,
        max_model_len=sizes.max_model_len,
        num_parameters=files.config.num_parameters,
        weight_bytes=sizes.weight_bytes,
    )
    eos_ids = frozenset(files.config.eos_ids) | frozenset(files.tokenizer.eos_ids)
    return Parts(
        device=device,
        tokenizer=files.tokenizer,
        model=info,
        eos_ids=eos_ids,
        limits=limits,
    )


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


def model_layout(config: EngineConfig, shape: _KvShape, item_bytes: int) -> KvLayout:
    """KV on the CPU and on a GPU.

    Unless configured, a GPU stages layer by layer, and the CPU a few groups of several layers:
    handing one over between threads costs as much as computing a small layer.
    """
    if config.device == "cuda":
        return _layout(config, shape, item_bytes, layer_group=1, ring_depth=3)
    group = -(-shape.num_layers // CPU_LAYER_GROUPS)
    return _layout(config, shape, item_bytes, layer_group=group, ring_depth=2)


def _layout(
    config: EngineConfig, shape: _KvShape, item_bytes: int, *, layer_group: int, ring_depth: int
) -> KvLayout:
    return KvLayout(
        num_layers=shape.num_layers,
        block_tokens=config.block_tokens,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        item_bytes=item_bytes,
        layer_group=min(config.layer_group or layer_group, shape.num_layers),
        ring_depth=config.ring_depth or ring_depth,
    )


def default_threads() -> int:
    """All cores but one, which is left to the copy streams and the event loop.

    A torch operation is as slow as the slowest of its threads, so one that shares its core
    costs more than it adds.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) - 1)


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
    """Slots of the host pool.

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


def longest_sequence(config: EngineConfig, layout: KvLayout, max_positions: int, slots: int) -> int:
    """Most tokens a sequence may have: the model's limit, and what both memories hold.

    Args:
        slots: of device arena and host pool together.

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
            f"{fits} tokens; raise host_pool_bytes or device_kv_bytes",
            option="max_model_len",
        )
    return wanted


def served_name(model: str) -> str:
    """What clients call a model given as a path, a hub id or "builtin"."""
    if model == BUILTIN_MODEL:
        return "pie-shakespeare"
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


# --- the simulated device -----------------------------------------------------------------

SIM_MODEL = "llama-3.1-8b"
"""The shape that stands for "builtin" on the simulated device."""
SIM_POSITIONS = 131_072


def _assemble_sim(config: EngineConfig) -> Parts:
    from pie_async.device.cost_model import CostModel, gpu_named, link_named, shape_named
    from pie_async.device.sim import SimDevice

    refuse_quantization(config)
    name = SIM_MODEL if config.model == BUILTIN_MODEL else config.model
    shape = shape_named(name)
    layout = sim_layout(config, shape)
    device_slots = count_device_slots(config, layout)
    host_slots = count_host_slots(config, layout)
    memory = MemoryPlan(
        layout=layout,
        device_slots=device_slots,
        first_staging_slot=device_slots,
        staging_slots=host_slots,
        host_slots=host_slots,
    )
    cost = CostModel(gpu=gpu_named(config.sim_gpu), link=link_named(config.sim_link), shape=shape)
    info = ModelInfo(
        name=name,
        family="simulated",
        dtype="bfloat16",
        vocab_size=shape.vocab_size,
        max_model_len=longest_sequence(config, layout, SIM_POSITIONS, device_slots + host_slots),
        num_parameters=shape.weight_bytes // shape.weight_item_bytes,
        weight_bytes=shape.weight_bytes,
    )
    device = SimDevice(memory=memory, cost=cost, seed=config.seed, checked=config.debug)
    return Parts(
        device=device,
        tokenizer=ByteTokenizer(shape.vocab_size),
        model=info,
        eos_ids=frozenset(),
        limits=default_limits(config),
    )


def sim_layout(config: EngineConfig, shape: ModelShape) -> KvLayout:
    """KV on the simulated device; layer by layer, unless configured."""
    return _layout(config, shape, shape.kv_item_bytes, layer_group=1, ring_depth=3)


class ByteTokenizer:
    """Of models without one (simulated or random): text is its bytes; other ids read as letters."""

    eos_ids: tuple[int, ...] = ()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        del add_special_tokens  # there are none
        return list(text.encode())

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        return self.encode("".join(f"{m['role']}: {m['content']}\n" for m in messages))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        del skip_special_tokens
        return "".join(map(self.token_text, ids))

    def token_text(self, token: int) -> str:
        return chr(token) if 32 <= token < 127 else chr(ord("a") + token % 26)

    def detokenizer(
        self, prompt_tokens: Sequence[int], *, skip_special_tokens: bool = True
    ) -> TextDecoder:
        del prompt_tokens, skip_special_tokens
        return _ByteDecoder(self.token_text)


class _ByteDecoder:
    def __init__(self, token_text: Callable[[int], str]) -> None:
        self.push = token_text

    def flush(self) -> str:
        return ""
