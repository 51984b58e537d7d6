"""Which files the figures and the tests depend on, as a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What is measured, and what measures it.
CODE = ("cure_fast", "kernels", "loaders", "bench")
TESTS = ("tests",)
SETTINGS = ("pyproject.toml", "constraints.txt")


def digest_of(root: Path, folders: tuple[str, ...]) -> str:
    """Return the SHA-256 of the names and contents of the sources in ``folders`` and the settings.

    Args:
        root: of the checkout.
        folders: below it.
    """
    digest = hashlib.sha256()
    for path in files_of(root, folders):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def files_of(root: Path, folders: tuple[str, ...]) -> Iterator[Path]:
    """Yield the settings and the sources in ``folders``, in their order."""
    yield from (root / name for name in SETTINGS if (root / name).is_file())
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))
        if folder in TESTS:
            # What tests compare with.
            yield from sorted((root / folder).rglob("*.json"))
