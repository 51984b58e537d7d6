"""The report of a run: one self-contained page, written from the files of the run folder alone."""

from __future__ import annotations

from cure_fast.report.page import write_report

__all__ = ["write_report"]
