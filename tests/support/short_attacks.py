"""AutoAttack cut short, for tests that do not ask how strong it is."""

from __future__ import annotations

from typing import Any

import pyautoattack
import pytest

from cure_fast.evaluation import autoattack


def shorten(
    patch: pytest.MonkeyPatch, *, iterations: int = 20, queries: int = 10, targets: int = 9
) -> None:
    """Give each attack so many iterations, Square so many queries, and targeted ones few classes.

    It is a fifth of the iterations of the standard version: on small networks they break the same.
    """
    real = pyautoattack.AutoAttack.__init__

    def short(self: Any, *arguments: Any, **settings: Any) -> None:
        real(self, *arguments, **settings)
        for part in (self.apgd, self.apgd_targeted, self.fab):
            part.n_iter = part.n_iter_orig = iterations

    patch.setattr(pyautoattack.AutoAttack, "__init__", short)
    patch.setattr(autoattack, "ITERATIONS", iterations)
    patch.setattr(autoattack, "SQUARE_QUERIES", queries)
    patch.setattr(autoattack, "TARGET_CLASSES", targets)
