"""cure-fast: train image classifiers that stay accurate and resist attacks."""

from __future__ import annotations

__version__ = "0.1.0"
