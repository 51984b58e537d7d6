"""Finished runs side by side: tables in Markdown, CSV and LaTeX, and the scatter, of run folders.

Runs that differ in the seed alone are one row. NRR and SUM are CURE's: the natural-robustness ratio
2NR / (N + R) under C&W and under AutoAttack, and natural accuracy plus AutoAttack's. They are told
where both accuracies are of the same images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from cure_fast.config import Config
from cure_fast.config.checks import format_radius
from cure_fast.errors import InputError
from cure_fast.evaluation.attack_result import AttackResult, nrr
from cure_fast.evaluation.record import main_settings, stored_record
from cure_fast.files import csv_text, file_hash, replacing
from cure_fast.methods import labels, paper_row
from cure_fast.report.comparison import (
    PAPERS,
    RAN,
    SIGN,
    Entrant,
    check_alike,
    deviation,
    escaped,
    images,
    notes,
    of_seeds,
    pipes,
    spread,
)
from cure_fast.report.record import read_record
from cure_fast.report.rivals import rivals_of
from cure_fast.report.scatter import Mark, write_scatter
from cure_fast.report.text import attack_name, data_name
from cure_fast.runs.folder import bound_fields, load_config

SUMMARY = {"nrr_cw": "NRR (C&W)", "nrr_aa": "NRR (AutoAttack)", "sum": "SUM"}


@dataclass(frozen=True)
class Row:
    """A line of the tables.

    Attributes:
        kind: ``run``, ``paper`` or ``rival``.
        source: seeds of runs, or where a result is published.
        values: accuracies in percent and :data:`SUMMARY`, one for each seed.
        deltas: last - best epoch in points by attack, one for each seed that has both.
    """

    kind: str
    name: str
    model: str
    source: str
    values: dict[str, list[float]]
    deltas: dict[str, list[float]] = field(default_factory=dict)


def read_entrants(folders: Sequence[Path]) -> list[Entrant]:
    """Return the finished runs in folders, those that differ in the seed alone as one entrant.

    Raises:
        InputError: for what is no finished run, or a run given twice.
    """
    groups: dict[str, list[tuple[Path, Config]]] = {}
    for folder in folders:
        config = load_config(folder)
        check_finished(folder)
        own = {k: v for k, v in bound_fields(config).items() if k != "run.seed"}
        groups.setdefault(json.dumps(own, sort_keys=True, default=str), []).append((folder, config))
    for runs in groups.values():
        for place, (folder, config) in enumerate(runs):
            for other, known in runs[:place]:
                if known.run.seed == config.run.seed:
                    raise InputError(
                        f"{folder}: expected a run of other settings or another seed than {other}, "
                        "got one of the same. Leave one of them out."
                    )
    named = [(labels(runs[0][1].method, runs[0][1].policies), runs) for runs in groups.values()]
    alike = [name for name, _ in named]
    return [
        Entrant(
            name if alike.count(name) == 1 else f"{name} ({runs[0][0].name})",
            runs[0][1],
            {config.run.seed: read_record(folder) for folder, config in runs},
        )
        for name, runs in named
    ]


def check_finished(folder: Path) -> None:
    """Raise ``InputError`` for a run without results of the weights that it has now."""
    record = stored_record(folder / "results.json")
    trained = record["models"].get("trained", {}) if record else {}
    if "natural" not in trained.get("attacks", {}):
        raise InputError(
            f"{folder}: expected a finished run with natural accuracy in results.json, got none. "
            f"Evaluate it: cure-fast eval {folder}."
        )
    files = (folder / f"{name}.safetensors" for name in ("model", "last"))
    if trained.get("weights") not in [file_hash(path) for path in files if path.exists()]:
        raise InputError(
            f"{folder}: expected results of its weights, got results.json of others. Evaluate it "
            f"again: cure-fast eval {folder}."
        )


def check_comparable(entrants: Sequence[Entrant]) -> None:
    """Raise ``InputError`` unless all runs are of the same data and were evaluated alike."""

    def measured(entrant: Entrant) -> dict[str, object]:
        main = main_settings(entrant.config)
        found = {"data": entrant.config.data.data, "eps": main["eps"], "norm": main["norm"]}
        sizes = {r.results.test_images for r in entrant.records.values() if r.results}
        return found | {"test images": sorted(sizes), "size": entrant.config.data.image_size}

    first = entrants[0]
    for other in entrants[1:]:
        if differing := [k for k, v in measured(first).items() if measured(other)[k] != v]:
            raise InputError(
                f"expected runs of the same data and evaluation, got {other.name} with another "
                f"{', '.join(differing)} than {first.name}. Compare them apart."
            )
    for attack in attacks_of(entrants):
        check_alike(attack, entrants)


def attacks_of(entrants: Sequence[Entrant]) -> list[str]:
    """Return the attacks that any run was evaluated by, in their order."""
    runs = [run.results for entrant in entrants for run in entrant.records.values()]
    return list(dict.fromkeys(a for r in runs if r for a in r.models["trained"].attacks))


def rows_of(entrants: Sequence[Entrant]) -> list[Row]:
    """Return a row per entrant, per published row of these, and per rival."""
    found = [run_row(entrant) for entrant in entrants]
    papers = (paper_row(entrant.config) for entrant in entrants)
    models = {row.row: e.config.model.model for e in entrants if (row := paper_row(e.config))}
    for paper in dict.fromkeys(row for row in papers if row is not None):
        values = {name: getattr(paper, name) for name in PAPERS}
        known = {name: value for name, value in values.items() if value is not None}
        name, _, where = paper.row.partition(",")
        row = Row("paper", name, models[paper.row], f"published:{where}", summed(known))
        found.append(row)
    for rival in dict.fromkeys(r for entrant in entrants for r in rivals_of(entrant.config)):
        known = summed({"natural": rival.natural, "aa": rival.aa})
        found.append(Row("rival", rival.name, rival.model, rival.source, known))
    return found


def run_row(entrant: Entrant) -> Row:
    """Return the row of an entrant, with what each of its runs reached."""
    values: dict[str, list[float]] = {}
    deltas: dict[str, list[float]] = {}
    for _, record in sorted(entrant.records.items()):
        assert record.results is not None
        models = record.results.models
        own, last = models["trained"].attacks, models.get("last")
        reached = summed(
            {attack: result.accuracy for attack, result in own.items()},
            {attack: result.count for attack, result in own.items()},
        )
        for name, numbers in reached.items():
            values.setdefault(name, []).extend(numbers)
        for attack, result in own.items() if last else ():
            other: AttackResult | None = last.attacks.get(attack) if last else None
            if other is not None and other.count == result.count:
                deltas.setdefault(attack, []).append(other.accuracy - result.accuracy)
    seeds = f"seeds {', '.join(map(str, sorted(entrant.records)))}"
    return Row("run", entrant.name, entrant.config.model.model, seeds, values, deltas)


def summed(
    accuracies: dict[str, float], counts: dict[str, int] | None = None
) -> dict[str, list[float]]:
    """Return accuracies with those of :data:`SUMMARY` that they give, each in a list.

    ``counts`` has the images of each; two of different images have neither ratio nor sum.
    """
    found = {name: [value] for name, value in accuracies.items()}
    natural = accuracies.get("natural")
    margin = next((name for name in accuracies if name.startswith("cw")), "")
    for name, attack in (("nrr_cw", margin), ("nrr_aa", "aa"), ("sum", "aa")):
        if natural is None or attack not in accuracies:
            continue
        if counts is None or counts["natural"] == counts[attack]:
            robust = accuracies[attack]
            found[name] = [natural + robust if name == "sum" else nrr(natural, robust)]
    return found


def write_run_tables(folder: Path, entrants: Sequence[Entrant], command: str) -> list[Path]:
    """Write ``comparison.md``, ``.csv`` and ``.tex``, and the scatter; return the files.

    Raises:
        InputError: for runs that cannot stand in one table, before anything is written.
    """
    check_comparable(entrants)
    if (folder / "config.json").exists() or (folder.exists() and not folder.is_dir()):
        raise InputError(
            f"--out {folder}: expected a folder for tables, got "
            f"{'the folder of a run' if folder.is_dir() else 'a file'}. Name another."
        )
    rows, attacks = rows_of(entrants), attacks_of(entrants)
    columns = dict.fromkeys(name for row in rows for name in row.values if name not in SUMMARY)
    names = [*columns, *(n for n in SUMMARY if any(n in row.values for row in rows))]
    written = {
        "comparison.md": markdown(rows, names, entrants, command),
        "comparison.csv": as_csv(rows, names),
        "comparison.tex": tex(rows, names),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    methods = {entrant.name: entrant.config.method for entrant in entrants}
    marks = [
        Mark(row.name, methods[row.name], row.values)
        if row.kind == "run"
        else Mark(published_name(row, rows), "", row.values)
        for row in rows
    ]
    return [*(folder / name for name in written), *write_scatter(folder, marks, attacks)]


def published_name(row: Row, rows: Sequence[Row]) -> str:
    """Return what the scatter calls a published row: with its source where another is alike."""
    published = [(each.name, each.model) for each in rows if each.kind != "run"]
    told = f"{row.name}, {row.model}, published"
    return told if published.count((row.name, row.model)) == 1 else f"{told} ({row.source})"


def heading(name: str) -> str:
    """Return what a column is called."""
    return SUMMARY.get(name) or attack_name(name)


def cells(row: Row, names: Sequence[str], sign: str) -> list[str]:
    """Return the figures of a row, mean and deviation."""
    return [spread(row.values.get(name, []), sign) for name in names]


def markdown(
    rows: Sequence[Row], names: Sequence[str], entrants: Sequence[Entrant], command: str
) -> str:
    """Return the page: results beside published ones, best against last, and what to know."""
    config, attacks = entrants[0].config, attacks_of(entrants)
    main = main_settings(config)
    table = [["", "model", *map(heading, names), "seeds or source"]]
    table += [[row.name, row.model, *cells(row, names, SIGN), row.source] for row in rows]
    ended = [row for row in rows if row.deltas]
    differences = [["", *map(attack_name, attacks)]]
    differences += [
        [row.name, *(spread(row.deltas.get(attack, []), SIGN) for attack in attacks)]
        for row in ended
    ]
    budget = [["", "start", "epochs", *RAN]]
    budget += [[e.name, e.start, str(e.config.optim.epochs), *e.ran] for e in entrants]
    ratios = " NRR is 2NR / (N + R) of natural and robust accuracy, SUM natural plus AutoAttack."
    if not SUMMARY.keys() & set(names):
        ratios = ""
    lines = [
        f"# Runs on {data_name(config.data.data)}\n",
        f"`{command}`\n",
        f"Accuracy in percent on test images ({images(attacks, entrants)}), attacks within "
        f"{format_radius(main['eps'], main['norm'])}. {of_seeds(entrants)}{ratios}\n",
        *pipes(table),
        "",
    ]
    if any(row.kind != "run" for row in rows):
        lines.append(
            "Published rows are claims of papers for their own schedules; the others beside them "
            "are of AutoAttack, 10,000 images, and no extra data.\n"
        )
    if ended:
        lines += [
            "Last epoch - best epoch, in points: negative where the end is worse.\n",
            *pipes(differences),
            "",
        ]
    return "\n".join([*lines, *pipes(budget), "", *notes(entrants, attacks)])


def as_csv(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Return a line per row: mean and deviation of each column, and last - best."""
    ended = dict.fromkeys(name for row in rows for name in row.deltas)
    lines = []
    for row in rows:
        line: dict[str, object] = {
            name: getattr(row, name) for name in ("kind", "name", "model", "source")
        }
        for name in names:
            values = row.values.get(name, [])
            line[f"{name}_mean"] = mean(values) if values else None
            line[f"{name}_std"] = deviation(values)
        for name in ended:
            values = row.deltas.get(name, [])
            line[f"{name}_last_minus_best"] = mean(values) if values else None
        lines.append(line)
    return csv_text(lines)


def tex(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Return the results as a tabular that needs no package, published ones below a line."""
    head = ["", "model", *map(heading, names)]
    groups = [[row for row in rows if row.kind == kind] for kind in ("run", "paper", "rival")]
    body = [r"\hline", line_of(head), r"\hline"]
    for group in filter(None, groups):
        body += [line_of([r.name, r.model, *cells(r, names, r"\pm")]) for r in group] + [r"\hline"]
    told = [f"% {row.name}: {row.source}" for row in rows if row.kind != "run"]
    columns = "ll" + "r" * len(names)
    return "\n".join([*told, f"\\begin{{tabular}}{{{columns}}}", *body, "\\end{tabular}\n"])


def line_of(words: Sequence[str]) -> str:
    """Return a line of a tabular."""
    return " & ".join(map(escaped, words)) + r" \\"
