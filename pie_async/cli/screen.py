"""What `pie-async top` draws."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from pie_async.config import format_size
from pie_async.live.frame import LinkGauge, LiveFrame
from pie_async.live.timeline import TRACKS, Span
from pie_async.live.view import STATES, MemoryMap

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

WINDOW_S = 8.0
MOST_ROWS = 12
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_STYLES = {
    "r": "blue", "c": "bright_black", "o": "yellow", "i": "yellow", "s": "green",
    "p": "magenta", "k": "bright_black", ".": "grey23", "_": "grey11",
}  # fmt: skip
_MARKS = {".": "·", "_": " ", "k": "▒", "c": "▒"}
_TRACK_STYLES = {"compute": "blue", "stall": "red", "h2d": "green", "d2h": "yellow"}
_TRACK_NAMES = {"compute": "compute", "stall": "waits", "h2d": "to device", "d2h": "to pool"}


class Screen:
    """A rich renderable of the last frame and the spans of the last seconds."""

    def __init__(self) -> None:
        self._frame: LiveFrame | None = None
        self._trouble: str | None = None
        self._spans: deque[Span] = deque()

    def take(self, frame: LiveFrame | str) -> None:
        """Show this from now on; a text says why there is nothing new."""
        if isinstance(frame, str):
            self._trouble = frame
            return
        now_s = frame.view.now_s
        if self._frame is not None and now_s < self._frame.view.now_s:
            self._spans.clear()  # a new engine
        self._frame, self._trouble = frame, None
        self._spans.extend(frame.view.spans)
        while self._spans and self._spans[0].end_s < now_s - WINDOW_S:
            self._spans.popleft()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._frame is None:
            yield Text(self._trouble or "connecting")
            return
        width = min(options.max_width, 160)
        frame = self._frame
        yield self._head(frame)
        yield _tiles(frame)
        yield Text()
        yield from _memory(frame.view.memory, width)
        yield _legend(frame)
        yield Text()
        yield from self._timeline(frame.view.now_s, width)
        yield Text()
        yield _gauge("to the device", frame.h2d, "green", width)
        yield _gauge("to the pool", frame.d2h, "yellow", width)
        yield Text()
        yield from _governor(frame)
        yield Text()
        yield _requests(frame)

    def _head(self, frame: LiveFrame) -> Text:
        state = self._trouble or ("live" if frame.is_accepting else "draining")
        return Text.assemble(
            ("pie_async ", "bold"), f"{frame.model}  ", (state, "red" if self._trouble else "green")
        )

    def _timeline(self, now_s: float, width: int) -> Iterator[Text]:
        columns = width - 12
        column_s = WINDOW_S / columns
        start_s = now_s - WINDOW_S
        for track in TRACKS:
            busy_s = [0.0] * columns
            for span in self._spans:
                if span.track == track:
                    _spread(busy_s, span.start_s - start_s, span.end_s - start_s, column_s)
            line = "".join(_EIGHTHS[_eighths(each / column_s)] for each in busy_s)
            yield Text.assemble(
                (f"{_TRACK_NAMES[track]:<11} ", "dim"), (line, _TRACK_STYLES[track])
            )


def _spread(busy_s: list[float], start_s: float, end_s: float, column_s: float) -> None:
    first, last = max(0, int(start_s / column_s)), min(len(busy_s) - 1, int(end_s / column_s))
    for column in range(first, last + 1):
        begin, end = column * column_s, (column + 1) * column_s
        busy_s[column] += max(0.0, min(end, end_s) - max(begin, start_s))


def _eighths(share: float) -> int:
    """What took any time at all is seen."""
    return 0 if share <= 0 else max(1, min(8, round(8 * share)))


def _tiles(frame: LiveFrame) -> Text:
    stats = frame.view.stats
    queued = [(stats.waiting, "waiting"), (stats.parked, "parked"), (stats.paused, "paused")]
    others = "".join(f", {number} {name}" for number, name in queued if number)
    return Text(
        f"{frame.output_tokens_per_s:,.0f} tokens/s   {stats.running} running{others}   "
        f"expansion {stats.expansion_ratio:.2f}x   stall {frame.stall_share:.1%}"
    )


def _memory(memory: MemoryMap, width: int) -> Iterator[Text]:
    for name, cells in (("arena", memory.arena), ("ring", memory.ring), ("pool", memory.pool)):
        line = Text(f"{name:<11} ", "dim")
        shown = cells[: width - 12]
        for letter in shown:
            line.append(_MARKS.get(letter, "█"), _STYLES[letter])
        yield line


def _legend(frame: LiveFrame) -> Text:
    stats, legend = frame.view.stats, Text(" " * 12)
    counts = {
        "r": stats.resident_blocks,
        "c": stats.cached_blocks,
        "s": stats.streamed_blocks,
        "p": stats.parked_blocks,
    }
    for letter, count in counts.items():
        legend.append(_MARKS.get(letter, "█"), _STYLES[letter])
        legend.append(f" {STATES[letter]} {count:,}   ", "dim")
    return legend


def _gauge(name: str, gauge: LinkGauge, style: str, width: int) -> Text:
    peak = gauge.peak_bytes_per_s
    room = max(10, min(40, width - 56))
    filled = round(room * min(1.0, gauge.bytes_per_s / peak)) if peak else 0
    told = f" {gauge.bytes_per_s / 1e9:.2f} GB/s"
    told += f" of {peak / 1e9:.1f} measured" if peak else ", no peak measured yet"
    return Text.assemble(
        (f"{name:<14}", "dim"), ("━" * filled, style), ("━" * (room - filled), "grey23"), told
    )


def _governor(frame: LiveFrame) -> Iterator[Text]:
    stats, view = frame.view.stats, frame.view
    yield Text(
        f"governor: may stream {stats.streamed_limit_blocks:,} blocks of "
        f"{format_size(stats.block_bytes)}, streams {stats.streamed_blocks:,}"
    )
    for change in list(view.limits)[-1:-4:-1]:
        ago = f"{view.now_s - change.at_s:8.0f} s ago  "
        yield Text.assemble((ago, "dim"), (f"{change.cause:<8}", "bold"), change.reason)


def _requests(frame: LiveFrame) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("request", "state"):
        table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=32)
    for name in ("prompt", "output", "in the pool"):
        table.add_column(name, justify="right")
    sequences = frame.view.sequences
    for each in sequences[:MOST_ROWS]:
        table.add_row(
            Text(each.name or f"sequence {each.sequence}"),
            each.state,
            f"{each.prompt_tokens:,}",
            f"{each.output_tokens:,} of {each.max_tokens:,}",
            f"{each.pooled_share:.0%}",
        )
    if len(sequences) > MOST_ROWS:
        table.add_row(Text(f"and {len(sequences) - MOST_ROWS} more", "dim"))
    return table
