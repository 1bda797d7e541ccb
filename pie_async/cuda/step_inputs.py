"""Brings an iteration's numbers to the GPU: one pinned buffer, one kernel that reads it.

Layout, int32: token ids [n], positions [n], lanes [n], table updates [u, 2], then whatever else
the iteration needs. The device's buffer stays where it is, so captured graphs can read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pie_async.messages import Row, TableUpdate
from pie_async.model.transfer import copy, seen_by_gpu

FED_BACK = -1
"""Stands for the token that the lane sampled last."""
_BUFFERS = 4
"""More than iterations in flight, so the oldest one's copy is long over."""

Numbers = np.ndarray[tuple[int], np.dtype[np.int32]]
Updates = dict[int, int]
"""Slots by flat index into the block tables."""


def flat_updates(updates: Iterable[TableUpdate], max_blocks: int) -> Updates:
    """Of several updates to one entry the later one counts."""
    return {
        update.lane * max_blocks + update.first + i: int(slot)
        for update in updates
        for i, slot in enumerate(update.slots)
    }


class Uploader:
    """Pinned buffers used in turn, and the device buffer that they are copied to.

    Args:
        capacity: numbers that one iteration may bring.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.device_buffer = torch.zeros(capacity, dtype=torch.int32, device=device)
        is_pinned = device.type == "cuda"
        self._pinned = [
            torch.zeros(capacity, dtype=torch.int32, pin_memory=is_pinned) for _ in range(_BUFFERS)
        ]
        self._arrays = [buffer.numpy() for buffer in self._pinned]
        self._seen = (
            [seen_by_gpu(buffer, device) for buffer in self._pinned] if is_pinned else self._pinned
        )
        self._copied: list[torch.cuda.Event | None] = [None] * _BUFFERS
        self._next = 0

    def array(self) -> Numbers:
        """The host buffer of the next upload; what it held before is over."""
        copied = self._copied[self._next]
        if copied is not None:
            copied.synchronize()
        return self._arrays[self._next]

    def upload(self, size: int) -> None:
        """Copy the first `size` numbers, ordered on the current stream."""
        copy(self._seen[self._next][:size], self.device_buffer[:size])
        if self.device_buffer.is_cuda:
            event = self._copied[self._next] or torch.cuda.Event()
            event.record()
            self._copied[self._next] = event
        self._next = (self._next + 1) % _BUFFERS


class FedTokens:
    """The part of the buffer that every iteration has, as device views.

    Args:
        buffer: [capacity] int32 on the device.
        num_tokens, num_updates: n and u, padding included.
        prompts_at: where rows of several tokens begin; None: behind those of one token.
    """

    def __init__(
        self, buffer: Tensor, num_tokens: int, num_updates: int, prompts_at: int | None = None
    ) -> None:
        n, u = num_tokens, num_updates
        self.num_tokens = n
        self.num_updates = u
        self._prompts_at = prompts_at
        self.tokens, self.positions, self.lanes = buffer[: 3 * n].view(3, n).unbind(0)
        self.updates = buffer[3 * n : 3 * n + 2 * u].view(u, 2)
        self.size = 3 * n + 2 * u
        """Numbers in it; more may follow."""

    def fill(
        self,
        array: Numbers,
        rows: Sequence[Row],
        updates: Updates,
        *,
        padding_lane: int,
    ) -> None:
        """Write rows and updates to the host buffer, the rest as padding."""
        n = self.num_tokens
        tokens, positions, lanes = array[: 3 * n].reshape(3, n)
        tokens[:] = 0
        positions[:] = -1
        lanes[:] = padding_lane
        _fill_rows(tokens, positions, lanes, rows, self._prompts_at)
        pairs = array[3 * n : self.size].reshape(-1, 2)
        pairs[: len(updates), 0] = list(updates)
        pairs[: len(updates), 1] = list(updates.values())
        pairs[len(updates) :, 0] = -1


def _fill_rows(
    tokens: np.ndarray,
    positions: np.ndarray,
    lanes: np.ndarray,
    rows: Sequence[Row],
    prompts_at: int | None,
) -> None:
    """Rows of one token first."""
    count = sum(row.num_tokens == 1 for row in rows)
    single = rows[:count]
    tokens[:count] = [row.tokens[0] if row.tokens else FED_BACK for row in single]
    positions[:count] = [row.start for row in single]
    lanes[:count] = [row.lane for row in single]
    rows = rows[count:]
    count = count if prompts_at is None else prompts_at
    for row in rows:
        end = count + row.num_tokens
        tokens[count:end] = row.tokens
        positions[count:end] = np.arange(row.start, row.start + row.num_tokens)
        lanes[count:end] = row.lane
        count = end


def last_tokens(rows: Sequence[Row], prompts_at: int) -> Iterator[tuple[int, int, int]]:
    """Of each sampled row: where its last fed token is, its lane, the position to sample.

    Args:
        rows: those of one token first.
        prompts_at: where the others begin.
    """
    end = 0
    for row in rows:
        if row.num_tokens > 1:
            end = max(end, prompts_at)
        end += row.num_tokens
        if row.is_sampled:
            yield end - 1, row.lane, row.start + row.num_tokens
