"""Builds what an engine is made of from its configuration: model, tokenizer, device."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from pie_async.config import BUILTIN_MODEL, EngineConfig, format_size
from pie_async.core.layout import KvLayout
from pie_async.device.protocol import Device, MemoryPlan
from pie_async.errors import ConfigError
from pie_async.model_info import ModelInfo
from pie_async.request_stream import TextDecoder

if TYPE_CHECKING:
    from torch import Tensor

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


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded model on a device that is not started yet."""

    device: Device
    tokenizer: Tokenizer
    model: ModelInfo
    eos_ids: frozenset[int]


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
    from pie_async.model.weights import load_model

    files = _read_files(config)
    dtype: torch.dtype = getattr(torch, files.dtype_name)
    sizes = _size_up(config, files, dtype.itemsize)
    decoder = load_model(files.path, files.config, dtype, torch.device("cpu"), progress=progress)
    device = CpuDevice(
        sizes.layout,
        device_slots=sizes.device_slots,
        host_slots=sizes.host_slots,
        dtype=dtype,
        link_bytes_per_s=config.link_bytes_per_s,
        threads=config.cpu_threads or default_threads(),
        poisons=config.debug,
    )
    device.load(_runner(config, sizes, decoder, device.arena.layers))
    return _parts(config, files, sizes, device)


def _assemble_cuda(config: EngineConfig, progress: Progress | None) -> Parts:
    from pie_async.cuda.errors import require_cuda

    require_cuda()  # before cuda-python is imported, which may be missing
    _log.warning("the CUDA device has only been tested against a stand-in driver so far")
    import torch

    from pie_async.cuda.device import CudaDevice
    from pie_async.cuda.driver import Driver
    from pie_async.model.weights import load_model

    files = _read_files(config)
    dtype: torch.dtype = getattr(torch, files.dtype_name)
    sizes = _size_up(config, files, dtype.itemsize)
    driver = Driver(torch.device("cuda"))
    require_room(sizes.weight_bytes, driver.free_bytes(), files.dtype_name)
    decoder = load_model(files.path, files.config, dtype, driver.device, progress=progress)
    device = CudaDevice(
        driver,
        sizes.layout,
        device_slots=sizes.device_slots,
        host_slots=sizes.host_slots,
        dtype=dtype,
        poisons=config.debug,
    )
    device.load(_runner(config, sizes, decoder, device.arena.layers))
    return _parts(config, files, sizes, device)


def require_room(weight_bytes: int, free_bytes: int, dtype_name: str) -> None:
    """Refuse a model that the card cannot hold, before a minute is spent on loading it.

    Raises:
        ConfigError: the weights alone are larger than the free memory.
    """
    if weight_bytes > free_bytes:
        raise ConfigError(
            f"the weights take {format_size(weight_bytes)} in {dtype_name}, but only "
            f"{format_size(free_bytes)} are free on the GPU; choose a smaller model or dtype, or "
            "end what else runs there",
            option="model",
        )


class _Files(NamedTuple):
    """What is known of a model before its weights are read."""

    path: Path
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


def _read_files(config: EngineConfig) -> _Files:
    from pie_async.model.checkpoint import resolve_model
    from pie_async.model.config import read_config
    from pie_async.model.tokenizer import Tokenizer as ModelTokenizer

    path = resolve_model(config.model)
    model_config = read_config(path)
    tokenizer = ModelTokenizer.from_directory(path)
    return _Files(path, model_config, tokenizer, compute_dtype(config, model_config.dtype))


def _size_up(config: EngineConfig, files: _Files, item_bytes: int) -> _Sizes:
    layout = model_layout(config, files.config, item_bytes)
    device_slots, host_slots = count_slots(config, layout)
    return _Sizes(
        layout=layout,
        device_slots=device_slots,
        host_slots=host_slots,
        max_model_len=longest_sequence(config, layout, files.config.max_positions),
        weight_bytes=files.config.num_parameters * item_bytes,
    )


def _runner(
    config: EngineConfig, sizes: _Sizes, decoder: Decoder, layers: Sequence[Tensor]
) -> ModelRunner:
    from pie_async.model.runner import ModelRunner

    return ModelRunner(
        decoder,
        layers,
        lanes=config.max_running_sequences,
        max_blocks=sizes.layout.blocks_for(sizes.max_model_len) + 1,
        block_tokens=config.block_tokens,
    )


def _parts(config: EngineConfig, files: _Files, sizes: _Sizes, device: Device) -> Parts:
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
    return Parts(device=device, tokenizer=files.tokenizer, model=info, eos_ids=eos_ids)


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


def count_slots(config: EngineConfig, layout: KvLayout) -> tuple[int, int]:
    """Slots of the device arena and of the host pool.

    Raises:
        ConfigError: the arena holds too few blocks to run anything, or the pool none.
    """
    device_slots = config.device_kv_bytes // layout.block_bytes
    if device_slots < FEWEST_DEVICE_SLOTS:
        least = FEWEST_DEVICE_SLOTS * layout.block_bytes
        raise ConfigError(
            f"device_kv_bytes is {format_size(config.device_kv_bytes)}, which holds "
            f"{device_slots} KV blocks of {format_size(layout.block_bytes)}; "
            f"give it at least {format_size(least)} or lower block_tokens",
            option="device_kv_bytes",
        )
    host_slots = config.host_pool_bytes // layout.block_bytes
    if config.host_pool_bytes and not host_slots:
        raise ConfigError(
            f"host_pool_bytes is {format_size(config.host_pool_bytes)}, less than one KV block "
            f"of {format_size(layout.block_bytes)}; raise it, or set it to 0 to switch pooling off",
            option="host_pool_bytes",
        )
    return device_slots, host_slots


def longest_sequence(config: EngineConfig, layout: KvLayout, max_positions: int) -> int:
    """Most tokens a sequence may have: the model's limit, and what both memories hold.

    Raises:
        ConfigError: `max_model_len` asks for more than either allows.
    """
    device_slots, host_slots = count_slots(config, layout)
    fits = (device_slots + host_slots - SPARE_SLOTS) * layout.block_tokens
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

    name = SIM_MODEL if config.model == BUILTIN_MODEL else config.model
    shape = shape_named(name)
    layout = sim_layout(config, shape)
    device_slots, host_slots = count_slots(config, layout)
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
        max_model_len=longest_sequence(config, layout, SIM_POSITIONS),
        num_parameters=shape.weight_bytes // shape.weight_item_bytes,
        weight_bytes=shape.weight_bytes,
    )
    device = SimDevice(memory=memory, cost=cost, seed=config.seed, checked=config.debug)
    return Parts(
        device=device,
        tokenizer=ByteTokenizer(shape.vocab_size),
        model=info,
        eos_ids=frozenset(),
    )


def sim_layout(config: EngineConfig, shape: ModelShape) -> KvLayout:
    """KV on the simulated device; layer by layer, unless configured."""
    return _layout(config, shape, shape.kv_item_bytes, layer_group=1, ring_depth=3)


class ByteTokenizer:
    """The simulated model's: text is its bytes; other token ids read as letters."""

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
