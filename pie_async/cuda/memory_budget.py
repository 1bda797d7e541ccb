"""Shares the card's memory out: what the arena gets when everything else has what it needs."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from pie_async.config import MIB, check_gpu_memory, format_size
from pie_async.core.layout import KvLayout
from pie_async.errors import ConfigError

MOST_CONTEXT_BYTES = 1024 * MIB
"""A CUDA context with the driver's own reserve; about 600 MiB on an H200. Memory that was in
use beyond it when this process came belongs to others."""
SLACK_BYTES = 256 * MIB
"""Left under the cap for what is loaded late: kernels that first run under load."""
GRAPHS_BYTES = 512 * MIB
"""What captured graphs take beside the memory that their kernels work in."""
FEWEST_SLOTS = 4
"""A tail block being written, the next one, and two on their way out."""


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU's memory when this process had opened it and taken nothing else."""

    total_bytes: int
    free_bytes: int

    @property
    def context_bytes(self) -> int:
        """The process's own context, at most."""
        return min(self.total_bytes - self.free_bytes, MOST_CONTEXT_BYTES)

    def used_bytes(self, free_bytes: int) -> int:
        """What the process has taken, by what is free now. Others are taken to stand still."""
        return self.context_bytes + self.free_bytes - free_bytes

    def cap_bytes(self, gpu_memory: str | float) -> int:
        """`EngineConfig.gpu_memory` on this card.

        Raises:
            ConfigError: more than the card has.
        """
        meant = check_gpu_memory(gpu_memory)
        cap_bytes = int(meant * self.total_bytes) if meant <= 1 else int(meant)
        if cap_bytes > self.total_bytes:
            raise ConfigError(
                f"gpu_memory is {format_size(cap_bytes)}, but the GPU has "
                f"{format_size(self.total_bytes)}; lower it, or give a share such as 0.9",
                option="gpu_memory",
            )
        return cap_bytes

    def reach_bytes(self, cap_bytes: int) -> int:
        """The cap, or less where others left less."""
        return min(cap_bytes, self.context_bytes + self.free_bytes)


class GpuMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Where the bytes under the cap go."""

    cap_bytes: int
    context_bytes: int
    weight_bytes: int
    activation_bytes: int
    """Work space of the largest iteration."""
    graph_bytes: int
    ring_bytes: int
    arena_bytes: int
    device_slots: int
    used_bytes: int = 0
    """What the process has taken as of now, by the driver's count. Activations come and go."""

    @property
    def free_bytes(self) -> int:
        """Below the cap and promised to nothing."""
        return self.cap_bytes - sum(num_bytes for _, num_bytes in self._parts())

    def _parts(self) -> Iterator[tuple[str, int]]:
        yield "CUDA context", self.context_bytes
        yield "weights", self.weight_bytes
        yield "activations", self.activation_bytes
        yield "CUDA graphs", self.graph_bytes
        yield "KV arena", self.arena_bytes
        yield "staging ring", self.ring_bytes

    def lines(self) -> Iterator[str]:
        """A table for people."""
        for name, num_bytes in (*self._parts(), ("free below the cap", self.free_bytes)):
            yield f"{name:<20}{format_size(num_bytes):>12}"
        yield f"{'cap':<20}{format_size(self.cap_bytes):>12}"
        yield f"{'in use now':<20}{format_size(self.used_bytes):>12}"


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What has to be there beside the arena."""

    context_bytes: int
    weight_bytes: int
    activation_bytes: int
    graph_bytes: int
    staging_slots: int
    """Blocks that may pass through the staging ring in one iteration."""


def require_weights(
    weight_bytes: int, card: Card, cap_bytes: int, *, gpu: str, dtype_name: str
) -> None:
    """Refuse a model that the card cannot hold, before a minute is spent on loading it.

    Raises:
        ConfigError: the weights alone are larger than the cap or the free memory.
    """
    if weight_bytes > card.free_bytes:
        raise ConfigError(
            f"the weights take {format_size(weight_bytes)} in {dtype_name}, but only "
            f"{format_size(card.free_bytes)} of {format_size(card.total_bytes)} are free on "
            f"{gpu}; choose a smaller model or dtype, or end what else runs there",
            option="model",
        )
    if weight_bytes > cap_bytes - card.context_bytes:
        raise ConfigError(
            f"the weights take {format_size(weight_bytes)} in {dtype_name} and the CUDA context "
            f"{format_size(card.context_bytes)}, but gpu_memory is {format_size(cap_bytes)}; "
            "raise it, or choose a smaller model or dtype",
            option="gpu_memory",
        )


def share_out(
    reach_bytes: int,
    demand: Demand,
    layout: KvLayout,
    *,
    page_bytes: int,
    device_slots: int | None = None,
) -> GpuMemory:
    """Give the arena what is left, or check that the arena asked for fits.

    Args:
        reach_bytes: the cap, or less where others left less.
        page_bytes: the arena's memory comes in multiples of it, per layer.
        device_slots: an arena of this size; None: as large as it goes.

    Raises:
        ConfigError: it does not fit; says what everything takes and what to lower.
    """
    ring_bytes = layout.ring_layers * paged(demand.staging_slots, layout, page_bytes)
    taken_bytes = demand.context_bytes + demand.weight_bytes + demand.activation_bytes
    taken_bytes += demand.graph_bytes + ring_bytes + SLACK_BYTES
    layer_bytes = max(0, reach_bytes - taken_bytes) // layout.num_layers
    most_slots = layer_bytes // page_bytes * page_bytes // layout.layer_block_bytes
    wanted_slots = max(FEWEST_SLOTS, device_slots or 0)
    if most_slots < wanted_slots:
        raise _no_room(reach_bytes, demand, ring_bytes, wanted_slots * layout.block_bytes)
    slots = most_slots if device_slots is None else device_slots
    return GpuMemory(
        cap_bytes=reach_bytes,
        context_bytes=demand.context_bytes,
        weight_bytes=demand.weight_bytes,
        activation_bytes=demand.activation_bytes,
        graph_bytes=demand.graph_bytes,
        ring_bytes=ring_bytes,
        arena_bytes=layout.num_layers * paged(slots, layout, page_bytes),
        device_slots=slots,
    )


def _no_room(reach_bytes: int, demand: Demand, ring_bytes: int, wanted_bytes: int) -> ConfigError:
    parts = (
        ("CUDA context", demand.context_bytes),
        ("weights", demand.weight_bytes),
        ("activations", demand.activation_bytes),
        ("CUDA graphs", demand.graph_bytes),
        ("staging ring", ring_bytes),
        ("reserve", SLACK_BYTES),
    )
    taken = ", ".join(f"{name} {format_size(num_bytes)}" for name, num_bytes in parts)
    left_bytes = max(0, reach_bytes - sum(num_bytes for _, num_bytes in parts))
    return ConfigError(
        f"of {format_size(reach_bytes)} under gpu_memory {format_size(left_bytes)} are left for "
        f"KV, which needs {format_size(wanted_bytes)} at least: {taken}; lower token_budget "
        "(activations), max_running_sequences (graphs), max_streamed_bytes (ring) or "
        "device_kv_bytes, or raise gpu_memory",
        option="gpu_memory",
    )


def paged(slots: int, layout: KvLayout, page_bytes: int) -> int:
    """Bytes of whole pages that hold this many slots of one layer."""
    return -(-slots * layout.layer_block_bytes // page_bytes) * page_bytes
