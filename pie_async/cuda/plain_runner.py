"""The reference runner on a GPU: plain torch, one operation after the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pie_async.cuda.profiling import largest_iteration, longest_prompt, peak_bytes
from pie_async.messages import RunIteration
from pie_async.model.runner import ModelRunner
from pie_async.sampling_params import SamplingParams


class PlainRunner(ModelRunner):
    """What `CudaDevice` and `CardMemory` ask of a runner, without kernels of our own."""

    graph_bytes = 0
    wants_graphs = False
    has_room: Callable[[], bool]
    """Not asked."""

    def warm_up(self) -> None:
        """Nothing is compiled or captured."""

    def capture_wanted(self) -> None:
        """Nothing is captured."""

    def close(self) -> None:
        """All memory is torch's; let go of it, whoever still holds the runner."""
        vars(self).clear()

    def profile(self, num_tokens: int, sampling: SamplingParams) -> int:
        """See `ProfiledRunner`."""
        block_tokens = self._kv[0].block_tokens
        command = largest_iteration(
            num_tokens,
            sampling,
            lanes=len(self._tables),
            longest=longest_prompt(self._max_blocks, block_tokens),
        )
        return peak_bytes(partial(self._run, command), self._device)

    def _run(self, command: RunIteration) -> None:
        forward = self.begin(command)
        self.run_layers(forward, range(len(self._kv)))
        self.sample(forward)
