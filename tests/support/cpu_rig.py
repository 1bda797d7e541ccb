"""A small CPU device with a random model, for the contract suite."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pie_async.device.cpu import CpuDevice
from pie_async.errors import DeviceFault
from pie_async.model.config import read_config
from pie_async.model.decoder import Decoder
from pie_async.model.runner import ModelRunner
from support.device_rigs import (
    CHUNK_SLOTS,
    DEVICE_SLOTS,
    HOST_SLOTS,
    LAYOUT,
    SHAPE,
    SLOW_LINK_BYTES_PER_S,
    Rig,
)


def cpu_rig(directory: Path) -> Rig:
    """The CPU device with a small random model; `directory` is scratch space."""
    device = CpuDevice(
        LAYOUT,
        device_slots=DEVICE_SLOTS,
        host_slots=HOST_SLOTS,
        dtype=torch.float32,
        link_bytes_per_s=SLOW_LINK_BYTES_PER_S,
        chunk_slots=CHUNK_SLOTS,
    )
    device.load(
        ModelRunner(
            random_decoder(directory),
            device.arena.layers,
            lanes=4,
            max_blocks=16,
            block_tokens=LAYOUT.block_tokens,
        )
    )

    def contents(slot: int) -> list[object]:
        return [layer[slot].numpy().tobytes() for layer in device.arena.layers]

    def raise_fault() -> None:
        raise DeviceFault("broken by the test")

    return Rig(device, contents, lambda: device.compute.put(raise_fault))


def random_decoder(directory: Path, device: torch.device | None = None) -> Decoder:
    """A tiny Llama of the simulated shape; the same weights every time."""
    config = {
        "model_type": "llama",
        "hidden_size": SHAPE.hidden_size,
        "intermediate_size": SHAPE.intermediate_size,
        "num_hidden_layers": LAYOUT.num_layers,
        "num_attention_heads": SHAPE.num_heads,
        "num_key_value_heads": LAYOUT.kv_heads,
        "head_dim": LAYOUT.head_dim,
        "vocab_size": SHAPE.vocab_size,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    decoder = Decoder(read_config(directory), torch.float32, device or torch.device("cpu"))
    generator = torch.Generator().manual_seed(7)
    for tensor in decoder.parameters.by_name.values():
        tensor.copy_(torch.empty(tensor.shape).normal_(0.0, 0.3, generator=generator))
    return decoder
