"""Triton kernels and their launchers; imported when an operation first needs one."""

from __future__ import annotations
