"""What a story says: which messages, in which order, and that every command came to one end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

from pie_async.messages import (
    IterationRan,
    IterationStaged,
    Message,
    RunIteration,
    StageIteration,
    SwapIn,
    SwapOut,
    SwappedIn,
    SwappedOut,
)
from pie_async.story import Story

M = TypeVar("M", bound=Message)
Step = type[Message] | Callable[[Any], bool]


def told(story: Story, kind: type[M], **fields: Any) -> list[M]:
    """The messages of this kind whose fields have these values, in order."""
    return [
        entry.message
        for entry in story
        if isinstance(entry.message, kind)
        and all(getattr(entry.message, name) == value for name, value in fields.items())
    ]


def check_order(story: Story, *steps: Step) -> None:
    """These steps happened, one after the other, whatever happened in between.

    Args:
        steps: a kind of message, or what tells whether one is meant.

    Raises:
        AssertionError: names the first step that did not come, and tells what came last.
    """
    entries = iter(story)
    for number, step in enumerate(steps):
        if not any(_is_meant(step, entry.message) for entry in entries):
            name = step.__name__ if hasattr(step, "__name__") else str(step)
            raise AssertionError(
                f"step {number}, {name}, did not come after those before it; the story ends:\n"
                f"{story.tell()}"
            )


def _is_meant(step: Step, message: Message) -> bool:
    return isinstance(message, step) if isinstance(step, type) else step(message)


def check_answered(story: Story) -> None:
    """Every command to the device came to exactly one end: nothing lost, nothing told twice.

    The engine is drained, and its story was kept from the start (`Story.keep_all`).

    Raises:
        AssertionError: names the commands without an end, and ends without a command.
    """
    open_commands: Counter[Hashable] = Counter()
    for entry in story:
        for key in _commanded(entry.message):
            open_commands[key] += 1
        for key in _ended(entry.message):
            open_commands[key] -= 1
    wrong = {key: count for key, count in open_commands.items() if count}
    assert not wrong, f"commands without an end (1) and ends without a command (-1): {wrong}"


def _commanded(message: Message) -> Iterator[Hashable]:
    match message:
        case RunIteration():
            yield "iteration", message.iteration
        case StageIteration():
            yield "staging", message.iteration
        case SwapIn():
            yield from (("in", move.block) for move in message.moves)
        case SwapOut():
            yield from (("out", move.block) for move in message.moves)


def _ended(message: Message) -> Iterator[Hashable]:
    match message:
        case IterationRan():
            yield "iteration", message.iteration
        case IterationStaged():
            yield "staging", message.iteration
        case SwappedIn():
            yield from (("in", block) for block in (*message.blocks, *message.failed))
        case SwappedOut():
            yield from (("out", block) for block in (*message.blocks, *message.failed))
