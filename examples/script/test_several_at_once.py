"""The script, on the simulated device."""

from __future__ import annotations

import pytest
from several_at_once import main


@pytest.mark.asyncio
@pytest.mark.virtual_time
async def test_it_writes_chooses_and_gives_up(capsys):
    # Virtual time: a second of it is over after some 200 of the 4,000 tokens.
    free, chosen, late = await main(device="sim", debug=True)
    assert len(free) == 20
    assert chosen in ("to be", "not to be")
    assert late is None
    assert "HAMLET:" in capsys.readouterr().out
