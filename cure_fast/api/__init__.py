"""What ``import cure_fast`` offers to Python; see docs/python.md."""

from __future__ import annotations
