"""Digests: equal for equal tenants and tokens from the start on, different for anything else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pie_async.core.prefix_hash import DIGEST_BYTES, PrefixHasher

SIZE = 4
HASHER = PrefixHasher(b"seed", SIZE)

salts = st.none() | st.sampled_from(["", "a", "b", "common", "salted"])
token_lists = st.lists(st.sampled_from([0, 1, 2, 255, 256, 2**31 - 1]), min_size=0, max_size=12)


def digests(salt: str | None, tokens: list[int], hasher: PrefixHasher = HASHER) -> list[bytes]:
    """Of all whole blocks."""
    chain = [hasher.root(salt)]
    for index in range(len(tokens) // SIZE):
        chain.append(hasher.digest(chain[-1], tokens, index))
    return chain[1:]


@given(salts, token_lists, salts, token_lists)
def test_two_digests_are_equal_exactly_if_all_up_to_there_is(salt, tokens, other, others):
    for index, digest in enumerate(digests(salt, tokens)):
        end = (index + 1) * SIZE
        for number, theirs in enumerate(digests(other, others)):
            is_same = (salt, tokens[:end]) == (other, others[: (number + 1) * SIZE])
            assert (digest == theirs) == is_same


def test_another_seed_gives_other_digests():
    tokens = list(range(8))
    assert not set(digests(None, tokens)) & set(digests(None, tokens, PrefixHasher(b"", SIZE)))


def test_digests_are_long_enough_to_be_trusted():
    assert DIGEST_BYTES * 8 >= 128
    assert {len(digest) for digest in digests("a", list(range(8)))} == {DIGEST_BYTES}
