"""API keys: who may use the server."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from pie_async.errors import ConfigError
from pie_async.openai.errors import WrongApiKey


class ApiKeys:
    """Known keys, kept and compared as hashes, so that timing tells nothing about them."""

    def __init__(self, keys: Iterable[str]) -> None:
        """No keys at all: everybody may.

        Raises:
            ConfigError: an empty key.
        """
        keys = tuple(keys)
        if not all(keys):
            raise ConfigError("an API key must not be empty", option="api_keys")
        self._digests = tuple(_digest(key) for key in keys)

    @classmethod
    def of(cls, keys: ApiKeys | Iterable[str]) -> ApiKeys:
        """The same, or from keys in clear, which need not be kept."""
        return keys if isinstance(keys, ApiKeys) else cls(keys)

    def __bool__(self) -> bool:
        """Whether any are asked for."""
        return bool(self._digests)

    def check(self, authorization: str | None) -> None:
        """Pass the value of an Authorization header.

        Raises:
            WrongApiKey: keys are required and this is none of them.
        """
        if not self._digests:
            return
        scheme, _, key = (authorization or "").partition(" ")
        sent = _digest(key.strip())
        matches = [hmac.compare_digest(sent, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise WrongApiKey


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
