"""The report of a run: one self-contained page, written from the files of the run folder alone."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from cure_fast.errors import InputError
from cure_fast.report.page import write_report

__all__ = ["rewrite_report", "write_report"]


def rewrite_report(run_dir: Path) -> Path:
    """Write ``report.html`` of a run that nothing runs in, and return its path.

    Raises:
        InputError: if another process runs in the folder, which writes the report itself at its
            end; and as :func:`write_report`.
    """
    from cure_fast.runs.folder import held, load_config

    # What is no run gets no lock file, and the message that says so.
    if not (run_dir / "config.json").is_file():
        return write_report(run_dir)
    with suppress(InputError):
        # A method of the user's own says what it is called.
        load_config(run_dir)
    with held(
        run_dir,
        busy="It writes its report at its end; or take a copy of the folder.",
        denied="Change that, or copy the folder and take the copy.",
    ):
        return write_report(run_dir)
