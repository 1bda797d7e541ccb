"""Builds what an engine is made of from its configuration: model, tokenizer, device."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from pie_async.config import BUILTIN_MODEL, EngineConfig, format_size
from pie_async.core.layout import KvLayout
from pie_async.device.protocol import Device, MemoryPlan
from pie_async.errors import ConfigError
from pie_async.model_info import ModelInfo
from pie_async.request_stream import TextDecoder

if TYPE_CHECKING:
    from pie_async.device.cost_model import ModelShape

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
    return _assemble_cpu(config, progress)


def _assemble_cpu(config: EngineConfig, progress: Progress | None) -> Parts:
    import torch  # torch takes a second to import; `import pie_async` must not pay for it

    from pie_async.device.cpu import CpuDevice
    from pie_async.model.checkpoint import resolve_model
    from pie_async.model.config import read_config
    from pie_async.model.runner import ModelRunner
    from pie_async.model.tokenizer import Tokenizer as ModelTokenizer
    from pie_async.model.weights import load_model

    path = resolve_model(config.model)
    model_config = read_config(path)
    tokenizer = ModelTokenizer.from_directory(path)
    dtype_name = "float32" if config.dtype == "auto" else config.dtype
    dtype: torch.dtype = getattr(torch, dtype_name)
    layout = cpu_layout(config, model_config, dtype.itemsize)
    device_slots, host_slots = count_slots(config, layout)
    max_model_len = longest_sequence(config, layout, model_config.max_positions)
    decoder = load_model(path, model_config, dtype, torch.device("cpu"), progress=progress)
    device = CpuDevice(
        layout,
        device_slots=device_slots,
        host_slots=host_slots,
        dtype=dtype,
        link_bytes_per_s=config.link_bytes_per_s,
        threads=config.cpu_threads or default_threads(),
        poisons=config.debug,
    )
    device.load(
        ModelRunner(
            decoder,
            device.arena.layers,
            lanes=config.max_running_sequences,
            max_blocks=layout.blocks_for(max_model_len) + 1,
            block_tokens=config.block_tokens,
        )
    )
    info = ModelInfo(
        name=served_name(config.model),
        family=model_config.family,
        dtype=dtype_name,
        vocab_size=model_config.vocab_size,
        max_model_len=max_model_len,
        num_parameters=model_config.num_parameters,
        weight_bytes=model_config.num_parameters * dtype.itemsize,
    )
    eos_ids = frozenset(model_config.eos_ids) | frozenset(tokenizer.eos_ids)
    return Parts(device=device, tokenizer=tokenizer, model=info, eos_ids=eos_ids)


class _KvShape(Protocol):
    """The part of a model's sizes on which its KV depends."""

    @property
    def num_layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def cpu_layout(config: EngineConfig, shape: _KvShape, item_bytes: int) -> KvLayout:
    """KV on the CPU device. Unless configured, a few groups of several layers: handing one over
    between threads costs as much as computing a small layer."""
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
