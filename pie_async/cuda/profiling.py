"""The iterations whose memory is measured before anything is served."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pie_async.ids import IterationId, Lane, SequenceId
from pie_async.messages import LaneBinding, Row, RunIteration
from pie_async.sampling_params import MAX_TOP_LOGPROBS, SamplingParams

PLAIN = SamplingParams(temperature=0.0)
"""Sampling that takes the least memory."""
WIDEST = SamplingParams(
    temperature=1.0,
    top_k=50,
    top_p=0.9,
    min_p=0.01,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    repetition_penalty=1.1,
    logit_bias={0: 1.0},
    min_tokens=1,
    logprobs=MAX_TOP_LOGPROBS,
    prompt_logprobs=MAX_TOP_LOGPROBS,
)
"""Sampling that takes the most."""


def largest_iteration(
    num_tokens: int, sampling: SamplingParams, *, lanes: int, longest: int
) -> RunIteration:
    """Prompts of `num_tokens` tokens in all, in as many lanes as can be, all of them sampled.

    Its lanes' block tables are left as they are: in a runner that nobody has used all of it is
    written to slot 0.

    Args:
        longest: most tokens of one prompt; where even that is too few, there are fewer in all.
    """
    num_rows = min(lanes, num_tokens)
    left = num_tokens - num_rows
    rows, bindings = [], []
    for lane in range(num_rows):
        length = 1 + min(left, longest - 1)
        left -= length - 1
        sequence = SequenceId(lane)
        rows.append(Row(sequence, Lane(lane), 0, (0,) * length, True))
        bindings.append(
            LaneBinding(
                lane=Lane(lane),
                sequence=sequence,
                sampling=sampling,
                seed=0,
                stop_ids=(0,),
                prompt_len=length,
                history=(0,) * length,
            )
        )
    return RunIteration(iteration=IterationId(0), rows=tuple(rows), bindings=tuple(bindings))


def longest_prompt(max_blocks: int, block_tokens: int) -> int:
    """Tokens that a model has positions for, by the length of its block tables."""
    # The last block is a spare one, and the one before it may not be full.
    return max(1, (max_blocks - 2) * block_tokens)


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Torch's memory at its peak while this runs, beyond what was in use; 0 without a GPU."""
    run()  # kernels and libraries keep what they allocate at first
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
