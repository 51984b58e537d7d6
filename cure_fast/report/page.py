"""Puts the page together from the templates and writes it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cure_fast.errors import InputError
from cure_fast.files import replacing
from cure_fast.report.analyses import analyses
from cure_fast.report.answer import answer
from cure_fast.report.charts import training
from cure_fast.report.details import details
from cure_fast.report.pictures import pictures
from cure_fast.report.record import Record, read_record
from cure_fast.report.results import results_section


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` from the files of a run folder and return its path.

    The page is one file that loads nothing; the one script in it copies the command. It is written
    under a temporary name and renamed, so a reader sees the old page or the new one. A run may be
    unfinished: the page then says what is missing.

    Raises:
        InputError: if ``config.json`` or ``metrics.jsonl`` is missing, any file is damaged, or the
            page cannot be written.
    """
    page = render(read_record(run_dir), analyses(run_dir))
    path = run_dir / "report.html"
    try:
        with replacing(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot write the report: {error.strerror}.") from error
    return path


@cache
def templates() -> Environment:
    """Return what reads the templates, and keeps them compiled for the next page."""
    return Environment(
        loader=PackageLoader("cure_fast.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(record: Record, analysed: Sequence[dict[str, Any]] = ()) -> str:
    """Return the whole page: what it says is in ``templates/``, the values come from here."""
    script = files("cure_fast.report").joinpath("templates/copy.js").read_text(encoding="utf-8")
    return (
        templates()
        .get_template("page.html")
        .render(
            # A browser runs this script alone, whatever else should find its way into the page.
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            head=answer(record),
            results=results_section(record),
            pictures=pictures(record),
            training=training(record),
            analyses=analysed,
            details=details(record),
        )
    )
