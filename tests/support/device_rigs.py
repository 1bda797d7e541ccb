"""A small simulated device, and what the contract suite needs of any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pie_async.core.layout import KvLayout
from pie_async.device.cost_model import CostModel, Link, ModelShape, gpu_named
from pie_async.device.protocol import Device, MemoryPlan
from pie_async.device.sim import SimDevice
from pie_async.device.sim_sampler import EndOfSequence
from pie_async.errors import DeviceFault

LAYOUT = KvLayout(
    num_layers=5, block_tokens=4, kv_heads=2, head_dim=8, item_bytes=4, num_groups=5, ring_depth=2
)
DEVICE_SLOTS, HOST_SLOTS, VOCAB = 32, 16, 64
CHUNK_SLOTS = 5
"""So few that the host pool has several chunks."""
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
            first_host_slots=HOST_SLOTS,
            chunk_slots=CHUNK_SLOTS,
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
