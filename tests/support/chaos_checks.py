"""What must hold when a run drawn from a seed is over."""

from __future__ import annotations

from dataclasses import dataclass, field

from pie_async.device.sim_sampler import EndOfSequence, SimSampler
from pie_async.engine import Engine
from pie_async.ids import Lane, SequenceId
from pie_async.messages import LaneBinding, Row
from tests.support.chaos import Chaos, Client
from tests.support.soak import assert_no_leak


@dataclass
class Seen:
    """What a client saw of one output."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    end: str | None = None


def check_returned(engine: Engine) -> None:
    """Every block, slot, lane and stream is back."""
    assert_no_leak(engine)
    assert engine._actors is not None
    schedule = engine._actors.scheduler._schedule
    residency = schedule.residency
    cached = len(residency.cache)
    held = {
        "device slots that are not cached": residency.device.num_used - cached,
        "host slots": residency.host.num_used,
        "staging slots": residency.staging.num_used,
        "lanes": schedule.lanes.num_used,
        "blocks that are not cached": len(residency.blocks) - cached,
        "sequences": len(schedule.sequences),
        "streams": len(engine._streams),
        "deliveries": len(engine._actors.delivery._streams),
    }
    assert not any(held.values()), f"not returned: {held}"


def check_outputs(engine: Engine, chaos: Chaos, client: Client, outputs: list[Seen]) -> None:
    """Whatever a client saw is what its seed says, and it ended as its manners allow."""
    may_be_cut = chaos.closes_at_s is not None or chaos.pool.refused_at is not None
    for index, seen in enumerate(outputs):
        expected = _expected(engine, client, index)
        assert seen.tokens == expected[: len(seen.tokens)], f"{client}: {seen.tokens}"
        text = "".join(map(engine.tokenizer.token_text, seen.tokens))
        assert text.startswith(seen.text), f"{client}: {seen.text!r} of {text!r}"
        if seen.end == "stop":
            assert text[len(seen.text) :].startswith(client.params.stop), f"{client}: {text!r}"
        elif seen.end == "length":
            assert may_be_cut or len(seen.tokens) == client.params.max_tokens, f"{client}: {seen}"
            assert seen.text == text
        elif client.manner in ("reads", "is slow") and not may_be_cut:
            refused = chaos.options["max_queued_requests"] < len(chaos.clients)
            assert refused and seen.end == "Overloaded", f"{client} ended with {seen}"
        if seen.end not in ("stop", "abort"):
            assert not any(stop in seen.text for stop in client.params.stop)


def _expected(engine: Engine, client: Client, index: int) -> list[int]:
    """The tokens of an output, from the simulated device's definition of them."""
    sampler = SimSampler(
        seed=engine.config.seed,
        vocab_size=engine.tokenizer.vocab_size,
        end=EndOfSequence(),
    )
    lane, sequence, prompt_len = Lane(0), SequenceId(1), len(client.prompt)
    assert client.params.seed is not None
    sampler.bind(
        LaneBinding(
            lane=lane,
            sequence=sequence,
            sampling=client.params,
            seed=client.params.seed + index,
            stop_ids=(),
            prompt_len=prompt_len,
            history=(),
        )
    )
    rows = [
        Row(sequence, lane, prompt_len + done - 1, (), True)
        for done in range(client.params.max_tokens or 0)
    ]
    return [sampler.sample([row])[0].token for row in rows]
