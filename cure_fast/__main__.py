"""``python -m cure_fast`` is ``cure-fast``; signals are caught before anything slow is imported."""

from __future__ import annotations

import sys

from cure_fast.console import open_missing_streams
from cure_fast.signals import RESUMABLE, Interrupted, StopSignals


def main() -> int:
    """Run the command line and return its exit code."""
    open_missing_streams()
    try:
        with StopSignals() as stop, stop.at_once():
            from cure_fast.cli import main as run

            return run()
    except Interrupted:
        print("cure-fast: interrupted", file=sys.stderr)
        return RESUMABLE


if __name__ == "__main__":
    sys.exit(main())
