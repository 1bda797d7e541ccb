"""Which of its leading blocks a sequence need not compute: another one has, or is about to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pie_async.core.prefix_hash import PrefixHasher
from pie_async.core.residency import Block, ResidencyMap
from pie_async.core.sequence import Sequence

WORTH_AWAITING_TOKENS = 512
"""Waiting costs an iteration or two, in which a GPU computes about so many tokens of a prompt.
Measured in simulation, 64 prompts of 1,024 equal tokens at once, 8,192 tokens per iteration: median
TTFT 45 ms instead of 313."""


class Sharing:
    """Finds blocks by what they hold.

    Args:
        is_on: whether a sequence may take over blocks that another one has computed.
        seed: makes the blocks' digests this process's own.

    Attributes:
        worth_awaiting_tokens: a sequence waits for another one to compute so much of its prompt.
    """

    def __init__(
        self, residency: ResidencyMap, block_tokens: int, *, is_on: bool, seed: bytes
    ) -> None:
        self.is_on = is_on
        self.worth_awaiting_tokens = WORTH_AWAITING_TOKENS
        self.hasher = PrefixHasher(seed, block_tokens)
        self._residency = residency
        self._block_tokens = block_tokens

    def may_share(self, seq: Sequence) -> bool:
        """Whether it may take over blocks that another sequence has computed."""
        return self.is_on and seq.sampling.prompt_logprobs is None

    def adopt(self, seq: Sequence) -> int:
        """Give a sequence without blocks those that hold its leading tokens; how many tokens.

        At least one token is left to compute: what follows the last one is to be sampled.
        """
        for block in self._found(seq):
            self._residency.adopt(block, seq)
            seq.table.append(block)
        return len(seq.table) * self._block_tokens

    def enter(self, seq: Sequence, index: int) -> None:
        """Let its sealed block at `index` be found."""
        if self.is_on:
            block = seq.table[index]
            block.digest = self._digest(seq, index)
            self._residency.cache.enter(block)

    def num_shared_blocks(self, seq: Sequence) -> int:
        """Blocks in use that a waiting sequence would share: they take no room of its own."""
        if not self.may_share(seq):
            return 0
        return sum(bool(block.owners) for block in self._found(seq))

    def awaits_prefix(self, seq: Sequence, running: Iterable[Sequence]) -> bool:
        """Whether a running sequence is about to compute what a waiting one would compute too,
        enough of it that waiting is faster."""
        if not self.may_share(seq):
            return False
        size = self._block_tokens
        worth = -(-self.worth_awaiting_tokens // size)
        computing = [one for one in running if one.num_sealed + worth <= one.prompt_len // size]
        if not computing:
            return False
        last = sum(1 for _ in self._found(seq)) + worth - 1
        if last >= (len(seq.tokens) - 1) // size:
            return False
        wanted = self._digest(seq, last)
        return any(
            last < one.prompt_len // size and self._digest(one, last) == wanted for one in computing
        )

    def _found(self, seq: Sequence) -> Iterator[Block]:
        """The blocks that hold its leading tokens, but for the last one."""
        for index in range((len(seq.tokens) - 1) // self._block_tokens):
            block = self._residency.cache.find(self._digest(seq, index))
            if block is None:
                return
            yield block

    def _digest(self, seq: Sequence, index: int) -> bytes:
        """Of its block at `index`, whose tokens are all known."""
        while len(seq.digests) <= index:
            parent = seq.digests[-1] if seq.digests else seq.prefix_root
            seq.digests.append(self.hasher.digest(parent, seq.tokens, len(seq.digests)))
        return seq.digests[index]
