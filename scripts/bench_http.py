"""What the HTTP side costs and how late it is. Prints a line of JSON for each measurement.

    python scripts/bench_http.py import            # `import pie_async` in a fresh interpreter
    python scripts/bench_http.py start             # `pie-async serve` to the first token
    python scripts/bench_http.py cost              # CPU time of one streamed token
    python scripts/bench_http.py streams --streams 1000 --seconds 60

`streams` serves a simulated device whose iterations take 50 ms, whatever is in them: every stream
is due a token 20 times a second. How late an event is counts from its stream's first: the k-th is
due k * 50 ms later. The clients are a process of their own that reads sockets and nothing more.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ITERATION_S = 0.05
LONGER = 5
"""`cost`: times so many tokens in the longer streams."""
PATH = "/v1/chat/completions"
CONTENT = re.compile(rb'"delta":{"content":"((?:[^"\\]|\\.)*)"')
ESCAPED = re.compile(rb"\\.")


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def report(what: str, **figures: Any) -> None:
    rounded = {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in figures.items()
    }
    print(json.dumps({"what": what, **rounded}), flush=True)


# --- import and start --------------------------------------------------------------------------


def measure_import(rounds: int) -> None:
    """The import itself, as the interpreter sees it; without its own start."""
    code = "import time; t = time.perf_counter(); import pie_async; print(time.perf_counter() - t)"
    more = "from pie_async import Engine, SamplingParams"
    for what, tried in (("import pie_async", code), (more, code.replace("import pie_async", more))):
        taken = [
            float(subprocess.check_output([sys.executable, "-c", tried], env=child_environment()))
            for _ in range(rounds)
        ]
        report(what, median_s=statistics.median(taken), slowest_s=max(taken))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def measure_start(rounds: int, flags: list[str]) -> None:
    """From the command to the first token that a client has, trying to connect all the while."""
    taken = []
    for _ in range(rounds):
        port, began_s = free_port(), time.perf_counter()
        command = [sys.executable, "-m", "pie_async", "serve", "--port", str(port), *flags]
        with subprocess.Popen(
            command, env=child_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as server:
            try:
                first_token(port, server)
                taken.append(time.perf_counter() - began_s)
            finally:
                server.terminate()
    report("serve to first token", median_s=statistics.median(taken), slowest_s=max(taken))


def first_token(port: int, server: subprocess.Popen[bytes]) -> None:
    while True:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}")
        try:
            connection = socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.005)
            continue
        with connection, connection.makefile("rb") as lines:
            connection.sendall(request_bytes(port, max_tokens=4))
            if b" 200 " not in lines.readline():
                time.sleep(0.005)
                continue  # it listens before the engine is there
            for line in lines:
                if b'"content":"' in line and b'"role"' not in line:
                    return


def request_bytes(port: int, *, max_tokens: int) -> bytes:
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "Who goes there?"}],
            "max_tokens": max_tokens,
            "stream": True,
        }
    ).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


# --- the cost of a token -----------------------------------------------------------------------


def scripted_engine(tokens: int) -> Any:
    """Streams of `tokens` tokens, one at a time, as fast as they are taken: next to no work."""
    from pie_async.outputs import CompletionOutput, RequestOutput

    outputs = [
        RequestOutput(
            request_id="r",
            prompt=None,
            prompt_token_ids=(1, 2, 3),
            outputs=(
                CompletionOutput(
                    index=0, text=" word", token_ids=(7,),
                    finish_reason="length" if number == tokens - 1 else None,
                ),
            ),
            finished=number == tokens - 1,
        )
        for number in range(tokens)
    ]  # fmt: skip

    class Stream:
        request_id = "r"
        prompt_token_ids = (1, 2, 3)

        def __init__(self) -> None:
            self._outputs = iter(outputs)

        def __aiter__(self) -> Stream:
            return self

        async def __anext__(self) -> RequestOutput:
            await asyncio.sleep(0)
            try:
                return next(self._outputs)
            except StopIteration:
                raise StopAsyncIteration from None

        def cancel(self) -> None: ...

    class Model:
        name, max_model_len, writes_tools_as, thinks = "m", 100_000, "hermes", False

    class Scripted:
        is_running = is_accepting = True
        model = Model()

        async def submit(self, *_: Any, **__: Any) -> Stream:
            return Stream()

        def stats(self) -> Any:
            from pie_async.metrics import EngineStats

            return EngineStats()

    return Scripted()


async def measure_cost(streams: int, tokens: int, rounds: int) -> None:
    """CPU time of the serving process, its kernel work included: of a request, and of each token.

    Streams of two lengths tell them apart.
    """
    short = await cost_of_stream(streams, tokens, rounds)
    long = await cost_of_stream(streams, LONGER * tokens, rounds)
    of_token = [(b - a) / (LONGER - 1) / tokens for a, b in zip(short, long, strict=True)]
    of_request = [a - of_a * tokens for a, of_a in zip(short, of_token, strict=True)]
    report(
        "CPU time of streaming, HTTP and JSON, us",
        token=statistics.median(of_token) * 1e6,
        token_least=min(of_token) * 1e6,
        token_most=max(of_token) * 1e6,
        request=statistics.median(of_request) * 1e6,
        request_and_tokens_by_token=statistics.median(short) / tokens * 1e6,
        streams=streams,
        tokens_each=(tokens, LONGER * tokens),
    )


async def cost_of_stream(streams: int, tokens: int, rounds: int) -> list[float]:
    """Seconds of CPU time of one of `streams` at once, in each round."""
    from aiohttp import web

    from pie_async.api import create_app
    from pie_async.runtime.heap import settle

    runner = web.AppRunner(create_app(scripted_engine(tokens)), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    settle()
    costs = []
    for _ in range(rounds):
        reader = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "read", str(port), str(streams), env=child_environment()
        )
        before_s = time.process_time()  # forking is none of it, and clients take long to start
        if await reader.wait():
            raise SystemExit("the clients failed")
        costs.append((time.process_time() - before_s) / streams)
    await runner.cleanup()
    return costs


# --- many streams --------------------------------------------------------------------------------


def pace(iteration_s: float = ITERATION_S) -> None:
    """From now on every simulated iteration of this process takes so long."""
    from pie_async.device.cost_model import CostModel

    CostModel.layer_s = lambda self, work, staged_bytes=0: iteration_s / self.shape.num_layers  # type: ignore[method-assign]
    CostModel.head_s = lambda self, work: 0.0  # type: ignore[method-assign]


PACED_WORKER = (
    "-P",
    "-c",
    "import sys; _, fd, root = sys.argv; sys.path.insert(0, root)\n"
    "from scripts.bench_http import pace; pace()\n"
    "from pie_async.resilience.worker import main; sys.exit(main(int(fd)))",
)


async def serve_paced(streams: int, in_process: bool) -> None:
    """A server as `pie-async serve` makes it, of a simulated engine at the pace of `pace`."""
    from pie_async.api import serve
    from pie_async.config import GIB, EngineConfig
    from pie_async.engine import Engine
    from pie_async.resilience import process
    from pie_async.resilience.engine import ResilientEngine
    from pie_async.runtime.heap import settle

    config = EngineConfig(
        device="sim",
        model="llama-3.1-8b",
        device_kv_bytes=800 * GIB,
        host_pool_bytes=0,
        max_running_sequences=streams,
        token_budget=64 * streams,
        max_queued_requests=2 * streams,
    )
    pace()
    process.WORKER = PACED_WORKER
    async with Engine(config) if in_process else ResilientEngine(config) as engine:
        settle()
        await serve(engine, port=0, on_ready=lambda url: print(url, flush=True))
    spent = {
        "front": cpu_s(resource.RUSAGE_SELF),
        "engine": cpu_s(resource.RUSAGE_CHILDREN),  # its process has ended
    }
    print(json.dumps(spent), flush=True)


def cpu_s(of: int) -> float:
    usage = resource.getrusage(of)
    return usage.ru_utime + usage.ru_stime


def measure_streams(streams: int, seconds: float, in_process: bool) -> None:
    """Start the server and the clients, each in a process of its own."""
    command = [sys.executable, __file__, "serve", str(streams), str(int(in_process))]
    with subprocess.Popen(
        command, env=child_environment(), stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline().rsplit(":", 1)[1])
        tokens = round(seconds / ITERATION_S)
        clients = [sys.executable, __file__, "watch", str(port), str(streams), str(tokens)]
        told = json.loads(subprocess.check_output(clients, env=child_environment(), text=True))
        server.terminate()
        spent_s = json.loads(server.stdout.read())
        spent_s["clients"] = told.pop("cpu_s")
    report(
        "streams",
        streams=streams,
        tokens_each=tokens,
        cpu_us_per_token={
            who: round(spent * 1e6 / (streams * tokens), 1) for who, spent in spent_s.items()
        },
        **told,
    )


class Watcher(asyncio.Protocol):
    """A client: notes what came when, and looks at it when all is over: the processors are the
    server's as well."""

    def __init__(self, request: bytes, ended: asyncio.Future[None]) -> None:
        self._request = request
        self._ended = ended
        self._came: list[tuple[float, bytes]] = []

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._came.append((time.monotonic(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    @property
    def is_whole(self) -> bool:
        return b"[DONE]" in b"".join(data for _, data in self._came[-2:])

    def came_s(self) -> Iterator[float]:
        """When each token came. One of the simulated device is a character; several may come in
        one event."""
        for at_s, data in self._came:
            for text in CONTENT.findall(data):
                yield from [at_s] * len(ESCAPED.sub(b".", text))


async def run_clients(port: int, streams: int, max_tokens: int) -> list[Watcher]:
    """All of them at once, to their ends."""
    loop = asyncio.get_running_loop()
    request = request_bytes(port, max_tokens=max_tokens)
    watchers, ends = [], []
    for _ in range(streams):
        ended = loop.create_future()
        _, watcher = await loop.create_connection(
            lambda ended=ended: Watcher(request, ended),  # type: ignore[misc]
            "127.0.0.1",
            port,
        )
        watchers.append(watcher)
        ends.append(ended)
    await asyncio.gather(*ends)
    if missing := sum(not each.is_whole for each in watchers):
        raise SystemExit(f"{missing} streams were not whole")
    return watchers


def lateness(came_s: list[float]) -> Iterator[float]:
    """Of each token after the first, seconds; early ones are not late."""
    for number, at_s in enumerate(came_s):
        yield max(0.0, at_s - came_s[0] - number * ITERATION_S)


async def watch(port: int, streams: int, tokens: int) -> None:
    """Say, of each stream, how late 99 in 100 of its tokens were at most; then of all of them."""
    gc.disable()
    watchers = await run_clients(port, streams, tokens)
    used_s = cpu_s(resource.RUSAGE_SELF)
    late = [sorted(lateness(list(each.came_s()))) for each in watchers]
    p99s = sorted(each[len(each) * 99 // 100] for each in late)
    every = sorted(at_s for each in late for at_s in each)
    print(
        json.dumps(
            {
                "cpu_s": used_s,
                "tokens_seen": len(every),
                "late_ms_p50": round(every[len(every) // 2] * 1e3, 1),
                "late_ms_p99": round(every[len(every) * 99 // 100] * 1e3, 1),
                "late_ms_worst": round(every[-1] * 1e3, 1),
                "worst_streams_p99_ms": round(p99s[-1] * 1e3, 1),
            }
        )
    )


def main() -> None:
    """See the module."""
    helpers: dict[str, Callable[..., Coroutine[Any, Any, object]]] = {
        "serve": lambda streams, inside: serve_paced(int(streams), bool(int(inside))),
        "watch": lambda *numbers: watch(*map(int, numbers)),
        "read": lambda port, streams: run_clients(int(port), int(streams), 100_000 - 3),
    }
    import uvloop

    if len(sys.argv) > 1 and sys.argv[1] in helpers:
        uvloop.run(helpers[sys.argv[1]](*sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["import", "start", "cost", "streams"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--in-process", action="store_true", help="streams: one process serves all")
    chosen, flags = parser.parse_known_args()
    if chosen.what == "import":
        measure_import(chosen.rounds)
    elif chosen.what == "start":
        measure_start(chosen.rounds, flags)
    elif chosen.what == "cost":
        uvloop.run(measure_cost(min(chosen.streams, 100), chosen.tokens, chosen.rounds))
    else:
        measure_streams(chosen.streams, chosen.seconds, chosen.in_process)


if __name__ == "__main__":
    main()
