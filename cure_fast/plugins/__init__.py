"""Methods, policies, models and data sets from outside of the package; docs/your_own.md."""

from __future__ import annotations
