"""What tests of the engine share."""

from __future__ import annotations

import pytest

from cure_fast.methods import METHODS
from sample_methods import SAMPLES


@pytest.fixture
def sample_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add methods that need what none here does."""
    for name, method in SAMPLES.items():
        monkeypatch.setitem(METHODS, name, method)
