"""`pie-async top`: the live page's feed in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from pie_async.cli.running import run_async
from pie_async.errors import ConfigError
from pie_async.settings import variable_of

URL = Annotated[
    str,
    typer.Argument(
        metavar="URL", envvar=variable_of("url"), show_envvar=False, help="The server's address."
    ),
]
DEFAULT_URL = "http://127.0.0.1:8000"
KEY = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar=variable_of("api-key"),
        show_envvar=False,
        help="The server's key.",
    ),
]


def top(
    *,
    url: URL = DEFAULT_URL,
    api_key: KEY = None,
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
) -> int:
    """Watch the server at URL: memory, links, governor, requests. Ctrl-C ends."""
    return run_async(_show_once(url, api_key) if once else _watch(url, api_key))


async def _show_once(url: str, api_key: str | None) -> int:
    from rich.console import Console

    from pie_async.api.live_client import LiveClient
    from pie_async.cli.screen import Screen

    screen = Screen()
    async for frame in LiveClient(url, api_key=api_key).frames(most=2):  # rates need two
        screen.take(frame)
    Console(highlight=False).print(screen)
    return 0


async def _watch(url: str, api_key: str | None) -> int:
    import asyncio

    from rich.console import Console
    from rich.live import Live

    from pie_async.api.client import ServerError
    from pie_async.api.live_client import LiveClient
    from pie_async.cli.screen import Screen

    screen, client = Screen(), LiveClient(url, api_key=api_key)
    console = Console(highlight=False)
    if not console.is_terminal:
        raise ConfigError("standard output is no terminal; --once shows it once")
    has_begun = False
    with Live(screen, console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                async for frame in client.frames():
                    has_begun = True
                    screen.take(frame)
                    live.refresh()
            except ServerError as error:
                if not has_begun:
                    raise
                screen.take(str(error))
                live.refresh()
            await asyncio.sleep(1)
