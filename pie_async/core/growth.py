"""How much room to grow admission leaves to what runs."""

from __future__ import annotations

LEAST_GROWTH_BLOCKS, MOST_GROWTH_BLOCKS = 1.0, 4.0
GROWTH_PER_PARKING, GROWTH_PER_END = 0.5, 0.0125
"""How much room to grow admission leaves: more after a parking, less with every sequence that
ends, so that one in forty is parked. Nobody knows how long outputs will be; with always one block a
quarter of long ones was parked under overload, with always two a third fewer short ones ran. At one
in twenty TPOT p99 under overload was a fifth longer, throughput at most 2 % higher. Two blocks at
most bring 0.5 to 3 % in a large batch; where few long sequences fill the memory they double the
longest gap between two tokens (`test_fairness.py`)."""


class Growth:
    """For each running sequence so many blocks are kept free of new ones, on the average."""

    def __init__(self) -> None:
        self.blocks = LEAST_GROWTH_BLOCKS

    def parked(self) -> None:
        """A sequence was preempted: there was too little."""
        self.blocks = min(MOST_GROWTH_BLOCKS, self.blocks + GROWTH_PER_PARKING)

    def ended(self) -> None:
        """A sequence had room to its end."""
        self.blocks = max(LEAST_GROWTH_BLOCKS, self.blocks - GROWTH_PER_END)
