"""The main job: data, natural start, method, evaluation, report."""

from __future__ import annotations
