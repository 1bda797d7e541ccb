"""The server's processes, and what they hold."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

COUNTED = ("output_tokens", "sequences_finished", "sequences_cancelled", "pauses", "demotions")
PAGE_BYTES = os.sysconf("SC_PAGESIZE")


@dataclass(frozen=True)
class State:
    """What must be the same again once nobody asks for anything."""

    sockets: int
    """Of both processes."""
    files: int
    """Open descriptors of both processes."""
    threads: int
    tasks: int
    """Of the event loop that answers."""
    blocks: int
    """In use: resident, streamed or pooled."""
    sequences: int

    def leaks(self, before: State) -> list[str]:
        """What there is more of than before; of blocks and sequences, what there is."""
        left = [f"{getattr(self, name)} {name}" for name in ("blocks", "sequences")
                if getattr(self, name)]  # fmt: skip
        more = [
            f"{getattr(self, name) - getattr(before, name)} {name}"
            for name in ("sockets", "files", "threads", "tasks")
            if getattr(self, name) > getattr(before, name)
        ]
        return left + more


class Server:
    """`pie-async serve` on a free port of 127.0.0.1."""

    def __init__(self, flags: tuple[str, ...]) -> None:
        self._flags = flags
        self._process: asyncio.subprocess.Process | None = None
        self.port = 0
        self.samples: dict[str, list[tuple[float, int]]] = {}
        """(seconds, resident bytes) of each process."""

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "pie_async", "serve", "--port", "0", *self._flags,
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        line = (await self._process.stdout.readline()).decode()
        if "http://" not in line:
            raise RuntimeError("the server did not start")
        self.port = int(line.split("/v1")[0].rsplit(":", 1)[1])
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def stop(self) -> int:
        """End it gracefully; its exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self._process.wait(), 60.0)

    @property
    def processes(self) -> dict[str, int]:
        """Their ids: the server's, and the engine's."""
        assert self._process is not None
        front = self._process.pid
        children = Path(f"/proc/{front}/task/{front}/children").read_text().split()
        return {"server": front} | {
            f"engine{number or ''}": int(child) for number, child in enumerate(children)
        }

    def sample(self) -> None:
        """Note how much memory is resident now."""
        for name, pid in self.processes.items():
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            self.samples.setdefault(name, []).append((time.monotonic(), pages * PAGE_BYTES))

    async def quiet_state(self, *, within_s: float) -> State:
        """What is held once nothing changes any more, at the latest after so long."""
        deadline_s = time.monotonic() + within_s
        states: list[State] = []
        while True:
            states.append(await self._state())
            is_steady = len(states) > 5 and len(set(states[-5:])) == 1
            is_empty = not (states[-1].blocks or states[-1].sequences)
            if (is_steady and is_empty) or time.monotonic() > deadline_s:
                return states[-1]
            await asyncio.sleep(1.0)

    async def _state(self) -> State:
        metrics = await self._metrics()
        pids = self.processes.values()
        links = [os.readlink(path) for pid in pids for path in _open_files(pid)]
        return State(
            sockets=sum(link.startswith("socket:") for link in links),
            files=len(links),
            threads=sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids),
            tasks=int(metrics["pie:event_loop_tasks"]),
            blocks=int(
                metrics["pie:blocks resident"]
                + metrics["pie:blocks streamed"]
                + metrics["pie:pooled_blocks"]
            ),
            sequences=int(sum(v for n, v in metrics.items() if n.startswith("pie:sequences "))),
        )

    async def counters(self) -> dict[str, float]:
        """What the engine did in all."""
        metrics = await self._metrics()
        return {name: metrics[f"pie:{name}_total"] for name in COUNTED}

    async def _metrics(self) -> dict[str, float]:
        """By name, and state where there are several."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.port}/metrics") as reply,
        ):
            text = await reply.text()
        return {
            " ".join([sample.name, *sample.labels.values()]): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


def _open_files(pid: int) -> list[str]:
    directory = f"/proc/{pid}/fd"
    return [f"{directory}/{name}" for name in os.listdir(directory)]
