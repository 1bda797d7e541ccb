"""What outputs must look like, compiled, and the masks of what may follow: through llguidance.

A guide is a schema, pattern or grammar compiled for one vocabulary. Nothing here is for the event
loop: compiling takes milliseconds, up to a second, and a mask mostly 20 to 100 us. llguidance lets
go of the interpreter meanwhile and has limits of its own on what either may take.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from pie_async.core.guidance import MASKS_PER_LANE
from pie_async.errors import InvalidRequest
from pie_async.ids import SequenceId
from pie_async.messages import MaskMade, MaskOrder
from pie_async.structured import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

MOST_KEPT = 128
"""Compiled guides that are kept for the next request that sends the same."""
MOST_KEPT_CHARS = 4 * 2**20
MOST_APART = 4
"""Times that a guide is compiled, for as many threads to make its masks."""
MOST_AGAIN_S = 0.01
"""What takes longer to compile is compiled once: who sends it again would wait for that."""
MOST_WAIT_S, MOST_EACH_S = 5e-3, 1e-4
"""Masks that took longer together are each said to have taken all of that time: one of them may be
slow, and asked apart each is timed by itself. Up to there it may have been the interpreter, which
the thread waits for when they are made."""
_WHITE_SPACE = r"\r?\n[ \t]{0,20}| ?"
"""Between JSON's tokens. Without a bound some models never stop: white space is always right."""
_WORD_BITS = 32
_DEAD_END = "NoExtension"

MaskTable = NDArray[np.int32]
"""[slots, words]: bit b of word w says whether token 32 w + b may be sampled."""


