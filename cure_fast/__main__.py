"""``python -m cure_fast`` is ``cure-fast``."""

from __future__ import annotations

import sys

from cure_fast.cli import main

sys.exit(main())
