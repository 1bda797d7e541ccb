"""What the server says of its pool while the demo runs, read from GET /metrics."""

from __future__ import annotations

import asyncio

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

WATCH_EVERY_S = 0.1


class PoolSample(msgspec.Struct, frozen=True, kw_only=True):
    """The engine at one moment; the totals count from its start."""

    running: int
    waiting: int
    device_slots: int
    resident_blocks: int
    streamed_blocks: int
    parked_blocks: int
    expansion_ratio: float
    stall_share: float
    output_tokens: int

    @classmethod
    def of(cls, metrics: str) -> PoolSample:
        """Read a scrape. Raises KeyError when it is not from `pie-async serve`."""
        values = {
            (sample.name, sample.labels.get("state")): sample.value
            for family in text_string_to_metric_families(metrics)
            for sample in family.samples
        }
        return cls(
            running=int(values["pie:sequences", "running"]),
            waiting=int(values["pie:sequences", "waiting"]),
            device_slots=int(values["pie:device_slots", None]),
            resident_blocks=int(values["pie:blocks", "resident"]),
            streamed_blocks=int(values["pie:blocks", "streamed"]),
            parked_blocks=int(values["pie:blocks", "parked"]),
            expansion_ratio=values["pie:expansion_ratio", None],
            stall_share=values["pie:stall_share", None],
            output_tokens=int(values["pie:output_tokens_total", None]),
        )


class Watch:
    """Samples the server until it is cancelled."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self.samples: list[PoolSample] = []

    async def run(self) -> None:
        while True:
            await self.sample()
            await asyncio.sleep(WATCH_EVERY_S)

    async def sample(self) -> None:
        """Raises aiohttp.ClientError."""
        async with self._session.get("/metrics", raise_for_status=True) as answer:
            self.samples.append(PoolSample.of(await answer.text()))
