"""Engines compute the steps of a run: eagerly, or fast. Methods and policies know neither."""

from __future__ import annotations

from .choose import engine_asked, open_engine

__all__ = ["engine_asked", "open_engine"]
