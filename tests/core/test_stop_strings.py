from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pie_async.core.stop_strings import StopMatcher


def run(
    stops: Sequence[str], pieces: Sequence[str], *, include_stop: bool = False
) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include_stop=include_stop)
    text = ""
    for piece in pieces:
        emitted, stop = matcher.feed(piece)
        text += emitted
        if stop is not None:
            return text, stop
    return text + matcher.flush(), None


def naive(stops: Sequence[str], text: str, include_stop: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return (text[:end] if include_stop else text[: end - len(stop)]), stop
    return text, None


TEXT = st.text(alphabet="abé", max_size=30)
STOPS = st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=4)


@given(stops=STOPS, text=TEXT, cuts=st.lists(st.integers(0, 30)), include_stop=st.booleans())
def test_any_cutting_gives_what_a_search_of_the_whole_text_gives(
    stops: list[str], text: str, cuts: list[int], include_stop: bool
) -> None:
    bounds = [0, *sorted(cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
    assert run(stops, pieces, include_stop=include_stop) == naive(stops, text, include_stop)


@given(stops=STOPS, text=TEXT)
def test_only_a_possible_beginning_of_a_stop_is_held_back(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops)
    emitted = ""
    for index, char in enumerate(text, start=1):
        piece, stop = matcher.feed(char)
        emitted += piece
        if stop is not None:
            return
        held = text[len(emitted) : index]
        assert not held or any(other.startswith(held) for other in stops)


def test_a_stop_split_over_pieces_is_found() -> None:
    assert run(["</end>"], ["so it ", "ends<", "/e", "nd", "> or not"]) == ("so it ends", "</end>")


def test_a_false_start_is_given_out_as_soon_as_it_fails() -> None:
    matcher = StopMatcher(["aab"])
    assert matcher.feed("xa") == ("x", None)
    assert matcher.feed("a") == ("", None)
    assert matcher.feed("a") == ("a", None)
    assert matcher.feed("c") == ("aac", None)


def test_the_stop_complete_first_wins_and_of_equals_the_longest() -> None:
    assert run(["abcd", "bc"], ["xabcd"]) == ("xa", "bc")
    assert run(["bc", "abc"], ["xabc"]) == ("x", "abc")


def test_the_stop_string_can_be_part_of_the_text() -> None:
    assert run(["\n\n"], ["one\n", "\ntwo"], include_stop=True) == ("one\n\n", "\n\n")


def test_what_follows_a_stop_is_dropped() -> None:
    matcher = StopMatcher(["."])
    assert matcher.feed("a.b") == ("a", ".")
    assert matcher.feed("c.") == ("", None)
    assert matcher.flush() == ""


@pytest.mark.parametrize("pieces", [["ab"], ["a", "b"]])
def test_flush_gives_what_was_held_once(pieces: list[str]) -> None:
    matcher = StopMatcher(["abc"])
    for piece in pieces:
        assert matcher.feed(piece) == ("", None)
    assert matcher.flush() == "ab"
    assert matcher.flush() == ""


def test_a_text_without_stops_passes_through() -> None:
    assert run([], ["a", "", "b"]) == ("ab", None)
