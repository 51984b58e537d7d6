"""One page for all parts: targets, what each part has, charts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.gpu.chart import Bar, bar_chart
from bench.gpu.plan import ENGINES, METHODS, STEP_PARTS
from bench.gpu.record import FORMAT, MARK, REHEARSAL, TESTED, write_text
from bench.gpu.sources import CODE, ROOT, TESTS, digest_of
from bench.gpu.targets import verdicts

TITLES = {"cure": "CURE", "trades": "TRADES", "pgd_at": "PGD-AT", "natural": "natural"}


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a folder by part."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.get("format") == FORMAT:
            found[record["part"]] = record
    return found


def write_summary(folder: Path, *, root: Path = ROOT) -> Path:
    """Write ``summary.md`` and a chart per part that measured steps; return the former.

    Args:
        folder: of the results.
        root: of the checkout, whose sources may have changed since the figures were taken.
    """
    results = read_results(folder)
    about = next((result["about"] for result in results.values()), {})
    charts = write_charts(folder, results)
    mark = MARK if about.get("tiny") else ""
    lines = [f"# {mark}GPU benchmark: {about.get('gpu') or about.get('cpu') or 'nothing measured'}"]
    lines += ["", REHEARSAL, ""] if mark else [""]
    lines += ["## Targets", ""]
    if about.get("gpu") and "H200" not in about["gpu"]:
        lines += [f"They are of an H200; this is another GPU ({about['gpu']}).", ""]
    lines += [f"- {line}" for line in verdicts(results)]
    lines += ["", "## Parts", "", _tests_line(folder, root), ""]
    lines += [
        "| part | measured | left out | failed | date | commit | sources |",
        "|---|---|---|---|---|---|---|",
    ]
    present = digest_of(root, CODE)
    lines += [_part_line(part, result, present) for part, result in results.items()]
    if any(result["about"].get("sources") != present for result in results.values()):
        lines += [
            "",
            "**Not all parts are of the present sources**, nor are the targets that name them: "
            "measure those parts anew before you rely on their figures.",
        ]
    if charts:
        lines += ["", "## Charts", ""]
        lines += [f"![{mark}Seconds per epoch, {chart.stem}]({chart.name})" for chart in charts]
    path = folder / "summary.md"
    write_text(path, "\n".join(lines) + "\n")
    return path


def _tests_line(folder: Path, root: Path) -> str:
    """Return how the tests stand that have to pass before figures are taken."""
    kept = folder / TESTED
    if not kept.exists():
        return "**Nothing is known of the tests**: this folder has no record of them."
    found = json.loads(kept.read_text(encoding="utf-8"))
    commands = " and ".join(f"`pytest {words}`" for words in found["state"]["tests"])
    if "passed" not in found:
        return (
            f"**The tests have not passed**: {found['problem']} ({commands}). The figures below "
            "were taken before that."
        )
    if found["state"]["sources"] != digest_of(root, (*CODE, *TESTS)):
        return (
            f"**The tests have not run on the present sources**: {found['passed']} passed before "
            f"these changed, {commands}."
        )
    return f"{found['passed']} tests passed on the present sources: {commands}."


def _part_line(part: str, result: dict[str, Any], present: str) -> str:
    counts = [
        sum(row["status"] == status for row in result["rows"])
        for status in ("measured", "left out", "failed")
    ]
    about = result["about"]
    commit = str(about["commit"])[:10] + (" with changes" if about["dirty"] else "")
    name = f"[{part}]({part}.md)" + ("" if result["finished"] else ", unfinished")
    taken = about.get("sources")
    of = "present" if taken == present else "**changed since**" if taken else "**not recorded**"
    return f"| {name} | {' | '.join(map(str, counts))} | {about['date']} | {commit} | {of} |"


def write_charts(folder: Path, results: dict[str, dict[str, Any]]) -> list[Path]:
    """Write a bar chart per part that measured steps; return the files."""
    written = []
    for part in STEP_PARTS:
        result = results.get(part, {"rows": ()})
        rows = [row for row in result["rows"] if row["seconds"]]
        if rows:
            path = folder / f"{part}.svg"
            write_text(path, _chart(rows, result["about"]))
            written.append(path)
    return written


def _chart(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    groups: dict[str, list[Bar]] = {}
    for method in METHODS:
        for engine in ENGINES:
            for row in rows:
                if (row["key"]["method"], row["key"]["engine"]) == (method, engine):
                    scale = row["figures"]["epoch_seconds"] / row["seconds"][1]
                    low, median, high = (scale * seconds for seconds in row["seconds"])
                    groups.setdefault(TITLES[method], []).append(Bar(engine, low, median, high))
    shape = rows[0]["key"]
    mark = MARK if about["tiny"] else ""
    title = f"{mark}Seconds per CIFAR-10 epoch, {shape['model']}, batch {shape['batch']}"
    where = about["gpu"] or f"{about['cpu']}, tiny shapes"
    note = f"{where}, torch {about['torch']}, {about['date'][:10]}"
    return bar_chart(title, note, groups)
