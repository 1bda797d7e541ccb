"""Small devices, one of each kind, behind what the contract suite needs of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pie_async.core.layout import KvLayout
from pie_async.device.cost_model import CostModel, Link, ModelShape, gpu_named
from pie_async.device.cpu import CpuDevice
from pie_async.device.protocol import Device, MemoryPlan
from pie_async.device.sim import EndOfSequence, SimDevice
from pie_async.errors import DeviceFault

LAYOUT = KvLayout(num_layers=5, block_tokens=4, kv_heads=2, head_dim=8, item_bytes=4, ring_depth=2)
DEVICE_SLOTS, HOST_SLOTS, VOCAB = 32, 16, 64
SLOW_LINK_BYTES_PER_S = 2e6
"""A block of all layers takes a millisecond, longer than any tiny kernel."""

SHAPE = ModelShape(
    num_layers=LAYOUT.num_layers,
    hidden_size=32,
    num_heads=4,
    kv_heads=LAYOUT.kv_heads,
    head_dim=LAYOUT.head_dim,
    intermediate_size=64,
    vocab_size=VOCAB,
    weight_item_bytes=4,
    kv_item_bytes=4,
)


@dataclass(frozen=True)
class Rig:
    """A device, not yet started, and two things that its protocol does not offer."""

    device: Device
    contents: Callable[[int], list[object]]
    """What a resident slot holds in each layer, comparable with ==."""
    break_compute: Callable[[], None]
    """Issue work to the compute stream that fails; on the launch thread."""


def sim_device(
    *,
    layout: KvLayout = LAYOUT,
    link_bytes_per_s: float = SLOW_LINK_BYTES_PER_S,
    is_order_checked: bool = True,
    checked: bool = True,
    seed: int = 0,
    end: EndOfSequence | None = None,
    shape: ModelShape = SHAPE,
) -> SimDevice:
    """A checked simulated device with a link as slow as asked for."""
    link = Link(name="test", bytes_per_s=link_bytes_per_s, latency_s=0.0, run_s=0.0)
    return SimDevice(
        memory=MemoryPlan(
            layout=layout,
            device_slots=DEVICE_SLOTS,
            first_staging_slot=DEVICE_SLOTS + 4,
            staging_slots=HOST_SLOTS,
            host_slots=HOST_SLOTS,
        ),
        cost=CostModel(gpu=gpu_named("h200"), link=link, shape=shape),
        seed=seed,
        end=end,
        checked=checked,
        is_order_checked=is_order_checked,
    )


def sim_rig() -> Rig:
    """The simulated device."""
    device = sim_device()
    checker = device.checker
    assert checker is not None

    def contents(slot: int) -> list[object]:
        memory = checker.memory
        return [
            memory.tag(int(memory.device(np.array([slot]), layer)[0]))
            for layer in range(LAYOUT.num_layers)
        ]

    def break_compute() -> None:
        device.fail(device.compute, DeviceFault("broken by the test"))

    return Rig(device, contents, break_compute)


def cpu_rig(directory: Path) -> Rig:
    """The CPU device with a small random model; `directory` is scratch space."""
    from pie_async.model.runner import ModelRunner

    device = CpuDevice(
        LAYOUT,
        device_slots=DEVICE_SLOTS,
        host_slots=HOST_SLOTS,
        dtype=torch.float32,
        link_bytes_per_s=SLOW_LINK_BYTES_PER_S,
    )
    device.load(
        ModelRunner(
            _random_decoder(directory),
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


def _random_decoder(directory: Path):
    from pie_async.model.config import read_config
    from pie_async.model.decoder import Decoder

    config = {
        "model_type": "llama",
        "hidden_size": SHAPE.hidden_size,
        "intermediate_size": SHAPE.intermediate_size,
        "num_hidden_layers": LAYOUT.num_layers,
        "num_attention_heads": SHAPE.num_heads,
        "num_key_value_heads": LAYOUT.kv_heads,
        "head_dim": LAYOUT.head_dim,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    decoder = Decoder(read_config(directory), torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(7)
    for tensor in decoder.parameters.by_name.values():
        tensor.normal_(0.0, 0.3, generator=generator)
    return decoder
