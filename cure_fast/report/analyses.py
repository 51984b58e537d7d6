"""The analyses in a run's folder, as sections of its page."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from cure_fast.errors import InputError
from cure_fast.report.text import number

# Colours of analyses' figures for lines, letters and what lies behind, as analysis/figures.py
# has them, and those of the page in the dark.
INK, PAPER, GRID = "#1d232b", "#fefefe", "#d4d8dd"
CARD = "#ffffff"
DARK_INK, DARK_PAPER, DARK_GRID = "#e4e8ed", "#1a2027", "#323b46"
# Rows of a table that a page shows; the file has all of them.
MOST_ROWS = 60


def analyses(folder: Path) -> list[dict[str, Any]]:
    """Return what the page shows of each analysis, in the order of their names.

    Raises:
        InputError: for a damaged file.
    """
    return [one(path) for path in sorted((folder / "analysis").glob("*.json"))]


def one(path: Path) -> dict[str, Any]:
    """Return what the page shows of an analysis."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        drawing = path.with_suffix(".svg").read_text(encoding="utf-8")
        told = {name: str(found[name]) for name in ("analysis", "title", "source", "about")}
        rows = found["rows"]
        header = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[_cell(row.get(name)) for name in header] for row in rows[:MOST_ROWS]]
        names = [str(subject["name"]) for subject in found["subjects"]]
        images = found.get("images")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: expected the numbers of an analysis with its figure beside them, and they "
            f"are damaged ({type(error).__name__}: {error}). Repeat the analysis, or delete them."
        ) from error
    return {
        **told,
        "of": ", ".join(names),
        "images": None if images is None else f"{images:,}",
        "drawing": as_image(drawing),
        "wide": width_of(drawing) > 400,
        "header": [name.replace("_", " ") for name in header],
        "rows": cells,
        "left_out": len(rows) - len(cells),
    }


def as_image(drawing: str) -> str:
    """Return a figure as the address of an image that follows the page into the dark."""
    light, dark = (
        f"svg{{color:{ink};--paper:{paper};--grid:{grid}}}"
        for ink, paper, grid in ((INK, CARD, GRID), (DARK_INK, DARK_PAPER, DARK_GRID))
    )
    style = f"<style>{light}@media (prefers-color-scheme:dark){{{dark}}}</style>"
    head, _, rest = drawing.partition("<defs>")
    for own, shown in ((INK, "currentColor"), (PAPER, "var(--paper)"), (GRID, "var(--grid)")):
        head, rest = head.replace(own, shown), rest.replace(own, shown)
    text = f"{head}{style}<defs>{rest}"
    return f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}"


def width_of(drawing: str) -> float:
    """Return the width of a figure in points; 0 where it does not say one."""
    _, _, rest = drawing.partition('width="')
    value = rest.partition("pt")[0]
    return float(value) if value.replace(".", "", 1).isdigit() else 0.0


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return number(value) if isinstance(value, float) else str(value)
