"""What only an engine in a process of its own can raise."""

from __future__ import annotations

from pie_async.errors import PieError


class RequestGivenUp(PieError):
    """The engine died again and again while it ran this request, which will not be tried again.

    HTTP clients get 500 and no Retry-After: they should not repeat it either.
    """
