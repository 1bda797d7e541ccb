"""`pie-async trace`: a server's last iterations in a file that Perfetto opens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pie_async.cli.options import count
from pie_async.cli.running import messages, run_async
from pie_async.cli.top import DEFAULT_URL, KEY, URL
from pie_async.errors import ConfigError

MOST_ITERATIONS = 4096


def trace(
    *,
    url: URL = DEFAULT_URL,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where the trace goes.")
    ] = Path("pie_async-trace.json"),
    iterations: Annotated[
        str,
        typer.Option("--iterations", "-n", parser=count, metavar="N", help="How many at most."),
    ] = "200",
    api_key: KEY = None,
) -> int:
    """Save what the server at URL did in its last iterations: one track for each stream, direction
    and sequence. Open the file at ui.perfetto.dev or chrome://tracing."""
    if not 1 <= int(iterations) <= MOST_ITERATIONS:
        raise ConfigError(
            f"must be a number from 1 to {MOST_ITERATIONS}, not {iterations}", option="iterations"
        )
    import msgspec

    from pie_async.api.live_client import LiveClient

    client = LiveClient(url, api_key=api_key)
    body = run_async(client.trace(iterations=int(iterations)))
    try:
        output.write_bytes(body)
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}", option="output") from error
    told = msgspec.json.decode(body)["otherData"]["iterations"]
    messages().print(f"{output}: {told} iterations; open it at ui.perfetto.dev", soft_wrap=True)
    return 0
