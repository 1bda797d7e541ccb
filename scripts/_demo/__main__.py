"""Run by scripts/demo: serve, chat, show, report."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any

import aiohttp
from rich.console import Console

from pie_async.config import format_size
from pie_async.measurements import LoadSummary, summarize
from scripts._demo.load import Load, plan_load
from scripts._demo.report import report
from scripts._demo.screen import REFRESH_EVERY_S, screen
from scripts._demo.server import Server, ServerFailed, serving
from scripts._demo.watch import Watch

FAILED, INTERRUPTED = 1, 130


async def demo(load: Load, arguments: argparse.Namespace, console: Console) -> int:
    """Run it all; the exit status."""
    console.print(
        f"Serving the built-in model with a device arena of {load.arena_blocks} KV blocks "
        f"({format_size(load.arena_blocks * load.block_bytes)}); {len(load.replies)} chats of "
        f"{load.tokens} tokens need {load.needed_blocks} at once. What does not fit is streamed "
        "through the host pool in every iteration.",
        soft_wrap=True,
    )
    flags = load.server_flags
    if arguments.link_rate:
        flags += ["--link-rate", arguments.link_rate]
    async with serving(flags) as server:
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(server.url, timeout=timeout) as session:
            watch = Watch(session)
            summary = await chat(load, session, watch, console)
        console.print(report(load, summary, watch.samples))
        if summary.failed:
            console.print(f"{summary.failed} chats failed: {', '.join(summary.errors)}")
            return FAILED
        if arguments.keep:
            await keep_serving(server, console)
    return 0


async def chat(
    load: Load, session: aiohttp.ClientSession, watch: Watch, console: Console
) -> LoadSummary:
    """Send all chats at once and show them until the last one ends."""
    clock = asyncio.get_running_loop().time
    started_s = clock()
    with screen(console, load.replies) as view:
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch.run())
            chats = [
                group.create_task(reply.receive(session, tokens=load.tokens, seed=number))
                for number, reply in enumerate(load.replies)
            ]
            pending: set[asyncio.Task[None]] = set(chats)
            while pending:
                _, pending = await asyncio.wait(pending, timeout=REFRESH_EVERY_S)
                view.show(watch.samples[-1] if watch.samples else None)
            watching.cancel()
        duration_s = clock() - started_s
        await watch.sample()
        view.show(watch.samples[-1])
    times = [reply.times for reply in load.replies if reply.times is not None]
    return summarize(times, duration_s=duration_s)


async def keep_serving(server: Server, console: Console) -> None:
    """Until Ctrl-C, or the server ends."""
    console.print(f"\nStill serving at {server.url}/v1 until Ctrl-C. Try it:", soft_wrap=True)
    console.print(
        f"curl -N {server.url}/v1/chat/completions -H 'Content-Type: application/json' -d "
        """'{"messages": [{"role": "user", "content": "Who comes here?"}], "stream": true}'""",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    await server.until_ended()


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Serve the built-in model with a device arena of a quarter of what its "
        "clients need, show what they read, and measure it.",
    )
    parser.add_argument("--keep", action="store_true", help="go on serving until Ctrl-C")
    parser.add_argument("--chats", type=int, default=8, metavar="N", help="how many at once (8)")
    parser.add_argument("--tokens", type=int, default=600, metavar="N", help="of each reply (600)")
    parser.add_argument(
        "--link-rate", metavar="SIZE/s", help="limit the link to the host pool, e.g. 200MB/s"
    )
    parser.add_argument(
        "--no-install", action="store_true", help="run in the active Python instead of .venv"
    )
    arguments = parser.parse_args()
    if arguments.chats < 1 or not 1 <= arguments.tokens <= 4000:
        parser.error("--chats must be at least 1, --tokens between 1 and 4000")
    return arguments


class Stopped(Exception):
    """Ctrl-C or SIGTERM."""


async def until_signal(work: Coroutine[Any, Any, int]) -> int:
    """Run to the end, or raise Stopped at the first signal, once everything is cleaned up."""
    task = asyncio.ensure_future(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise Stopped from None


def main() -> int:
    arguments = read_arguments()
    load = plan_load(chats=arguments.chats, tokens=arguments.tokens)
    try:
        return asyncio.run(until_signal(demo(load, arguments, Console())))
    except Stopped:
        return 0 if arguments.keep else INTERRUPTED
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
