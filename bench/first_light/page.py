"""One page and one JSON file of a first light: verdicts on targets, and what each part found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.first_light.processes import Ended
from bench.gpu.record import MARK, REHEARSAL, write_text
from bench.gpu.summary import read_results
from bench.gpu.targets import TARGETS, Results
from cure_fast.files import write_json


def verdicts(results: Results, *, tiny: bool) -> list[str]:
    """Return a line per target; its figure is wrong where the engines or a kernel differ.

    What is not compared is not trusted either: without the part ``equality`` nothing is reached.
    """
    wrong = [
        f"{part}: {' '.join(map(str, row['key'].values()))}: {row['note']}"
        for part in ("equality", "kernels")
        for row in results.get(part, {}).get("rows", ())
        if row["status"] == "failed"
    ]
    compared = any(row["rounds"] for row in results.get("equality", {}).get("rows", ()))
    lines = []
    for target in TARGETS:
        line = target.verdict({} if tiny else results)
        if not line.startswith("not measured") and wrong:
            line = f"wrong: {line}, but {len(wrong)} comparisons failed"
        elif not line.startswith("not measured") and not compared:
            line = f"not measured: {line}, but the engines were not compared"
        lines.append(line.replace("missed by", "short by"))
    return lines


def write_page(folder: Path, ended: Sequence[Ended], about: Mapping[str, Any]) -> Path:
    """Write ``first-light.json`` and ``first-light.md`` from the parts' files, and return the page.

    Args:
        folder: of the results.
        ended: how each part of all calls so far ended.
        about: whether shapes are ``tiny``, and the command.
    """
    results = read_results(folder)
    tiny = bool(about["tiny"])
    told = verdicts(results, tiny=tiny)
    values = {"about": about, "parts": [asdict(part) for part in ended], "verdicts": told}
    write_json(folder / "first-light.json", {**values, "results": results})
    first = next((result["about"] for result in results.values()), {})
    lines = [f"# {MARK if tiny else ''}First light: {first.get('gpu') or 'no GPU'}", ""]
    lines += [REHEARSAL, ""] if tiny else []
    names = ("gpu", "driver", "cuda", "torch", "triton", "commit", "dirty", "date")
    lines += [f"- {name}: {first[name]}" for name in names if name in first]
    if len({(r["about"].get("commit"), r["about"].get("sources")) for r in results.values()}) > 1:
        lines += ["", "**The parts are not all of the same sources**: measure them anew."]
    lines += ["", "## Targets", "", *(f"- {line}" for line in told)]
    lines += ["", "## Parts", "", "| part | ended | seconds | at most | rows | failed |"]
    lines += ["|---|---|---|---|---|---|"]
    for part in ended:
        rows = results.get(part.name, {}).get("rows", [])
        failed = sum(row["status"] == "failed" for row in rows)
        how = f"{part.how}{f' ({part.note})' if part.note else ''}"
        name = f"[{part.name}]({part.name}.md)" if part.name in results else part.name
        lines += [
            f"| {name} | {how} | {part.seconds:.0f} | {part.planned:.0f} | {len(rows)} | {failed} |"
        ]
    bad = [
        f"- {part}: {' '.join(map(str, row['key'].values()))}: {row['note']}"
        for part, result in results.items()
        for row in result["rows"]
        if row["status"] == "failed"
    ]
    lines += ["", "## Failures", "", *bad] if bad else []
    path = folder / "first-light.md"
    write_text(path, "\n".join(lines) + "\n")
    return path
