"""Everything that reads others' bytes, for a moment; `scripts/fuzz` does so for an hour."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fuzz_targets import TARGETS, corpus


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A well-formed input with pieces changed, cut out, or taken from another one."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 8)))
        other = draw(st.sampled_from(seeds))
        start = draw(st.integers(0, len(other)))
        data[at:end] = draw(st.one_of(st.binary(max_size=8), st.just(other[start : start + 16])))
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_the_bytes_the_reader_reads_or_refuses_them(name: str) -> None:
    seeds = corpus(name)
    for seed in seeds:
        TARGETS[name](seed)

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(data=st.one_of(damaged(seeds), st.binary(max_size=64)))
    def holds(data: bytes) -> None:
        TARGETS[name](data)

    holds()


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_is_small(name: str) -> None:
    assert 0 < sum(map(len, corpus(name))) <= 16 * 1024
