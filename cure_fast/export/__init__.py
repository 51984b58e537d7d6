"""``cure-fast export``: a trained model as one file for other programs, verified before it appears.

Each format has a file of its own; :mod:`.source` reads what is exported, :mod:`.verify` compares
the exported file with it, :mod:`.command` joins them.
"""

from __future__ import annotations

from .command import export_model

__all__ = ["export_model"]
