"""The requests that are not finished: what was asked, what came, and who may have killed whom."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from pie_async.errors import PieError
from pie_async.ids import RequestId, SequenceId
from pie_async.messages import Advance, ReadingChanged, SequencesAdvanced, Submit
from pie_async.request_stream import RequestStream, failure_of
from pie_async.resilience.errors import RequestGivenUp
from pie_async.resilience.replay import Course

SUSPECT_DEATHS = 2
"""After so many deaths in a row a request is a suspect, see `Journal`; `most_deaths` end it."""
NEAR_TOKENS = 2
"""Two deaths so close in a sequence's output are deaths at the same place: what the engine had
in flight was lost with it."""


class _Entry:
    """One unfinished request."""

    def __init__(self, stream: RequestStream, first: Submit) -> None:
        self.stream = stream
        self.first = first
        self.courses = {
            sequence: Course(sequence, index, stream.tokens_of(sequence))
            for index, sequence in enumerate(first.sequences)
        }
        self.num_deaths = 0
        """Deaths in a row that it is blamed for."""
        self.died_at = 0
        """Output tokens that it had come to when the engine died last."""
        self.is_sent = True

    def blame(self) -> None:
        """The engine died while it had this request."""
        reached = sum(len(course.tokens) for course in self.courses.values())
        has_moved = abs(reached - self.died_at) > NEAR_TOKENS * len(self.courses)
        self.num_deaths = 1 if has_moved else self.num_deaths + 1
        self.died_at = reached
        self.is_sent = False


class Journal:
    """Hands facts to the streams, and knows what a new engine must be told.

    A death is blamed on every request that the engine had and that got no new token since the
    death before. One that is blamed for two is a suspect: in the next engine suspects come in one
    by one, the most blamed before all others, the next when the one before got a token or ended.
    So the request that kills is found, the others go on, and one that is only unlucky, behind many
    whose prompts took all of the short lives there were, soon has the token that clears it.
    """

    def __init__(self, *, most_deaths: int, on_finished: Callable[[RequestStream], None]) -> None:
        """`on_finished` is called with every request that ended or was closed."""
        self._most_deaths = most_deaths
        self._on_finished = on_finished
        self._entries: dict[RequestId, _Entry] = {}
        self._by_sequence: dict[SequenceId, _Entry] = {}
        self._suspects: deque[RequestId] = deque()
        self._on_trial: RequestId | None = None
        self._untold: dict[RequestStream, None] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def streams(self) -> list[RequestStream]:
        return [entry.stream for entry in self._entries.values()]

    # --- while an engine runs ---------------------------------------------------------------

    def open(self, stream: RequestStream, first: Submit) -> None:
        """A request is about to be submitted."""
        entry = self._entries[first.request] = _Entry(stream, first)
        for sequence in first.sequences:
            self._by_sequence[sequence] = entry

    def close(self, stream: RequestStream, *, error: PieError | None = None) -> bool:
        """End a request here and now: cancelled, or with an error. False if it had ended."""
        entry = self._entry_of(stream)
        if entry is None:
            return False
        if error is not None:
            stream.fail(error)
        else:
            for sequence in stream.unfinished:
                stream.push(Advance(sequence, None, "abort"))
            stream.tell()
        self._forget(entry)
        return True

    def take(self, fact: SequencesAdvanced, *, has_next: bool = False) -> list[SequenceId]:
        """Hand news to the streams.

        Args:
            has_next: more is there already: readers are told with that, or by `tell` at last, so
                that a server that is behind sends several tokens at a time.

        Returns: the sequences whose text reached a stop string, which the engine must end.
        """
        for prompt in fact.prompt_logprobs:
            if prompt.sequence in self._by_sequence:
                self._by_sequence[prompt.sequence].stream.push_prompt(prompt)
        stopped: list[SequenceId] = []
        for advance in fact.advances:
            # None: cancelled, or stopped while its next token was under way
            entry = self._by_sequence.get(advance.sequence)
            if entry is not None:
                self._take(entry, advance, stopped)
                if has_next:
                    self._untold[entry.stream] = None
                else:
                    entry.stream.tell()
        return stopped

    def tell(self) -> None:
        """Let readers have what they were not told yet."""
        for stream in self._untold:
            stream.tell()
        self._untold.clear()

    def _take(self, entry: _Entry, advance: Advance, stopped: list[SequenceId]) -> None:
        if (failure := failure_of(advance)) is not None:
            stopped += entry.courses
            self.close(entry.stream, error=failure)
            return
        entry.num_deaths = 0
        if self._on_trial == entry.first.request:
            self._on_trial = None
        has_stopped = entry.stream.push(advance)
        if has_stopped:
            stopped.append(advance.sequence)
        if has_stopped or advance.finish_reason is not None:
            del entry.courses[advance.sequence]
            del self._by_sequence[advance.sequence]
            if not entry.courses:
                self._forget(entry)

    # --- when it has died -------------------------------------------------------------------

    def engine_died(self) -> None:
        """Blame the requests that it had; those blamed too often end with an error."""
        self.tell()
        self._on_trial = None
        self._suspects.clear()
        for entry in list(self._entries.values()):
            if entry.is_sent:
                entry.blame()
            if entry.num_deaths >= self._most_deaths:
                why = f"the engine died {entry.num_deaths} times while it ran this request"
                self.close(entry.stream, error=RequestGivenUp(why))

    def resume(self, max_model_len: int) -> Iterator[Submit | ReadingChanged]:
        """What a new engine is told first: a suspect, then the others in the order in which they
        came."""
        deaths = {n: each.num_deaths for n, each in self._entries.items() if not each.is_sent}
        suspects = [number for number, count in deaths.items() if count >= SUSPECT_DEATHS]
        # Who is blamed most comes first: one more death may end it.
        self._suspects.extend(sorted(suspects, key=deaths.__getitem__, reverse=True))
        yield from self.try_next_suspect(max_model_len)
        for number, count in deaths.items():
            entry = self._entries.get(number)  # None: it went meanwhile
            if count < SUSPECT_DEATHS and entry is not None:
                yield from self._resume(entry, max_model_len)

    def try_next_suspect(self, max_model_len: int) -> Iterator[Submit | ReadingChanged]:
        """What the engine may be told besides, now."""
        while self._suspects and self._on_trial is None:
            number = self._suspects.popleft()
            if number in self._entries:
                entry = self._entries[number]
                # One that nobody reads gets no token, and the others must not wait for it.
                self._on_trial = number if entry.stream.is_read else None
                yield from self._resume(entry, max_model_len)

    def _resume(self, entry: _Entry, max_model_len: int) -> Iterator[Submit | ReadingChanged]:
        entry.is_sent = True
        for course in list(entry.courses.values()):
            if course.sequence not in self._by_sequence:
                continue  # cancelled meanwhile
            command = course.resume(entry.first, max_model_len)
            if command is not None:
                yield command
            else:
                self._take(entry, Advance(course.sequence, None, "length"), [])
                entry.stream.tell()
        if not entry.stream.is_read and entry.courses:
            yield ReadingChanged(sequences=tuple(entry.courses), is_read=False)

    def fail_all(self, error: PieError) -> None:
        """There will be no engine: every request ends with this error."""
        for stream in self.streams:
            self.close(stream, error=error)

    def _entry_of(self, stream: RequestStream) -> _Entry | None:
        unfinished = stream.unfinished
        return self._by_sequence.get(unfinished[0]) if unfinished else None

    def _forget(self, entry: _Entry) -> None:
        number = entry.first.request
        del self._entries[number]
        for sequence in entry.courses:
            del self._by_sequence[sequence]
        if self._on_trial == number:
            self._on_trial = None
        self._on_finished(entry.stream)
