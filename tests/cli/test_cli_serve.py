"""`pie-async serve` as a process: it tells its address, answers, and ends on a signal."""

import json
import signal
import subprocess
import sys
import urllib.request

import pytest


@pytest.fixture
def server(tmp_path):
    """(process, base URL) of a server on a free port, with a key."""
    keys = tmp_path / "keys.txt"
    keys.write_text("\nsecret\n")
    command = [sys.executable, "-m", "pie_async", "serve", "--port", "0", "--device-kv", "2MiB"]
    command += ["--host-pool", "32MiB", "--api-key-file", str(keys), "--served-model-name", "bard"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            line = process.stdout.readline()
            assert "http://" in line, process.stderr.read()
            yield process, line.split(" at ")[1].split("/v1")[0]
        finally:
            process.kill()


@pytest.mark.realtime
def test_serve_announces_its_address_answers_and_ends_with_status_0_on_sigterm(server):
    process, url = server
    body = {"model": "bard", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Authorization": "Bearer secret", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert json.load(answer)["model"] == "bard"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "device arena 2.0 MiB: 21 blocks" in errors
    assert "Traceback" not in errors
