"""Puts the page together and writes it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from cure_fast.errors import InputError
from cure_fast.files import replacing
from cure_fast.report.answer import answer
from cure_fast.report.charts import curves
from cure_fast.report.details import details
from cure_fast.report.html import Html, element, join
from cure_fast.report.pictures import pictures
from cure_fast.report.record import Record, read_record
from cure_fast.report.results import how_to_read, results_section
from cure_fast.report.text import data_name

# The page holds all it shows: a browser is told to load nothing from anywhere.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` from the files of a run folder and return its path.

    The page is one file without scripts that loads nothing. It is written under a temporary name
    and renamed, so a reader sees the old page or the new one. A run may be unfinished: the page
    then says what is missing.

    Raises:
        InputError: if ``config.json`` or ``metrics.jsonl`` is missing, any file is damaged, or the
            page cannot be written.
    """
    page = render(read_record(run_dir))
    path = run_dir / "report.html"
    try:
        with replacing(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot write the report: {error.strerror}.") from error
    return path


def render(record: Record) -> str:
    """Return the whole page."""
    title = f"{record.label} on {data_name(record.config['data']['data'])}, cure-fast report"
    style = files("cure_fast.report").joinpath("style.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Html(style)),
    )
    main = element(
        "main",
        answer(record),
        results_section(record),
        how_to_read(record),
        pictures(record),
        curves(record),
        details(record),
    )
    return "<!doctype html>\n" + element("html", join([head, element("body", main)]), lang="en")
