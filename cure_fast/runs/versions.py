"""Versions of installed packages, found without importing them."""

from __future__ import annotations

import importlib.metadata


def package_version(name: str) -> str | None:
    """Return the installed version of a distribution, or ``None``."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
