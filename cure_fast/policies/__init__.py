"""What touches weights or gradients besides the optimiser, one file per policy."""

from __future__ import annotations