def mask_shape(lanes: int, vocab_size: int) -> tuple[int, int]:
    """Slots and words of the `MaskTable` of that many lanes."""
    return MASKS_PER_LANE * lanes, -(-vocab_size // _WORD_BITS)


class Spelling(Protocol):
    """The part of a tokenizer that guides need."""

    def guide_tokens(self, vocab_size: int, end_ids: Sequence[int]) -> LLTokenizer:
        """llguidance's view of it, for logits of this width; slow.

        Args:
            end_ids: tokens that end an output; if there are none, any one that is never output.
        """
        ...


class _Family:
    """What one guide was compiled to, several times: copies of a matcher share a lock, and whoever
    makes masks for many sequences of one guide would make one after the other."""

    def __init__(self, compile_s: float) -> None:
        self.compile_s = compile_s
        self.matchers: list[LLMatcher] = []
        self._num_copies = 0

    def copy(self) -> LLMatcher:
        """Of each in turn."""
        self._num_copies += 1
        return self.matchers[self._num_copies % len(self.matchers)].deep_copy()


class GuideCompiler:
    """Compiles guides for one vocabulary. Safe to use from several threads.

    Args:
        tokenizer: what tokens spell.
        vocab_size: width of the logits.
        end_ids: tokens that end an output.
        is_inline: compile on the event loop: in simulated time, where the order of what threads
            do would be another one each time.
    """

    def __init__(
        self,
        tokenizer: Spelling,
        vocab_size: int,
        end_ids: Iterable[int],
        *,
        is_inline: bool = False,
    ) -> None:
        self.is_inline = is_inline
        self._spelling = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = tuple(sorted(end_ids))
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Family] = OrderedDict()
        self._most_apart = 1 if is_inline else min(MOST_APART, os.cpu_count() or 1)
        self._kept_chars = 0

    @functools.cached_property
    def never_ids(self) -> tuple[int, ...]:
        """Tokens that masks allow though none may be sampled: nothing ends an output here."""
        return () if self._end_ids else tuple(self._tokens().eos_tokens)

    @functools.cached_property
    def words(self) -> int:
        """Of a mask; tokens beyond them are in no vocabulary, and never allowed."""
        return -(-self._tokens().vocab_size // _WORD_BITS)

    def _tokens(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._spelling.guide_tokens(self._vocab_size, self._end_ids)
            return self._tokenizer

    def check(self, guide: StructuredOutputs) -> None:
        """Compile it, if that has not been done yet.

        Raises:
            InvalidRequest: the guide is not valid, too complex, or nothing fits it; `param`
                names the field.
        """
        self._family(guide, most=1)

    def compile(self, guide: StructuredOutputs) -> LLMatcher:
        """A matcher at the start of an output. Raises as `check` does."""
        family = self._family(guide, most=self._most_apart)
        with self._lock:
            return family.copy()

    def _family(self, guide: StructuredOutputs, *, most: int) -> _Family:
        """Its matchers: one more, if there are fewer than `most` and it is soon done."""
        param = f"structured_outputs.{guide.kind}"
        try:
            source = _source(guide)
        except ValueError as error:
            raise InvalidRequest(f"{param} cannot be used: {error}", param=param) from None
        with self._lock:
            family = self._kept.get(source)
            if family is not None:
                self._kept.move_to_end(source)
                if len(family.matchers) >= most or family.compile_s > MOST_AGAIN_S:
                    return family
        began_s = time.thread_time()
        matcher = self._compiled(source, param)
        took_s = time.thread_time() - began_s
        with self._lock:
            if source not in self._kept:
                self._keep(source, _Family(took_s))
            family = self._kept[source]
            family.matchers.append(matcher)
            return family

    def _compiled(self, source: str, param: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)  # or errors quote schemas and prompts
        matcher = LLMatcher(self._tokens(), source, log_level=0, limits=limits)
        if not matcher.is_error():
            # The first mask shows what else is wrong, and makes that of each sequence quick.
            matcher.compute_bitmask()
        if matcher.is_error():
            why = _brief(matcher.get_error().strip().splitlines())
            if why.startswith(_DEAD_END):
                why = "no output fits it"
            raise InvalidRequest(f"{param} cannot be used: {why}", param=param)
        return matcher

    def _keep(self, source: str, family: _Family) -> None:
        self._kept[source] = family
        self._kept_chars += len(source)
        while len(self._kept) > MOST_KEPT or self._kept_chars > MOST_KEPT_CHARS:
            self._kept_chars -= len(self._kept.popitem(last=False)[0])


def _brief(lines: Sequence[str], most: int = 300) -> str:
    text = " ".join(line.strip() for line in lines[:6]) or "it is not valid"
    return text if len(text) <= most else text[:most] + "..."


def _json_source(schema: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _WHITE_SPACE})


def _source(guide: StructuredOutputs) -> str:
    """As llguidance takes it. Raises ValueError."""
    from llguidance import LLMatcher, grammar_from

    match guide.kind:
        case "json":
            assert isinstance(guide.json, str)
            return _json_source(guide.json)
        case "json_object":
            return _json_source('{"type": "object"}')
        case "regex":
            return LLMatcher.grammar_from_regex(guide.regex or "")
        case "choice":
            texts = " | ".join(json.dumps(each, ensure_ascii=False) for each in guide.choice or ())
            return LLMatcher.grammar_from_lark(f"start: {texts}")
        case "grammar":
            return grammar_from("grammar", guide.grammar or "")


class GuideRoom:
    """The guides of one engine's sequences, which write their masks into a table.

    Args:
        table: see `MaskTable`; the device reads it.
    """

    def __init__(self, compiler: GuideCompiler, table: MaskTable) -> None:
        self._compiler = compiler
        self._table = table
        # Rows whose sequences have ended are sampled under whatever lies there: nothing comes of
        # them, but sampling must find something.
        table[:, 0] = -1
        self._matchers: dict[SequenceId, LLMatcher] = {}

    def make(self, order: MaskOrder, clock: Callable[[], float] = time.thread_time) -> MaskMade:
        """Carry out an order, in any thread; never raises.

        Args:
            clock: of the thread by default: the time in which it waits for the interpreter is none
                that the guide takes.
        """
        began_s = clock()
        try:
            if order.guide is not None:
                self._matchers[order.sequence] = self._compiler.compile(order.guide)
            matcher = self._matchers[order.sequence]
            if order.tokens:
                matcher.consume_tokens(list(order.tokens))
            if not (matcher.is_error() or matcher.is_stopped()):
                row = self._row(order)
                matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            return self._made(order, clock() - began_s)
        except InvalidRequest as error:
            return MaskMade(order.sequence, order.slot, clock() - began_s, refusal=str(error))

    def make_together(
        self,
        orders: Sequence[MaskOrder],
        executor: LLExecutor,
        clock: Callable[[], float] = time.perf_counter,
    ) -> tuple[MaskMade, ...]:
        """Carry out orders of guides that are compiled; never raises.

        The interpreter is let go of twice in all. Made one by one, each mask would wait for it
        twice, as long as the loop has something to do: up to a millisecond for each of 50 us.
        """
        if self._table.shape[1] != self._compiler.words:  # llguidance wants its own width
            return tuple(map(self.make, orders))
        began_s = clock()
        pairs = [(self._matchers[order.sequence], order) for order in orders]
        if fed := [(m, o.tokens[0]) for m, o in pairs if len(o.tokens) == 1]:
            executor.consume_token_par(fed)
        for matcher, order in pairs:
            if len(order.tokens) > 1:  # it was taken off its lane meanwhile
                matcher.consume_tokens(list(order.tokens))
        going = [(m, int(o.slot)) for m, o in pairs if not (m.is_error() or m.is_stopped())]
        if going:
            table = self._table
            executor.unsafe_compute_mask_ptr(going, table.ctypes.data, table[0].nbytes, len(table))
        took_s = clock() - began_s
        is_long = took_s > MOST_WAIT_S + MOST_EACH_S * len(orders)
        each_s = took_s if is_long else took_s / len(orders)
        return tuple([self._made(order, each_s) for order in orders])

    def _row(self, order: MaskOrder) -> MaskTable:
        return self._table[order.slot, : self._compiler.words]

    def _made(self, order: MaskOrder, made_s: float) -> MaskMade:
        """What became of an order: if its output may go on, the mask lies in its slot."""
        matcher = self._matchers[order.sequence]
        refusal = _brief(matcher.get_error().splitlines()) if matcher.is_error() else None
        is_ended = refusal is None and matcher.is_stopped()
        if refusal is None and not is_ended:
            octets = self._row(order).view(np.uint8)
            for token in self._compiler.never_ids:
                octets[token // 8] &= 0xFF ^ (1 << token % 8)
        return MaskMade(order.sequence, order.slot, made_s, is_ended, refusal)

    def forget(self, sequences: Sequence[SequenceId]) -> None:
        """See `Guides`."""
        for sequence in sequences:
            self._matchers.pop(sequence, None)


class ThreadedGuides:
    """`Guides` whose masks are made in threads of their own.

    Several that are asked for together have one thread, which never waits behind one that is asked
    for alone, and llguidance's own threads. Guides compiled from the same source share a lock
    there, and are made one after the other; so those are compiled several times.
    """

    def __init__(self, room: GuideRoom) -> None:
        self._room = room
        self.forget = room.forget
        self._num_threads = min(8, os.cpu_count() or 2)
        self._alone = ThreadPoolExecutor(self._num_threads, thread_name_prefix="pie-guide")
        self._together = ThreadPoolExecutor(1, thread_name_prefix="pie-guides")

    async def make(self, orders: Sequence[MaskOrder]) -> tuple[MaskMade, ...]:
        """See `Guides`."""
        loop = asyncio.get_running_loop()
        if len(orders) == 1:
            return (await loop.run_in_executor(self._alone, self._room.make, orders[0]),)
        return await loop.run_in_executor(self._together, self._make_together, orders)

    def _make_together(self, orders: Sequence[MaskOrder]) -> tuple[MaskMade, ...]:
        return self._room.make_together(orders, self._executor)

    @functools.cached_property
    def _executor(self) -> LLExecutor:
        """Of the one thread: importing and making it takes a moment."""
        from llguidance import LLExecutor

        return LLExecutor(self._num_threads)

    def close(self) -> None:
        """See `Guides`."""
        for threads in (self._alone, self._together):
            threads.shutdown(wait=False, cancel_futures=True)


class TimedGuides:
    """`Guides` of simulated time: each mask is made at once, and said to have taken `mask_s`.

    Masks are the real ones, times are not: the same seed gives the same story.
    """

    def __init__(self, room: GuideRoom, *, mask_s: float = 50e-6) -> None:
        self._room = room
        self._mask_s = mask_s
        self.forget = room.forget

    async def make(self, orders: Sequence[MaskOrder]) -> tuple[MaskMade, ...]:
        """See `Guides`."""
        made = [self._room.make(order, clock=lambda: 0.0) for order in orders]
        await asyncio.sleep(self._mask_s * len(orders))
        return tuple([msgspec.structs.replace(mask, made_s=self._mask_s) for mask in made])

    def close(self) -> None:
        """See `Guides`."""
