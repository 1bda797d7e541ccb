"""scripts/demo as a person runs it, in the interpreter that runs the tests."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scripts._demo.report import sparkline
from scripts._demo.watch import PoolSample

ROOT = Path(__file__).parent.parent
DEMO = ["bash", str(ROOT / "scripts" / "demo")]
LIMIT_S = 120


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PIE_PYTHON": sys.executable, "COLUMNS": "120", **changes}


@pytest.fixture(scope="module")
def output() -> str:
    """What a small run of the demo prints; it succeeded."""
    done = subprocess.run(
        [*DEMO, "--no-install", "--chats", "6", "--tokens", "120"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def row(output: str, name: str) -> str:
    """A row of the final table."""
    found = re.search(rf"│ {re.escape(name)} +│ (.*?) *│", output)
    assert found is not None, f"no row {name!r} in:\n{output}"
    return found.group(1)


def test_every_chat_is_shown_and_all_are_streamed_at_the_same_time(output: str) -> None:
    numbers = [int(number) for number in re.findall(r"^\[(\d)\] .*\w", output, re.MULTILINE)]
    assert set(numbers) == {1, 2, 3, 4, 5, 6}
    first, last = numbers.index(1), len(numbers) - 1 - numbers[::-1].index(1)
    assert set(numbers[first:last]) == {1, 2, 3, 4, 5, 6}


def test_the_pool_is_shown_while_text_still_comes(output: str) -> None:
    kinds = re.findall(r"^(pool|\[)", output, re.MULTILINE)
    assert re.search(r"\[.*pool.*\[", "".join(kinds))


def test_the_chats_need_four_times_the_arena_and_blocks_pass_through_the_pool(output: str) -> None:
    assert row(output, "KV blocks").endswith("4.0 times as many")
    arena = int(re.findall(r"\d+", row(output, "KV blocks"))[1])
    resident, streamed, parked = map(int, re.findall(r"\d+", row(output, "blocks, at most")))
    assert 0 < resident <= arena
    assert streamed > 0
    assert streamed + parked > arena


def test_the_table_says_how_fast_it_was(output: str) -> None:
    assert row(output, "load").startswith("6 concurrent chats, ")
    assert " 720 output tokens in " in row(output, "load")
    assert re.fullmatch(r"[1-9]\d* output tokens/s", row(output, "throughput"))
    for name in ("TTFT", "ITL"):
        p50, p99 = map(int, re.findall(r" (\d+) ms", row(output, name)))
        assert 0 < p50 <= p99
    assert re.match(r"\d+\.\d%", row(output, "stall share"))
    ratio = re.fullmatch(r"[▁-█]+ up to (\d\.\d\d)", row(output, "expansion ratio"))
    assert ratio is not None
    assert float(ratio.group(1)) > 1


def test_keep_goes_on_serving_until_interrupted_and_leaves_no_server() -> None:
    with subprocess.Popen(
        [*DEMO, "--no-install", "--keep", "--chats", "1", "--tokens", "20"],
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        text=True,
    ) as demo:
        assert demo.stdout is not None
        try:
            said = next(line for line in demo.stdout if line.startswith("Still serving"))
            address = re.search(r"http://([\d.]+):(\d+)/v1", said)
            assert address is not None
            where = (address.group(1), int(address.group(2)))
            socket.create_connection(where, timeout=10).close()
            demo.send_signal(signal.SIGINT)
            assert demo.wait(LIMIT_S) == 0
        finally:
            demo.kill()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(where, timeout=10)


def test_what_the_server_says_is_shown_when_it_does_not_start() -> None:
    done = subprocess.run(
        [*DEMO, "--no-install", "--link-rate", "quick"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 1
    assert "the server ended with status 2 before it served" in done.stderr
    assert "--link-rate" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_python_is_told_in_one_line(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "cat", "cksum"):  # and no uv, which would find a Python
        found = shutil.which(tool)
        assert found is not None
        (tools / tool).symlink_to(found)
    done = subprocess.run(
        DEMO,
        env={"PATH": str(tools), "PIE_VENV": str(tmp_path / "venv"), "PIE_PYTHON": "no-python"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("scripts/demo: Python 3.11, 3.12 or 3.13 is ")
    assert "line " not in done.stderr  # bash's own complaints


def test_a_sparkline_keeps_peaks_and_starts_at_its_floor() -> None:
    assert sparkline([1.0, 1.0, 4.5, 1.0, 8.0]) == "▁▁▅▁█"
    assert sparkline([1.0, 8.0, 1.0, 1.0], width=2) == "█▁"
    assert sparkline([1.0]) == "▁"


def test_a_scrape_that_is_not_the_servers_is_not_read() -> None:
    with pytest.raises(KeyError, match="pie:"):
        PoolSample.of("# TYPE other gauge\nother 1\n")
