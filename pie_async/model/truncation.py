"""Where min-p, top-k and top-p cut a distribution, row by row.

Every cut is a value, not a count: whatever is as likely as the last token kept is kept too.
So the outcome doesn't depend on how a sort orders equals.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_FIRST_DEPTH = 64
"""Candidates among which the CPU looks for top-p's cut before it sorts a whole row."""


def relative_logprobs(logits: Tensor, temperature: Tensor) -> Tensor:
    """Log-probabilities less the row's largest one; 0 is the likeliest token.

    Args:
        logits: [n, vocab] float32; entries or whole rows may be -inf.
        temperature: [n, 1]; 0 counts as 1, and however small a one gives no NaN.
    """
    largest = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    return (logits - largest).div_(torch.where(temperature == 0.0, 1.0, temperature))


def cuts(
    relative: Tensor,
    *,
    min_p: Tensor | None = None,
    top_k: Tensor | None = None,
    largest_k: int = 0,
    top_p: Tensor | None = None,
) -> Tensor:
    """[n, 1]: the smallest value of each row that survives min-p, then top-k, then top-p.

    Args:
        relative: [n, vocab] from `relative_logprobs`.
        min_p: [n, 1] in [0, 1], or None if no row uses it. 0 drops nothing.
        top_k: [n, 1] int64, or None. 0 drops nothing.
        largest_k: the largest entry of `top_k`, known to the host.
        top_p: [n, 1] in (0, 1], or None; of the probability that min-p and top-k left. 1 drops
            nothing.

    Cost: a sort if there is a top-p, else a top-k. On the CPU, where a sort would take longer
    than all other sampling together, top-p first looks among few candidates, and sorts only
    those rows whose nucleus is longer.
    """
    on_cpu = relative.device.type == "cpu"
    leading = _leading(relative, largest_k, 0 if top_p is None else _FIRST_DEPTH if on_cpu else -1)
    floor = torch.full_like(leading[:, :1], -torch.inf) if min_p is None else min_p.log()
    if top_k is not None:
        kth = leading.gather(1, top_k.clamp(1, leading.shape[1]) - 1)
        floor = torch.maximum(floor, torch.where(top_k == 0, -torch.inf, kth))
    if top_p is None:
        return floor
    is_floored = min_p is not None or top_k is not None
    target = top_p * _mass(relative, floor if is_floored else None)
    cut, is_found = _nucleus_cut(leading, target, floor)
    is_found |= top_p >= 1.0
    if on_cpu and not is_found.all():
        rows = is_found.squeeze(1).logical_not_()
        cut[rows] = _nucleus_cut(_falling(relative[rows]), target[rows], floor[rows])[0]
    return torch.maximum(floor, torch.where(top_p >= 1.0, -torch.inf, cut))


def _leading(relative: Tensor, largest_k: int, depth: int) -> Tensor:
    """The row's largest values, falling: as many as asked for, all of them if depth is -1."""
    if depth < 0:
        return relative.sort(descending=True).values
    return relative.topk(min(max(largest_k, depth, 1), relative.shape[1])).values


def _mass(relative: Tensor, floor: Tensor | None) -> Tensor:
    """[n, 1] float64, so that the order of addition doesn't show."""
    weights = relative.exp()
    if floor is not None:
        weights.masked_fill_(relative < floor, 0.0)
    return weights.sum(-1, keepdim=True, dtype=torch.float64)


def _nucleus_cut(values: Tensor, target: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """The last of the `values` ([n, k], falling) needed to reach `target`; whether they do."""
    weights = values.exp().masked_fill_(values < floor, 0.0).double()
    reached = weights.cumsum(-1)
    num_inside = (reached - weights < target).sum(-1, keepdim=True)
    return values.gather(1, (num_inside - 1).clamp_(min=0)), reached[:, -1:] >= target


def _falling(values: Tensor) -> Tensor:
    """Rows in falling order. NumPy sorts 5x as fast as torch does on the CPU."""
    return torch.from_numpy(np.sort(values.numpy(), axis=1)).flip(-1)
