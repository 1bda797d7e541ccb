"""When a dead engine is started again, and when no longer."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pie_async.errors import ConfigError


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """At most `most_restarts` within `window_s`, each after twice the pause of the one before.

    As Erlang's restart intensity: above it the fault is not one that a restart mends, and
    whoever supervises this process should see it fail.

    Raises:
        ConfigError: on construction.
    """

    most_restarts: int = 10
    window_s: float = 300.0
    first_pause_s: float = 0.1
    longest_pause_s: float = 10.0
    silence_s: float = 30.0
    """An engine process that says nothing for so long counts as dead. It reports every 0.25 s,
    however long an iteration takes."""
    most_deaths_of_request: int = 5
    """So many deaths in a row without a new token of a request end the request, see `Journal`."""

    def __post_init__(self) -> None:
        for name in ("window_s", "first_pause_s", "longest_pause_s", "silence_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}", option=name)
        if self.most_restarts < 0:
            raise ConfigError("most_restarts must be at least 0", option="most_restarts")
        if self.most_deaths_of_request < 2:
            raise ConfigError(
                "most_deaths_of_request must be at least 2: the first death may be anybody's",
                option="most_deaths_of_request",
            )

    def pause_s(self, deaths_s: Sequence[float]) -> float | None:
        """How long to wait after the last death; None: give up.

        Args:
            deaths_s: when the process died, ascending, in seconds of one clock; at least the last
                `most_restarts + 1`.
        """
        recent = sum(at_s > deaths_s[-1] - self.window_s for at_s in deaths_s)
        if recent > self.most_restarts:
            return None
        # an exponent that no float overflows with
        return min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(recent - 1, 60))
