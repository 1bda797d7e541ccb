"""What sampling means, one sequence at a time, in plain Python numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from pie_async.model.noise import gumbel_noise, seed_key, token_codes
from pie_async.sampling_params import SamplingParams


def edited_logits(
    logits: Sequence[float],
    params: SamplingParams,
    stop_ids: Sequence[int],
    prompt: Sequence[int],
    output: Sequence[int],
) -> list[float]:
    """Logits after bias, minimum tokens and penalties."""
    edited = list(logits)
    for token, bias in (params.logit_bias or {}).items():
        edited[token] += bias
    if len(output) < params.min_tokens:
        for token in stop_ids:
            edited[token] = -math.inf
    for token in {*prompt, *output}:
        if edited[token] > 0:
            edited[token] /= params.repetition_penalty
        else:
            edited[token] *= params.repetition_penalty
    for token, count in Counter(output).items():
        edited[token] -= params.frequency_penalty * count + params.presence_penalty
    return edited


def distribution(edited: Sequence[float], params: SamplingParams) -> list[float]:
    """The probabilities that sampling at a temperature above 0 draws from."""
    scaled = [value / params.temperature for value in edited]
    largest = max(scaled)
    weights = [math.exp(value - largest) for value in scaled]
    weights = [weight if weight >= params.min_p else 0.0 for weight in weights]
    if 0 < params.top_k < len(weights):
        kth = sorted(weights, reverse=True)[params.top_k - 1]
        weights = [weight if weight >= kth else 0.0 for weight in weights]
    if params.top_p < 1.0:
        total, reached, last = sum(weights), 0.0, 0.0
        for weight in sorted(weights, reverse=True):
            if reached >= params.top_p * total:
                break
            reached, last = reached + weight, weight
        weights = [weight if weight >= last else 0.0 for weight in weights]
    total = sum(weights)
    return [weight / total for weight in weights]


def next_token(edited: Sequence[float], params: SamplingParams, seed: int, position: int) -> int:
    """Greedy, or drawn with the noise that belongs to this seed and position."""
    if params.is_greedy:
        return max(range(len(edited)), key=lambda token: (edited[token], -token))
    noise = gumbel_noise(
        torch.tensor([seed_key(seed)]),
        torch.tensor([position]),
        token_codes(len(edited), torch.device("cpu")),
    )[0].tolist()
    kept = distribution(edited, params)
    return max(
        (token for token in range(len(edited)) if kept[token] > 0.0),
        key=lambda token: edited[token] / params.temperature + noise[token],
    )
