"""`python -m pie_async` and the command `pie-async`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pie_async.cli.app import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0, 1 for failures, 2 for bad flags."""
    return run(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
