"""Checksums of pooled blocks, taken and compared on the GPU, on the streams of the copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pie_async.ids import HostSlot
from pie_async.messages import CopyRun

MOST_AT_ONCE = 64
"""Blocks: a layer of each is held as 64-bit numbers for a moment."""


class Checksums:
    """What each layer of every pooled block should add up to, as of when it was copied out.

    A sum weighs every 32 bits by their place, so what was shifted adds up to something else. It is
    taken of the arena's side of a copy: before it goes out, and once it has come in. So a copy out
    that went wrong is found when the block is wanted again.
    """

    def __init__(self, layers: Sequence[torch.Tensor], *, host_slots: int) -> None:
        """
        Args:
            layers: of the arena: [slots, ...], contiguous within a slot.
            host_slots: of the pool, at most.
        """
        self._layers = layers
        self._device = layers[0].device
        words = layers[0][0].numel() * layers[0].element_size() // 4
        self._weights = 2 * torch.arange(words, device=self._device) + 1
        self._sums = torch.zeros(host_slots, len(layers), dtype=torch.int64, device=self._device)
        self._is_known = torch.zeros(host_slots, dtype=torch.bool, device=self._device)

    def remember(self, layers: range, runs: Sequence[CopyRun]) -> None:
        """These blocks are about to be copied out."""
        for here, there, _ in self._slots(runs):
            self._sums[there, layers.start : layers.stop] = self._add_up(layers, here)
            self._is_known[there] = True

    def compare(
        self, layers: range, runs: Sequence[CopyRun]
    ) -> Iterator[tuple[Sequence[HostSlot], torch.Tensor]]:
        """These blocks were copied in.

        Returns: host slots and, for each, whether its block is wrong, in host memory that is
            filled when the stream gets there. A slot never copied out is right.
        """
        for here, there, host_slots in self._slots(runs):
            expected = self._sums[there, layers.start : layers.stop]
            differs = (self._add_up(layers, here) != expected).any(1) & self._is_known[there]
            seen = torch.empty_like(differs, device="cpu", pin_memory=self._device.type == "cuda")
            yield host_slots, seen.copy_(differs, non_blocking=True)

    def _add_up(self, layers: range, slots: torch.Tensor) -> torch.Tensor:
        """[blocks, layers]"""
        sums = []
        for layer in layers:
            words = self._layers[layer][slots].flatten(1).view(torch.int32)
            sums.append((words.to(torch.int64) * self._weights).sum(1))
        return torch.stack(sums, 1)

    def _slots(
        self, runs: Sequence[CopyRun]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, Sequence[HostSlot]]]:
        """Device slots and host slots of some blocks at a time; the latter as they came, too."""
        pairs = [
            (run.device_slot + index, run.host_slot + index)
            for run in runs
            for index in range(run.count)
        ]
        for first in range(0, len(pairs), MOST_AT_ONCE):
            some = pairs[first : first + MOST_AT_ONCE]
            slots = torch.tensor(some, pin_memory=self._device.type == "cuda").T
            here, there = slots.to(self._device, non_blocking=True)
            yield here, there, [HostSlot(slot) for _, slot in some]
