"""Which published rows of the papers runs reproduce, as a page that says what that means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from cure_fast.config import Config
from cure_fast.config.checks import format_radius
from cure_fast.evaluation.record import main_settings, stored_record
from cure_fast.methods import METHODS, paper_row
from cure_fast.recipes import published_recipe
from cure_fast.report.comparison import PAPERS, SIGN, Entrant, deviation, pipes, scores, spread
from cure_fast.report.text import points
from cure_fast.runs.folder import bound_fields
from cure_fast.step.method import PaperRow

# Points between a published figure and the mean over seeds, where two deviations are less; and the
# most, however far seeds lie apart.
WITHIN, MOST = 1.0, 2.0
STATES = ("reproduced", "not reproduced", "not run")
# Settings that say where images and teachers are, how they are split, or what fits into memory.
OWN = {
    *("run.seed", "run.amp", "run.deterministic", "data.val_images", "data.split_seed"),
    *("optim.micro_batch_size", "model.teacher", "eval.val_every", "eval.val_attack_steps"),
}
MEANING = f"""\
A row is *reproduced* by runs of its method, data set and model, trained with the settings of the
recipe METHOD-DATA-MODEL, which are its authors' (epochs, schedule, attack and the method's own),
and evaluated within L-inf 8/255 on all test images under every attack that the row has a figure
of, if the mean over seeds lies within {WITHIN:.1f} points of each figure, or within two standard
deviations over seeds where these are more, up to {MOST:.1f} points. It is *not reproduced* if such
runs lie farther away. It is *not run* if there are none; where a run of it is not such a run, the
last column says why.
PGD-20 and C&W are as this project runs them: papers do not say all of their settings. Weights are
the first 12 digits of the SHA-256 of its weights. Differences are measured - published, in
points.
"""


@dataclass(frozen=True)
class Verdict:
    """What runs say of a published row.

    Attributes:
        status: reproduced, not reproduced or not run.
        entrant: the runs; None where there are none.
        obstacles: why they cannot say anything of it.
    """

    row: PaperRow
    status: str
    entrant: Entrant | None = None
    obstacles: Sequence[str] = ()


def verdicts(entrants: Sequence[Entrant]) -> list[Verdict]:
    """Return a verdict for each row of the papers, and each entrant that is of it."""
    rows = dict.fromkeys(row for method in METHODS.values() for row in method.rows.values())
    found = []
    for row in rows:
        own = [entrant for entrant in entrants if paper_row(entrant.config) == row]
        found += [verdict(row, entrant) for entrant in own] or [Verdict(row, "not run")]
    return found


def verdict(row: PaperRow, entrant: Entrant) -> Verdict:
    """Return what runs of a row's method, data and model say of it."""
    if why := obstacles(row, entrant):
        return Verdict(row, "not run", entrant, why)
    near = all(
        abs(mean(values) - figure) <= max(WITHIN, min(MOST, 2 * (deviation(values) or 0.0)))
        for attack, figure in figures(row).items()
        if (values := entrant.accuracies(attack))
    )
    return Verdict(row, "reproduced" if near else "not reproduced", entrant)


def figures(row: PaperRow) -> dict[str, float]:
    """Return the figures that a row has, by attack."""
    found = {attack: getattr(row, attack) for attack in PAPERS}
    return {attack: figure for attack, figure in found.items() if figure is not None}


def obstacles(row: PaperRow, entrant: Entrant) -> list[str]:
    """Return what makes runs others than those that the row asks for."""
    found = other_settings(entrant.config)
    main = main_settings(entrant.config)
    if (main["norm"], main["eps"]) != ("linf", 8 / 255):
        found.append(f"evaluated within {format_radius(main['eps'], main['norm'])}")
    for attack in figures(row):
        results = entrant.results(attack)
        if len(results) < len(entrant.records):
            found.append(f"{PAPERS[attack]} not measured")
        for seed, result in results.items():
            record = entrant.records[seed].results
            if record is None or result.count < record.test_images:
                found.append(f"{PAPERS[attack]} on {result.count:,} images")
            if not result.reliable:
                found.append(f"{PAPERS[attack]} unreliable")
    return list(dict.fromkeys(found))


def other_settings(config: Config) -> list[str]:
    """Return in which settings a run was not trained as its authors train."""
    method = config.method.replace("_", "-")
    recipe = published_recipe(f"{method}-{config.data.data}-{config.model.model}")
    if recipe is None:
        return ["no set-up of the authors is known"]
    ours, theirs = bound_fields(config), bound_fields(recipe.config)
    names = [name for name in ours | theirs if name not in OWN]
    return [
        f"{name} {told(ours.get(name))} instead of {told(theirs.get(name))}"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def told(value: Any) -> str:
    """Return a setting in short."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def reproducibility(entrants: Sequence[Entrant], command: str) -> str:
    """Return the page in Markdown: what reproduced means, and a line per row of the papers."""
    found = verdicts(entrants)
    columns = " / ".join(PAPERS.values())
    told = ("status", "measured", "difference", "seeds", "weights", "not such a run, because")
    table = [["row", f"published {columns}", *told]]
    for each in found:
        line = [each.row.row, " / ".join(scores(each.row)), each.status]
        table.append([*line, *measured(each), "; ".join(each.obstacles)])
    counts = [f"{sum(v.status == s for v in found)} {s}" for s in STATES]
    return "\n".join(
        [
            "# Reproducibility\n",
            f"`{command}`\n",
            MEANING,
            f"Of {len(found)} lines: {', '.join(counts)}.\n",
            *pipes(table),
            "",
        ]
    )


def measured(verdict: Verdict) -> list[str]:
    """Return measured, difference, seeds and weights of a verdict's runs, dashes without any."""
    entrant = verdict.entrant
    if entrant is None:
        return ["-", "-", "-", "-"]
    values = {attack: entrant.accuracies(attack) for attack in PAPERS}
    known = figures(verdict.row)
    differences = [
        points(mean(values[a]) - known[a], 2) if a in known and values[a] else "-" for a in PAPERS
    ]
    runs = [record for _, record in sorted(entrant.records.items())]
    # Of the weights that were measured, which may be those of the last epoch.
    stored = [stored_record(record.folder / "results.json") or {} for record in runs]
    hashes = [each["models"]["trained"]["weights"][:12] for each in stored]
    seeds = ", ".join(map(str, sorted(entrant.records)))
    told = [" / ".join(spread(values[a], SIGN) for a in PAPERS), " / ".join(differences)]
    return [*told, seeds, ", ".join(hashes)]
