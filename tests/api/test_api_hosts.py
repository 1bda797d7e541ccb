"""Names and origins: what keeps other sites' pages away."""

from __future__ import annotations

import pytest

from pie_async.api.hosts import AllowedHosts
from pie_async.errors import ConfigError
from pie_async.openai.errors import HostNotAllowed

HOSTS = AllowedHosts(["gpu-box", ".example.com"])


@pytest.mark.parametrize(
    "host",
    [
        None,
        "127.0.0.1",
        "127.0.0.1:8000",
        "[::1]:8000",
        "192.0.2.7:80",
        "localhost:8000",
        "LOCALHOST",
        "pie.localhost",
        "gpu-box:8000",
        "GPU-Box.",
        "a.example.com",
        "a.b.example.com:1",
    ],
)
def test_addresses_localhost_and_listed_names_are_answered(host: str | None) -> None:
    HOSTS.check(host, None)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.com",
        "example.com",
        "gpu-box.evil.com",
        "badexample.com",
        "localhost.evil.com",
        "127.0.0.1.evil.com",
        "127.0.0.1@evil.com",
        "a:b:c",
        "[::1",
        "evil.com:99999999",
        "évil",
        "a b",
        "2130706433",
    ],
)
def test_other_names_are_refused(host: str) -> None:
    with pytest.raises(HostNotAllowed, match="allowed-host"):
        HOSTS.check(host, None)


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("localhost:8000", "http://localhost:8000"),
        ("gpu-box", "https://gpu-box"),
        ("127.0.0.1:8000", "https://chat.example.com"),
    ],
)
def test_a_page_of_the_server_or_of_a_listed_name_may_call(host: str, origin: str) -> None:
    HOSTS.check(host, origin)


@pytest.mark.parametrize(
    "origin",
    ["https://evil.com", "null", "", "http://127.0.0.1:9", "http://localhost:3000", "http://[bad"],
)
def test_a_page_from_elsewhere_may_not(origin: str) -> None:
    with pytest.raises(HostNotAllowed, match="pages of"):
        HOSTS.check("127.0.0.1:8000", origin)


def test_a_star_allows_any_name_and_origin() -> None:
    AllowedHosts(["*"]).check("evil.com", "null")


@pytest.mark.parametrize("name", ["", "a b", "http://x", "*.example.com", "x/y"])
def test_what_is_no_name_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match="not a host name") as refused:
        AllowedHosts([name])
    assert refused.value.option == "allowed_host"


@pytest.mark.realtime
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nothing"])
async def test_every_route_checks_names(start, path: str) -> None:
    server = await start(allowed_hosts=AllowedHosts())
    for header, value, code in (
        ("Host", "evil.com", "host_not_allowed"),
        ("Origin", "https://evil.com", "origin_not_allowed"),
    ):
        async with server.http.get(path, headers={header: value}) as reply:
            assert reply.status == 403
            assert (await reply.json())["error"]["code"] == code
    async with server.http.get("/health") as reply:
        assert reply.status == 200
