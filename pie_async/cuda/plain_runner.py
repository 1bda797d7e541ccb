"""The reference runner on a GPU: plain torch, one operation after the other."""

from __future__ import annotations

import torch

from pie_async.ids import IterationId, Lane, SequenceId
from pie_async.messages import LaneBinding, Row, RunIteration
from pie_async.model.runner import ModelRunner
from pie_async.sampling_params import SamplingParams


class PlainRunner(ModelRunner):
    """What `CudaDevice` and `CardMemory` ask of a runner, without kernels of our own."""

    graph_bytes = 0

    def warm_up(self) -> None:
        """Nothing is compiled or captured."""

    def close(self) -> None:
        """All memory is torch's."""

    def profile(self, num_tokens: int) -> int:
        """See `ProfiledRunner`. Writes slot 0, so it is for an arena that nobody uses yet."""
        self._run(num_tokens)  # libraries keep what they allocate at first
        if self._device.type != "cuda":
            return 0
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        self._run(num_tokens)
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before

    def _run(self, num_tokens: int) -> None:
        lane, sequence = Lane(0), SequenceId(0)
        binding = LaneBinding(
            lane=lane,
            sequence=sequence,
            sampling=SamplingParams(temperature=0.0),
            seed=0,
            stop_ids=(),
            prompt_len=num_tokens,
        )
        length = min(num_tokens, self._max_blocks * self._kv[0].block_tokens)
        rows = (Row(sequence, lane, 0, (0,) * length, True),)
        command = RunIteration(iteration=IterationId(0), rows=rows, bindings=(binding,))
        forward = self.begin(command)
        self.run_layers(forward, range(len(self._kv)))
        self.sample(forward)
        forward.collect()
