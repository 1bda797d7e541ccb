"""`pie-async serve`: a client's stream goes on when the engine's process is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.realtime

BODY = {"prompt": "To be, or", "max_tokens": 80, "temperature": 0, "ignore_eos": True}


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT])
def server(request):
    """(process, port, the signal that is to end it)."""
    command = [sys.executable, "-m", "pie_async", "serve", "--port", "0", "--device-kv", "8MiB"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            line = process.stdout.readline()
            assert "http://" in line, process.stderr.read()
            yield process, int(line.split("/v1")[0].rsplit(":", 1)[1]), request.param
        finally:
            process.kill()


def ask(port: int, body: dict):
    url = f"http://127.0.0.1:{port}/v1/completions"
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)
    return urllib.request.urlopen(request, timeout=30)


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def test_a_stream_goes_on_after_kill_9_and_the_end_is_graceful(server):
    process, port, end_signal = server
    with ask(port, BODY) as reply:
        expected = json.load(reply)
    (engine,) = children(process.pid)
    text, usage, num_events = "", None, 0
    with ask(port, {**BODY, "stream": True, "stream_options": {"include_usage": True}}) as reply:
        while (line := reply.readline()) != b"data: [DONE]\n":
            assert line, "the stream broke off"
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line[6:])
            assert "error" not in event
            text += "".join(choice["text"] for choice in event["choices"])
            usage = event["usage"] or usage
            num_events += 1
            if num_events == 10:
                os.kill(engine, signal.SIGKILL)
    assert text == expected["choices"][0]["text"]
    for count in ("prompt_tokens", "completion_tokens"):
        assert usage[count] == expected["usage"][count]
    (successor,) = children(process.pid)
    assert successor != engine
    process.send_signal(end_signal)
    started_s = time.monotonic()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert time.monotonic() - started_s < 10
    assert "SIGKILL" in errors
    assert "Traceback" not in errors
    assert not os.path.exists(f"/proc/{successor}")


def is_listening(path: Path) -> bool:
    """The file is there a moment before anybody may connect."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def get(path: Path, target: str) -> tuple[int, dict]:
    """Status and JSON of one answer at a Unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(path))
        client.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize("flags", [(), ("--in-process",)], ids=["apart", "in-process"])
def test_it_listens_while_the_model_is_loaded_and_says_so(tmp_path, flags):
    path = tmp_path / "pie.sock"
    command = [sys.executable, "-m", "pie_async", "serve", "--uds", str(path), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            until_s = time.monotonic() + 30
            while not is_listening(path):
                assert time.monotonic() < until_s
                time.sleep(0.01)
            early = [get(path, target) for target in ("/health", "/ready", "/v1/models")]
            assert process.stdout.readline().startswith(b"serving ")
            late = [get(path, target) for target in ("/health", "/ready", "/v1/models")]
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert [status for status, _ in early] == [503] * 3
    assert {body["error"]["code"] for _, body in early} == {"engine_starting"}
    assert [status for status, _ in late] == [200] * 3
    assert not path.exists()
