"""Attacks on a finished model, and what they measured."""

from __future__ import annotations
