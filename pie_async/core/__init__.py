"""DECIDES. Pure: no asyncio, clock, randomness or torch. State in, decision out."""
