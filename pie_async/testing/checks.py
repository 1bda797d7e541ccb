"""What must hold of an engine, whatever went wrong with it."""

from __future__ import annotations

import numpy as np

from pie_async.core import invariants
from pie_async.core.schedule import Schedule
from pie_async.device.sim_sampler import EndOfSequence, SimSampler
from pie_async.engine import Engine
from pie_async.ids import Lane, MaskSlot, SequenceId
from pie_async.messages import LaneBinding, MaskOrder, Row
from pie_async.model.guides import GuideCompiler, GuideRoom, mask_shape
from pie_async.sampling_params import SamplingParams


def schedule_of(engine: Engine) -> Schedule:
    """The scheduler's state, for checks."""
    return engine._running_actors().scheduler._schedule


def check_books(engine: Engine) -> None:
    """Every slot and block is somewhere, once; queues, lanes and owners agree.

    Raises:
        InvariantBroken: with a sentence for the first thing that is wrong.
    """
    invariants.check(schedule_of(engine))


def check_returned(engine: Engine) -> None:
    """An engine without requests holds nothing: every slot, lane, block and stream is back.

    Cached blocks may stay, whose slots are as good as free.

    Raises:
        AssertionError: naming what is held, and how much of it.
    """
    check_books(engine)
    schedule = schedule_of(engine)
    residency, cached = schedule.residency, len(schedule.residency.cache)
    held = {
        "device slots that are not cached": residency.device.num_used - cached,
        "host slots": residency.host.num_used,
        "staging slots": residency.staging.num_used,
        "lanes": schedule.lanes.num_used,
        "blocks that are not cached": len(residency.blocks) - cached,
        "sequences": len(schedule.sequences),
        "streams": len(engine._streams),
        "deliveries": len(engine._running_actors().delivery._streams),
    }
    assert not any(held.values()), f"not returned: {held}"
    assert residency.free_device == residency.device.size


def expected_tokens(
    engine: Engine, num_prompt_tokens: int, params: SamplingParams, *, index: int = 0
) -> list[int]:
    """What an output of the simulated device is to be, however it was scheduled.

    Args:
        params: with a seed and `max_tokens`; only a guide ends a sequence before these.
        index: of the output among the request's `n`.
    """
    assert params.seed is not None and params.max_tokens is not None
    sampler = SimSampler(
        seed=engine.config.seed, vocab_size=engine.tokenizer.vocab_size, end=EndOfSequence()
    )
    lane, sequence = Lane(0), SequenceId(1)
    sampler.bind(
        LaneBinding(
            lane=lane,
            sequence=sequence,
            sampling=params,
            seed=params.seed + index,
            stop_ids=params.stop_token_ids,
            prompt_len=num_prompt_tokens,
        )
    )
    masks = _Masks(engine, sampler, params)
    tokens: list[int] = []
    while len(tokens) < params.max_tokens and not masks.have_ended(tokens):
        row = Row(sequence, lane, num_prompt_tokens - 1 + len(tokens), (), True, masks.slot)
        tokens.append(sampler.sample([row])[0].token)
    return tokens


class _Masks:
    """Those of one output, if it is guided."""

    def __init__(self, engine: Engine, sampler: SimSampler, params: SamplingParams) -> None:
        self.slot: MaskSlot | None = None
        self._guide = params.structured_outputs
        if self._guide is not None:
            size = engine.tokenizer.vocab_size
            table = np.zeros(mask_shape(1, size), np.int32)
            sampler.use_masks(table)
            self._room = GuideRoom(GuideCompiler(engine.tokenizer, size, ()), table)
            self.slot = MaskSlot(0)

    def have_ended(self, tokens: list[int]) -> bool:
        """Make the mask of what may follow; whether nothing may."""
        if self.slot is None:
            return False
        order = MaskOrder(SequenceId(1), self.slot, tuple(tokens[-1:]), self._guide)
        self._guide = None
        return self._room.make(order).is_ended
