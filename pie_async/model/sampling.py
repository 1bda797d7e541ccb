"""Choosing the next tokens of a batch from its logits, on the device, without waiting for it.

Everything is a tensor over the batch; which optional parts run at all is decided on the host
from what the lanes in the batch asked for (`LaneSampler.needs`), so a greedy batch costs one
argmax and nothing here waits for the device.

Randomness is counter-based (`pie_async.model.noise`): a token's noise is a pure function of
its sequence's seed, its position and its id. Every other operation works on each row alone.
So a seed gives the same tokens whatever else is in the batch, however it was scheduled.

Order, as in vLLM: masks of guided sequences, logit bias, minimum tokens, penalties,
temperature, min-p, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pie_async.ids import Lane, MaskSlot
from pie_async.messages import LaneBinding
from pie_async.model.noise import gumbel_noise, seed_key, token_codes
from pie_async.model.transfer import seen_by_gpu, upload
from pie_async.model.truncation import cuts, relative_logprobs
from pie_async.sampling_params import SamplingParams


class Needs(NamedTuple):
    """The optional parts of sampling that at least one row of a batch uses. Hashable."""

    draws: bool = False
    """A temperature above 0."""
    biases: bool = False
    min_tokens: bool = False
    penalties: bool = False
    min_p: bool = False
    top_k: int = 0
    """The largest top-k, 0 if there is none."""
    top_p: bool = False
    top_logprobs: int = -1
    """The largest number of top logprobs, -1 if no row wants logprobs."""
    masks: bool = False
    """A guided sequence."""

    @classmethod
    def union(cls, several: Iterable[Needs]) -> Needs:
        """What a batch of rows with these needs takes."""
        return cls(*(max(column) for column in zip(cls(), *several, strict=True)))


class TokenLogprobs(NamedTuple):
    """Logprobs of n chosen tokens; natural logarithms of the raw distribution."""

    logprobs: Tensor
    """[n] float32, of the chosen tokens."""
    ranks: Tensor
    """[n] int64, 1 for the likeliest token."""
    top_ids: Tensor
    """[n, k] int64, likeliest first."""
    top_logprobs: Tensor
    """[n, k] float32."""


class Sampled(NamedTuple):
    """What one call of `LaneSampler.sample` chose."""

    tokens: Tensor
    """[n] int64."""
    logprobs: TokenLogprobs | None
    """Only if some row asked for logprobs; k is the largest number asked for in the batch."""


class LaneSampler:
    """Samples for up to `lanes` sequences, each known by the lane it is bound to.

    Args:
        lanes: number of lanes; lane numbers are 0 .. lanes - 1.
        vocab_size: width of the logits.
        device: where logits come from and all state lives.

    Memory: a few numbers per lane; [lanes, vocab_size] counts (5 bytes each) are allocated
    when the first sequence with penalties is bound.
    """

    def __init__(self, *, lanes: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._needs = [Needs()] * lanes
        self._all_needs: Needs | None = None
        self._reals = torch.zeros(lanes, len(_REALS), device=device)
        self._integers = torch.zeros(lanes, len(_INTEGERS), dtype=torch.int64, device=device)
        self._bias = _SparseLogits(lanes, device)
        self._stop_mask = _SparseLogits(lanes, device)
        self._masks: Tensor | None = None
        self._mask_of_lane = torch.full((lanes,), -1, dtype=torch.int64, device=device)
        self.codes = token_codes(vocab_size, device)
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None

    def use_masks(self, masks: Tensor) -> None:
        """Say where masks lie.

        Args:
            masks: [slots, words] int32 on the host, where kernels can read it: what is written
                there reaches them without a copy. See `guides.MaskTable`.
        """
        on_cpu = self._device.type == "cpu"
        self._masks = masks if on_cpu else seen_by_gpu(masks, self._device)

    @property
    def has_masks(self) -> bool:
        return self._masks is not None

    def set_masks(self, slots: Mapping[Lane, MaskSlot]) -> None:
        """Which masks these lanes sample under next; ordered with `sample`."""
        lanes = upload(list(slots), self._device, torch.int64)
        self._mask_of_lane[lanes] = upload(list(slots.values()), self._device, torch.int64)

    def bind(self, *bindings: LaneBinding) -> None:
        """Sequences take over lanes, one each; ordered with `sample` on the caller's stream.

        All at once: to bring a GPU many numbers takes the host no longer than to bring it one.
        """
        if not bindings:
            return
        self._all_needs = None
        for binding in bindings:
            self._needs[binding.lane] = _needs_of(binding)
        reals = [[getattr(each.sampling, name) for name in _REALS] for each in bindings]
        lanes = upload([each.lane for each in bindings], self._device, torch.int64)
        self._reals[lanes] = upload(reals, self._device, torch.float32)
        self._integers[lanes] = upload(list(map(_integers_of, bindings)), self._device, torch.int64)
        self._mask_of_lane.index_fill_(0, lanes, -1)
        self._bias.clear(lanes)
        self._stop_mask.clear(lanes)
        for binding in bindings:
            lane, params = binding.lane, binding.sampling
            if bias := params.logit_bias:
                self._bias.set(lane, list(bias), list(bias.values()))
            if params.min_tokens and (stops := binding.stop_ids):
                self._stop_mask.set(lane, stops, [-torch.inf] * len(stops))
            if params.counts_tokens:
                self._count_history(lane, binding.history, binding.prompt_len)

    def observe(self, lanes: Tensor, tokens: Tensor) -> None:
        """Note tokens that were fed, for the repetition penalty.

        Needed only for tokens that were not in the binding's `history`; noting a token again
        changes nothing. Free while no bound sequence has penalties.

        Args:
            lanes: [n] int64.
            tokens: [n] int64.
        """
        if self._seen is not None and self._union().penalties:
            self._seen[lanes, tokens] = True

    def draw_inputs(self, lanes: Tensor) -> tuple[Tensor, Tensor]:
        """[n] temperatures and [n] noise keys of these lanes ([n] int64)."""
        return self._reals[lanes, _REALS["temperature"]], self._integer("key", lanes)

    def mask_inputs(self, lanes: Tensor) -> tuple[Tensor, Tensor]:
        """[slots, words] masks, and [n] which of them these lanes ([n] int64) have, -1: none."""
        assert self._masks is not None, "use_masks() comes before guided sequences"
        return self._masks, self._mask_of_lane[lanes]

    def needs(self, lanes: Iterable[int]) -> Needs:
        """What sampling these lanes takes; host only. Give it to `sample`."""
        return Needs.union({self._needs[lane] for lane in lanes})

    def sample(
        self, logits: Tensor, lanes: Tensor, positions: Tensor, needs: Needs | None = None
    ) -> Sampled:
        """Choose each row's next token.

        Args:
            logits: [n, vocab_size] float32; overwritten.
            lanes: [n] int64, distinct.
            positions: [n] int64, positions of the tokens being sampled: prompt length plus
                the number of output tokens so far.
            needs: from `needs()` over the same lanes; without it everything runs that any
                bound lane uses, with the same result.

        Cost: no synchronisation and no data-dependent shapes, but for top-p on the CPU. Shapes
        depend on n and `needs` alone, so a captured graph may be keyed by them.
        """
        needs = self._union() if needs is None else needs
        raw = logits.log_softmax(-1) if needs.top_logprobs >= 0 else None
        self._edit(logits, lanes, positions, needs)
        if needs.draws:
            self._draw(logits, lanes, positions, needs)
        tokens = _argmax(logits)
        if needs.penalties:
            self._count(lanes, tokens)
        return Sampled(tokens, None if raw is None else _of_tokens(raw, tokens, needs.top_logprobs))

    def _union(self) -> Needs:
        if self._all_needs is None:
            self._all_needs = self.needs(range(len(self._needs)))
        return self._all_needs

    def _count_history(self, lane: int, history: Sequence[int], prompt_len: int) -> None:
        if self._seen is None:
            shape = (len(self._needs), self._vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
        assert self._counts is not None
        tokens = upload(history, self._device, torch.int64)
        output = tokens[prompt_len:]
        self._seen[lane].zero_()[tokens] = True
        self._counts[lane].zero_().index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def _count(self, lanes: Tensor, tokens: Tensor) -> None:
        # Lanes without penalties are counted too: binding one that needs counts clears it.
        assert self._seen is not None
        assert self._counts is not None
        self._seen[lanes, tokens] = True
        self._counts[lanes, tokens] += 1

    def _real(self, name: str, lanes: Tensor) -> Tensor:
        return self._reals[lanes, _REALS[name]].unsqueeze(1)

    def _integer(self, name: str, lanes: Tensor) -> Tensor:
        return self._integers[lanes, _INTEGERS[name]]

    def _edit(self, logits: Tensor, lanes: Tensor, positions: Tensor, needs: Needs) -> None:
        if needs.masks:
            self._mask(logits, lanes)
        if needs.biases:
            self._bias.add_to(logits, lanes)
        if needs.min_tokens:
            is_early = positions < self._integer("stops_from", lanes)
            self._stop_mask.add_to(logits, lanes, is_early)
        if needs.penalties:
            self._penalise(logits, lanes)

    def _mask(self, logits: Tensor, lanes: Tensor) -> None:
        masks, slots = self.mask_inputs(lanes)
        allowed = _bits(masks.index_select(0, slots.clamp(min=0)))[:, : self._vocab_size]
        logits.masked_fill_(~(allowed | (slots < 0).unsqueeze(1)), -torch.inf)

    def _penalise(self, logits: Tensor, lanes: Tensor) -> None:
        assert self._seen is not None
        assert self._counts is not None
        repetition = self._real("repetition_penalty", lanes)
        factor = torch.where(logits > 0, 1 / repetition, repetition)
        logits.copy_(torch.where(self._seen[lanes], logits * factor, logits))
        counts = self._counts[lanes]
        logits -= self._real("frequency_penalty", lanes) * counts
        logits -= self._real("presence_penalty", lanes) * (counts > 0)

    def _draw(self, logits: Tensor, lanes: Tensor, positions: Tensor, needs: Needs) -> None:
        temperature = self._real("temperature", lanes)
        if needs.top_k or needs.top_p or needs.min_p:
            self._truncate(logits, temperature, lanes, needs)
        # argmax(logits / T + noise) without the division: T = 0 is greedy by itself.
        noise = gumbel_noise(self._integer("key", lanes), positions, self.codes)
        logits.addcmul_(noise, temperature)

    def _truncate(self, logits: Tensor, temperature: Tensor, lanes: Tensor, needs: Needs) -> None:
        relative = relative_logprobs(logits, temperature)
        cut = cuts(
            relative,
            min_p=self._real("min_p", lanes) if needs.min_p else None,
            top_k=self._integer("top_k", lanes).unsqueeze(1) if needs.top_k else None,
            largest_k=needs.top_k,
            top_p=self._real("top_p", lanes) if needs.top_p else None,
        )
        logits.masked_fill_(relative < cut, -torch.inf)


def token_logprobs(logits: Tensor, tokens: Tensor, k: int) -> TokenLogprobs:
    """Logprobs of given tokens (a prompt's) and of the k likeliest ones.

    Args:
        logits: [n, vocab_size] float32; left as they are.
        tokens: [n] int64.
        k: 0 .. vocab_size; more is cut to it.
    """
    return _of_tokens(logits.log_softmax(-1), tokens, k)


_REALS = {
    name: column
    for column, name in enumerate(
        (
            "temperature",
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        )
    )
}
_INTEGERS = {"top_k": 0, "key": 1, "stops_from": 2}


def _integers_of(binding: LaneBinding) -> list[int]:
    """In the order of `_INTEGERS`."""
    params = binding.sampling
    stops_from = binding.prompt_len + params.min_tokens
    return [max(params.top_k, 0), seed_key(binding.seed), stops_from]


class _SparseLogits:
    """Per lane, a few numbers to add to logits: [lanes, width] ids and values, zero-padded."""

    def __init__(self, lanes: int, device: torch.device) -> None:
        self._ids = torch.zeros(lanes, 0, dtype=torch.int64, device=device)
        self._values = torch.zeros(lanes, 0, device=device)

    def clear(self, lanes: Tensor) -> None:
        """These lanes ([n] int64) add nothing."""
        if self._values.numel():
            self._values.index_fill_(0, lanes, 0.0)

    def set(self, lane: int, ids: Sequence[int], values: Sequence[float]) -> None:
        """Of a lane that adds nothing so far; at least one number."""
        if (missing := len(ids) - self._ids.shape[1]) > 0:
            width = (0, missing)
            self._ids = torch.nn.functional.pad(self._ids, width)
            self._values = torch.nn.functional.pad(self._values, width)
        self._ids[lane, : len(ids)] = upload(ids, self._ids.device)
        self._values[lane, : len(ids)] = upload(values, self._values.device)

    def add_to(self, logits: Tensor, lanes: Tensor, rows: Tensor | None = None) -> None:
        """Add to all rows, or to those where `rows` ([n] bool) is true."""
        values = self._values[lanes]
        if rows is not None:
            values = torch.where(rows.unsqueeze(1), values, 0.0)
        logits.scatter_add_(1, self._ids[lanes], values)


def _needs_of(binding: LaneBinding) -> Needs:
    params: SamplingParams = binding.sampling
    draws = not params.is_greedy
    return Needs(
        draws=draws,
        biases=bool(params.logit_bias),
        min_tokens=params.min_tokens > 0 and bool(binding.stop_ids),
        penalties=params.counts_tokens,
        min_p=draws and params.min_p > 0.0,
        top_k=max(params.top_k, 0) if draws else 0,
        top_p=draws and params.top_p < 1.0,
        top_logprobs=-1 if params.logprobs is None else params.logprobs,
        masks=params.structured_outputs is not None,
    )


def _bits(words: Tensor) -> Tensor:
    """[n, 32 k] bool from [n, k] int32, lowest bits first."""
    if words.device.type == "cpu":  # as below, in a tenth of the time
        octets = words.numpy().view(np.uint8)
        return torch.from_numpy(np.unpackbits(octets, axis=1, bitorder="little")).bool()
    places = torch.arange(32, dtype=torch.int32, device=words.device)
    return (words.unsqueeze(-1) >> places).bitwise_and_(1).bool().flatten(1)


def _argmax(logits: Tensor) -> Tensor:
    """[n]: the first of each row's largest values."""
    if logits.device.type == "cpu":  # where NumPy takes 1/50 of torch's time
        return torch.from_numpy(np.argmax(logits.numpy(), axis=1))
    return logits.argmax(-1)


def _of_tokens(logprobs: Tensor, tokens: Tensor, k: int) -> TokenLogprobs:
    chosen = logprobs.gather(1, tokens.unsqueeze(1))
    ranks = (logprobs > chosen).sum(-1) + 1
    top = logprobs.topk(min(k, logprobs.shape[1]))
    return TokenLogprobs(chosen.squeeze(1), ranks, top.indices, top.values)
