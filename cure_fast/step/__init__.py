"""What a step of training is made of."""

from __future__ import annotations
