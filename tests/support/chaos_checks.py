"""What must hold when a run drawn from a seed is over."""

from __future__ import annotations

from dataclasses import dataclass, field

from pie_async.engine import Engine
from pie_async.testing import expected_tokens
from tests.support.chaos import Chaos, Client


@dataclass
class Seen:
    """What a client saw of one output."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    end: str | None = None


def may_be_cut(chaos: Chaos) -> bool:
    """Whether what was drawn may end requests before their time."""
    return chaos.closes_at_s is not None or chaos.pool.refused_at is not None or chaos.may_lose


def check_outputs(engine: Engine, chaos: Chaos, client: Client, outputs: list[Seen]) -> None:
    """Whatever a client saw is what its seed says, and it ended as its manners allow."""
    is_unsafe = may_be_cut(chaos)
    for index, seen in enumerate(outputs):
        expected = expected_tokens(engine, len(client.prompt), client.params, index=index)
        assert seen.tokens == expected[: len(seen.tokens)], f"{client}: {seen.tokens}"
        text = "".join(map(engine.tokenizer.token_text, seen.tokens))
        assert text.startswith(seen.text), f"{client}: {seen.text!r} of {text!r}"
        if seen.end == "stop":
            assert text[len(seen.text) :].startswith(client.params.stop), f"{client}: {text!r}"
        elif seen.end == "length":
            assert is_unsafe or len(seen.tokens) == client.params.max_tokens, f"{client}: {seen}"
            assert seen.text == text
        elif client.manner in ("reads", "is slow") and not is_unsafe:
            refused = chaos.options["max_queued_requests"] < len(chaos.clients)
            assert refused and seen.end == "Overloaded", f"{client} ended with {seen}"
        if seen.end not in ("stop", "abort"):
            assert not any(stop in seen.text for stop in client.params.stop)
