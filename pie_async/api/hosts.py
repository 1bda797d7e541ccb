"""Which Host and Origin headers are answered: what keeps web pages away from a local server.

A page whose name its owner points at 127.0.0.1 (DNS rebinding) reaches a server without API keys
from inside the visitor's browser; what it cannot do is send another Host than its own name.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from pie_async.errors import ConfigError
from pie_async.openai.errors import HostNotAllowed

ANY_HOST = "*"

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^:\[\]/@\s]+)(?::\d{1,5})?", re.IGNORECASE)
_PATTERN = re.compile(r"\*|\.?[\w-]+(\.[\w-]+)*")


class AllowedHosts:
    """Names that the server answers to, beside addresses and "localhost", which nobody rebinds."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        """`names`: host names; ".example.com" is every name below that one, "*" any name.

        Raises:
            ConfigError: one is no host name.
        """
        self._names = {name.lower() for name in names}
        for name in self._names:
            if not _PATTERN.fullmatch(name):
                raise ConfigError(
                    f"{name!r} is not a host name; write for example gpu-box, .example.com or *",
                    option="allowed_host",
                )

    @classmethod
    def local(cls) -> AllowedHosts:
        """Of a server that only its own machine and network are to use: the machine's name."""
        name = socket.gethostname()
        return cls([name] if _PATTERN.fullmatch(name) else ())

    def check(self, host: str | None, origin: str | None) -> None:
        """Pass the values of a request's Host and Origin headers.

        No Host at all comes from old probes and from no browser. A page may call the server
        that it came from, and from the other names that are allowed.

        Raises:
            HostNotAllowed: with status 403.
        """
        if ANY_HOST in self._names:
            return
        if host is not None and not self._is_allowed(_name_of(host)):
            raise HostNotAllowed(
                f"this server does not answer to the name {host[:80]!r}; use its address, or have "
                "its operator add the name with --allowed-host",
                code="host_not_allowed",
            )
        if origin is None or (host is not None and _same_origin(origin, host)):
            return
        if _is_fixed(name := _name_of(_authority(origin))) or not self._is_allowed(name):
            raise HostNotAllowed(
                f"pages of {origin[:80]!r} may not call this server; its operator can allow them "
                "with --allowed-host",
                code="origin_not_allowed",
            )

    def _is_allowed(self, name: str | None) -> bool:
        if name is None:
            return False
        if _is_fixed(name) or name in self._names:
            return True
        ends = (name[at:] for at, char in enumerate(name) if char == ".")
        return not self._names.isdisjoint(ends)


def _is_fixed(name: str | None) -> bool:
    """An address, or the name of this very machine, whatever name servers say."""
    if name is None:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _name_of(host: str) -> str | None:
    match = _HOST.fullmatch(host)
    return match["name"].lower().rstrip(".") if match else None


def _authority(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _same_origin(origin: str, host: str) -> bool:
    return _authority(origin).lower() == host.lower()
