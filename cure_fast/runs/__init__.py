"""What a run keeps in its folder."""

from __future__ import annotations
