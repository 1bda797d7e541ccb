"""The text as it streams: panes on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from scripts._demo.chat import Reply
from scripts._demo.watch import PoolSample

REFRESH_EVERY_S = 0.125
_LINES_PER_STATUS = 8
_PANE_ROWS = 6
_PANE_COLUMNS = 36


class Screen(Protocol):
    """Shows where the chats and the pool are; called every `REFRESH_EVERY_S`."""

    def show(self, sample: PoolSample | None) -> None: ...


@contextlib.contextmanager
def screen(console: Console, replies: Sequence[Reply]) -> Iterator[Screen]:
    """What suits the console; on a terminal the last frame stays on the screen."""
    if not console.is_terminal:
        lines = Lines(console, replies)
        yield lines
        lines.finish()
        return
    with Live(console=console, auto_refresh=False) as live:
        yield Panes(live, replies)


def status(sample: PoolSample | None) -> Text:
    """The pool in one line."""
    if sample is None:
        return Text("waiting for the server", style="dim")
    return Text.assemble(
        ("pool  ", "bold"),
        f"resident {sample.resident_blocks}/{sample.device_slots}  ",
        (f"streamed {sample.streamed_blocks}  ", "cyan"),
        (f"parked {sample.parked_blocks}  ", "magenta"),
        (f"expansion {sample.expansion_ratio:.2f}x  ", "bold green"),
        f"running {sample.running}  waiting {sample.waiting}",
    )


class Lines:
    """Whole lines in the order in which they are completed, and the pool now and then."""

    def __init__(self, console: Console, replies: Sequence[Reply]) -> None:
        self._console = console
        self._replies = replies
        self._shown = [0] * len(replies)
        self._refreshes = 0

    def show(self, sample: PoolSample | None) -> None:
        for number in range(len(self._replies)):
            self._print_up_to(number, self._replies[number].text.rfind("\n") + 1)
        if self._refreshes % _LINES_PER_STATUS == 0:
            self._print(status(sample))
        self._refreshes += 1

    def finish(self) -> None:
        """Print lines that were begun."""
        for number, reply in enumerate(self._replies):
            self._print_up_to(number, len(reply.text))

    def _print_up_to(self, number: int, end: int) -> None:
        text = self._replies[number].text[self._shown[number] : end]
        for line in filter(None, text.splitlines()):
            self._print(Text(f"[{number + 1}] {line}"))
        self._shown[number] = max(end, self._shown[number])

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)


class Panes:
    """A pane per chat, as many as there is room for, over the state of the pool."""

    def __init__(self, live: Live, replies: Sequence[Reply]) -> None:
        self._live = live
        self._replies = replies

    def show(self, sample: PoolSample | None) -> None:
        self._live.update(self._frame(sample), refresh=True)

    def _frame(self, sample: PoolSample | None) -> Layout:
        width, height = self._live.console.size
        columns = max(1, min(4, width // _PANE_COLUMNS))
        rows = max(1, min((height - 2) // _PANE_ROWS, -(-len(self._replies) // columns)))
        shown = self._replies[: rows * columns]
        grid = Layout()
        grid.split_column(
            *(_row(shown[at : at + columns]) for at in range(0, len(shown), columns)),
            Layout(self._status(sample, len(shown)), size=1),
        )
        return grid

    def _status(self, sample: PoolSample | None, num_shown: int) -> Text:
        line = status(sample)
        if hidden := len(self._replies) - num_shown:
            line.append(f"  ({hidden} more chats)", style="dim")
        return line


def _row(replies: Sequence[Reply]) -> Layout:
    row = Layout()
    row.split_row(*(Layout(_pane(reply)) for reply in replies))
    return row


def _pane(reply: Reply) -> Panel:
    tokens = reply.times.output_tokens if reply.times else 0
    return Panel(
        _Tail(reply.text),
        title=reply.scene.cast,
        subtitle=f"{tokens} tokens",
        border_style="green" if reply.is_finished else "blue",
    )


class _Tail:
    """The last lines of a text that fit."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.height or options.max_height
        # a line of the text fills at least one of the pane
        end = "\n".join(self._text.strip("\n").split("\n")[-height:])
        yield from Text(end).wrap(console, options.max_width)[-height:]
