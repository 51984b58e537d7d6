"""Two results of the GPU benchmark side by side.

    python bench/compare.py bench/results/A bench/results/B
    python bench/compare.py A/resnet18-128.json B/resnet18-128.json

Each is a folder of results or one part's file. Per row: both medians, B over A, and a star where
the ranges from the 20th to the 80th percentile do not overlap, so that the difference is hardly
chance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As bench/gpu/record.py writes it. This file runs as a script too, which finds no other of them.
FORMAT = "cure-fast gpu benchmark 1"
# What should be the same on both sides; where it is not, that is said first.
CONDITIONS = ("gpu", "cpu", "driver", "cuda", "torch", "triton", "tiny")

Times = tuple[float, float, float]


class UnreadableResultError(Exception):
    """A path has no result of the benchmark; says what is there instead."""


@dataclass(frozen=True)
class Result:
    """One side.

    Attributes:
        about: what each part was measured on.
        rows: 20th percentile, median and 80th percentile in seconds by the row's name, which
            begins with its part; None for rows without figures.
    """

    about: dict[str, dict[str, Any]]
    rows: dict[str, Times | None]


def read(path: Path) -> Result:
    """Return the result of a file, or of all parts in a folder.

    Raises:
        UnreadableResultError: if there is none, or something else.
    """
    if not path.exists():
        raise UnreadableResultError(
            f"{path}: expected a result of `python -m bench.gpu`, a folder or one part's .json "
            "file, found nothing there."
        )
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    records = [(file, load(file)) for file in files]
    if path.is_dir():
        records = [(file, record) for file, record in records if is_record(record)]
    if not records or not all(is_record(record) for _, record in records):
        what = "a folder without one" if path.is_dir() else "another file"
        raise UnreadableResultError(
            f"{path}: expected a result of `python -m bench.gpu` ({FORMAT}), found {what}."
        )
    about, rows = {}, {}
    for file, record in records:
        try:
            about[record["part"]] = record["about"]
            for row in record["rows"]:
                name = " ".join([record["part"], *map(str, row["key"].values())])
                rows[name] = times_of(row["seconds"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UnreadableResultError(
                f"{file}: expected parts and rows as `python -m bench.gpu` writes them, found a "
                f"damaged file ({type(error).__name__}: {error})."
            ) from error
    return Result(about, rows)


def load(file: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        UnreadableResultError: if it is none.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableResultError(f"{file}: expected JSON, found none ({error}).") from error


def is_record(value: Any) -> bool:
    """Return whether this is what the benchmark writes of a part."""
    return isinstance(value, dict) and value.get("format") == FORMAT


def times_of(seconds: Any) -> Times | None:
    """Return a row's three times, None where it has none."""
    if seconds is None:
        return None
    low, median, high = map(float, seconds)
    if not 0 < low <= median <= high:
        raise ValueError(f"times {seconds} are not positive and rising")
    return low, median, high


def differ(a: Times, b: Times) -> bool:
    """Return whether the ranges do not overlap."""
    return a[2] < b[0] or b[2] < a[0]


def comparison(a: Result, b: Result) -> list[str]:
    """Return the lines of the comparison."""
    lines = conditions(a, b)
    shared = [name for name in a.rows if a.rows[name] and b.rows.get(name)]
    width = max([len(name) for name in shared], default=3)
    if shared:
        lines.append(f"{'row':{width}}  {'A, ms':>12}  {'B, ms':>12}  {'B / A':>7}")
    for name in shared:
        first, second = a.rows[name], b.rows[name]
        assert first and second
        star = "  *" if differ(first, second) else ""
        lines.append(
            f"{name:{width}}  {1e3 * first[1]:12,.3f}  {1e3 * second[1]:12,.3f}  "
            f"{second[1] / first[1]:7.3f}{star}"
        )
    for label, one, other in (("A", a, b), ("B", b, a)):
        alone = [name for name in one.rows if one.rows[name] and not other.rows.get(name)]
        lines += [f"only in {label}: {name}" for name in alone]
    lines.append(
        "* the ranges from the 20th to the 80th percentile do not overlap"
        if shared
        else "no row was measured in both"
    )
    return lines


def conditions(a: Result, b: Result) -> list[str]:
    """Return a line per part and condition that is not the same on both sides."""
    return [
        f"{part}: {name} differs: {about.get(name)} and {b.about[part].get(name)}"
        for part, about in a.about.items()
        for name in CONDITIONS
        if part in b.about and about.get(name) != b.about[part].get(name)
    ]


def main(arguments: Sequence[str]) -> int:
    """Print the comparison; return the exit code: 0, or 2 for what cannot be read."""
    parser = argparse.ArgumentParser(description="Set two results of bench.gpu side by side.")
    parser.add_argument("a", type=Path, metavar="A", help="folder, or a part's .json file")
    parser.add_argument("b", type=Path, metavar="B", help="what is compared with it")
    options = parser.parse_args(arguments)
    try:
        lines = comparison(read(options.a), read(options.b))
    except UnreadableResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
