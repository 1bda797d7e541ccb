"""Everything that pie_async raises on purpose: one tree, named for what happened.

Each message is a sentence for the person who can act on it, and ends with what to change.
HTTP status codes live in `openai/errors.py`, which maps these classes to them.
"""

from __future__ import annotations


class PieError(Exception):
    """Base of every error of this package."""


class ConfigError(PieError):
    """A flag, an option or the combination of several cannot work.

    Attributes:
        option: the configuration field concerned, as in `EngineConfig`, or None.
    """

    def __init__(self, message: str, *, option: str | None = None) -> None:
        self.option = option
        super().__init__(message)


class ModelError(PieError):
    """A model directory cannot be served: missing, damaged or not supported."""


class UnsupportedModel(ModelError):
    """The model asks for a feature that this package does not compute.

    Attributes:
        feature: the name in the model's config.json.
    """

    def __init__(self, feature: str, message: str) -> None:
        self.feature = feature
        super().__init__(message)


class WeightsError(ModelError):
    """A tensor is missing, left over or misshapen, or a weights file is damaged."""


class InvalidRequest(PieError):
    """A request asks for something malformed or out of range; it never reached the model.

    Attributes:
        param: the request field concerned, as the client spelled it, or None.
        code: a short machine-readable word, e.g. "context_length_exceeded", or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        self.param = param
        self.code = code
        super().__init__(message)


class ContextTooLong(InvalidRequest):
    """Prompt and requested output together exceed what the model or the memory can hold."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class Overloaded(PieError):
    """Too much is queued already; the request was refused before it cost anything.

    Attributes:
        retry_after_s: an estimate of when there will be room, seconds.
    """

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class EngineStopped(PieError):
    """The engine is closed, draining or has failed; `__cause__` says why where there is a cause."""


class EngineStuck(EngineStopped):
    """Work that was issued did not complete, or a message was not read, for `watchdog_s`.

    The engine has stopped. The log names a report of what it was doing.
    """


class SequenceLost(PieError):
    """A sequence's KV was lost in failed copies too often; the others go on. Ask again."""


class GuideFailed(PieError):
    """What guides an output (a schema, a grammar) became too complex to go on with it."""


class DeviceFault(PieError):
    """The device failed in a way that leaves its memory in doubt; the engine must be restarted."""


class MailboxClosed(PieError):
    """A message was sent to an actor that has stopped."""


class MailboxFull(PieError):
    """A fact found no room: the sender broke the bound it promised (a bug, never load)."""
