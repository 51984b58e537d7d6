"""``python -m cure_fast`` is ``cure-fast``; signals are caught before anything slow is imported."""

from __future__ import annotations

import os
import sys

from cure_fast.cli.ahead import GO_ON, REPEAT, answered
from cure_fast.console import open_missing_streams, tell
from cure_fast.errors import StoppedError
from cure_fast.signals import Interrupted, StopSignals, ignore_signals


def main() -> int:
    """Run the command line and return its exit code."""
    open_missing_streams()
    try:
        with StopSignals() as stop, stop.at_once():
            code = answered(sys.argv[1:])
            if code in (GO_ON, REPEAT):
                from cure_fast.cli.main import main as run

                code = run(turn="second" if code == GO_ON else "only")
    except Interrupted:
        # A launcher that ends the others after an error of the first needs no word of theirs. Told
        # here, as `distributed` needs torch.
        if os.environ.get("RANK", "0") == "0":
            tell("cure-fast: interrupted")
        code = StoppedError.code
    ignore_signals()
    return code


if __name__ == "__main__":
    sys.exit(main())
