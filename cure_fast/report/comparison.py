"""The result of a comparison: tables in Markdown, CSV and LaTeX, and a scatter, of run folders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cure_fast.config import Config
from cure_fast.config.checks import format_radius
from cure_fast.errors import InputError
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.evaluation.record import main_settings
from cure_fast.files import csv_text, replacing
from cure_fast.methods import paper_row
from cure_fast.report.record import Record
from cure_fast.report.scatter import Mark, write_scatter
from cure_fast.report.text import attack_name, data_name
from cure_fast.step.method import PaperRow

# What papers measure, as they call it.
PAPERS = {"natural": "natural", "pgd20": "PGD-20", "cw20": "C&W", "aa": "AutoAttack"}
# Settings of an attack in which two runs may differ: the seed, and what is a result.
OF_THE_RUN = {"seed", "robust_after", "natural_correct"}
SIGN = "\N{PLUS-MINUS SIGN}"
# What a run ran on, as columns.
RAN = ("engine", "precision", "device")


@dataclass(frozen=True)
class Entrant:
    """What is compared: its name, its configuration, and by seed its runs and what ended others."""

    name: str
    config: Config
    records: dict[int, Record] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    def results(self, attack: str) -> dict[int, AttackResult]:
        """Return what the runs reached under an attack, by seed."""
        scored = {s: r.results.models["trained"] for s, r in self.records.items() if r.results}
        return {s: own.attacks[attack] for s, own in scored.items() if attack in own.attacks}

    def accuracies(self, attack: str) -> list[float]:
        """Return the same in percent, in the order of the seeds."""
        return [score.accuracy for _, score in sorted(self.results(attack).items())]

    def seconds(self, stage: str) -> float:
        """Return how long the epochs of a stage took, a mean over the runs."""
        runs = [sum(r.seconds or 0.0 for r in run.stage(stage)) for run in self.records.values()]
        return mean(runs) if runs else 0.0

    @property
    def start(self) -> str:
        """What the network started from."""
        if self.config.model.init_from is not None:
            return f"weights of {Path(self.config.model.init_from).name}"
        epochs = self.config.pretrain.pretrain_epochs
        return f"natural, {epochs} epoch{'s' if epochs != 1 else ''}" if epochs else "random"

    @property
    def engines(self) -> str:
        """What computed the steps."""
        return several(e.engine for run in self.records.values() for e in run.stage("train"))

    @property
    def starts(self) -> list[dict[str, Any]]:
        """What is recorded of each time that one of the runs began or went on."""
        began = [run.environment or {} for run in self.records.values()]
        return [start for first in began for start in (first, *first.get("resumed", []))]

    @property
    def devices(self) -> str:
        """The processors or GPUs that the runs were on."""
        return several(s.get("gpu" if s.get("device") == "cuda" else "cpu") for s in self.starts)

    @property
    def precisions(self) -> str:
        """What training computed in."""
        return several(start.get("precision") for start in self.starts)

    @property
    def ran(self) -> tuple[str, str, str]:
        """The cells under :data:`RAN`."""
        return self.engines, self.precisions, self.devices

    @property
    def mark(self) -> Mark:
        """Its point in the scatter."""
        attacks = self.config.eval.attacks
        return Mark(self.name, self.config.method, {a: self.accuracies(a) for a in attacks})

    @property
    def published(self) -> PaperRow | None:
        """What is published for its data set and model, else for ResNet-18 on that data set."""
        usual = replace(self.config, model=replace(self.config.model, model="resnet18"))
        return paper_row(self.config) or paper_row(usual)


def several(words: Iterable[str | None]) -> str:
    """Return the words that there are, each once."""
    return ", ".join(dict.fromkeys(word for word in words if word)) or "-"


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation (n - 1), None for fewer than two values."""
    return stdev(values) if len(values) > 1 else None


def spread(values: Sequence[float], sign: str) -> str:
    """Return mean and standard deviation with a sign between, the mean alone for one value."""
    apart = deviation(values)
    told = f"{mean(values):.2f}" if values else "-"
    return told if apart is None else f"{told} {sign} {apart:.2f}"


def write_comparison(folder: Path, entrants: Sequence[Entrant], command: str) -> None:
    """Write ``comparison.md``, ``.csv`` and ``.tex``, and the scatter, each file whole or not.

    Raises:
        InputError: if two runs were evaluated differently, and cannot stand in one table.
    """
    attacks = entrants[0].config.eval.attacks
    for attack in attacks:
        check_alike(attack, entrants)
    written = {
        "comparison.md": markdown(attacks, entrants, command),
        "comparison.csv": table_csv(attacks, entrants),
        "comparison.tex": table_tex(attacks, entrants),
    }
    for name, text in written.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    write_scatter(folder, [entrant.mark for entrant in entrants], attacks)


def check_alike(attack: str, entrants: Sequence[Entrant]) -> None:
    """Raise ``InputError`` unless all results of an attack are of the same images and settings."""
    seen: dict[str, tuple[str, dict[str, object]]] = {}
    for entrant in entrants:
        for seed, result in entrant.results(attack).items():
            own = {"images": result.count, **result.settings}
            own = {k: v for k, v in own.items() if k not in OF_THE_RUN}
            seen.setdefault(f"{own}", (f"{entrant.name}, seed {seed}", own))
    if len(seen) > 1:
        (_, first), *others = seen.values()
        differing = {k for _, own in others for k in {*own, *first} if own.get(k) != first.get(k)}
        told = "; ".join(
            f"{who} with {', '.join(f'{k} {own.get(k)}' for k in sorted(differing))}"
            for who, own in seen.values()
        )
        raise InputError(
            f"expected all runs evaluated alike under {attack}, got {told}. Put results.json and "
            "the folder evaluation of those that differ aside, and evaluate them again: cure-fast "
            "eval RUN."
        )


def scores(row: PaperRow) -> list[str]:
    """Return the figures of a published row in the order of :data:`PAPERS`."""
    values = [getattr(row, name) for name in PAPERS]
    return ["-" if value is None else f"{value:.2f}" for value in values]


def markdown(attacks: Sequence[str], entrants: Sequence[Entrant], command: str) -> str:
    """Return the page: results beside the papers', what each entry was given, what to know."""
    config = entrants[0].config
    main = main_settings(config)
    published = any(entrant.published for entrant in entrants)
    papers = [f"published {' / '.join(PAPERS.values())}", "of"] if published else []
    results = [["entry", *map(attack_name, attacks), *papers]]
    given = [["entry", "seeds", "start", "epochs", "start, s", "training, s", *RAN]]
    for entrant in entrants:
        row = entrant.published
        paper = ["-"] * len(papers) if row is None else [" / ".join(scores(row)), row.row]
        cells = [spread(entrant.accuracies(attack), SIGN) for attack in attacks]
        results.append([entrant.name, *cells, *paper])
        seconds = [f"{entrant.seconds(stage):,.0f}" for stage in ("pretrain", "train")]
        seeds = ", ".join(map(str, sorted(entrant.records))) or "none"
        budget = [seeds, entrant.start, str(entrant.config.optim.epochs), *seconds]
        given.append([entrant.name, *budget, *entrant.ran])
    return "\n".join(
        [
            f"# Comparison on {data_name(config.data.data)} with {config.model.model}\n",
            f"`{command}`\n",
            f"Recipe {config.name}. Accuracy in percent on test images "
            f"({images(attacks, entrants)}), attacks within "
            f"{format_radius(main['eps'], main['norm'])}. {of_seeds(entrants)}\n",
            *pipes(results),
            "\nPublished figures are claims of papers, for their schedules and networks, and of "
            "the method without the flags of an entry.\n"
            if published
            else "",
            *pipes(given),
            "\nSeconds are sums over the epochs of a stage, a mean over seeds, of the wall clock: "
            "they hold what else the machine did.\n",
            *notes(entrants, attacks),
        ]
    )


def images(attacks: Sequence[str], entrants: Sequence[Entrant]) -> str:
    """Return on how many images each attack was run, the first ones of the test set."""
    found = {a: r.count for e in entrants for a in attacks for r in e.results(a).values()}
    told = ", ".join(f"{attack_name(a)} {found[a]:,}" for a in attacks if a in found)
    return told if len({*found.values()}) < 2 else f"{told}: compare down the columns"


def of_seeds(entrants: Sequence[Entrant]) -> str:
    """Return what the figures are over."""
    if max(len(entrant.records) for entrant in entrants) < 2:
        return "Of one seed each: there is no deviation, and no telling chance from difference."
    return (
        "Mean and standard deviation (n - 1) over seeds, which share the images; of one seed alone "
        "there is no deviation."
    )


def notes(entrants: Sequence[Entrant], attacks: Sequence[str]) -> list[str]:
    """Return a line on each run without a result, and on each result not to trust."""
    found = []
    for entrant in entrants:
        found += [f"{entrant.name}, seed {s}: no result, {w}" for s, w in entrant.failures.items()]
        for attack in attacks:
            for seed, result in entrant.results(attack).items():
                if not result.reliable:
                    why = "; ".join(result.warnings) or "no reason was recorded"
                    found.append(f"{entrant.name}, seed {seed}, {attack}: unreliable, {why}")
    return [f"- {line}" for line in found] + [""] * bool(found)


def pipes(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    told = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return [told[0], "|" + "---|" * len(rows[0]), *told[1:]]


def table_csv(attacks: Sequence[str], entrants: Sequence[Entrant]) -> str:
    """Return a line per entry: budget, mean, deviation and each seed's accuracy, the paper's."""
    seeds = sorted({seed for e in entrants for seed in (*e.records, *e.failures)})
    lines = []
    for entrant in entrants:
        line: dict[str, object] = {
            "entry": entrant.name,
            "method": entrant.config.method,
            "policies": "+".join(entrant.config.policies),
            "seeds": len(entrant.records),
            "failed": len(entrant.failures),
            "start": entrant.start,
            "epochs": entrant.config.optim.epochs,
            "pretrain_seconds": entrant.seconds("pretrain"),
            "train_seconds": entrant.seconds("train"),
            "engine": entrant.engines,
            "precision": entrant.precisions,
            "device": entrant.devices,
        }
        for attack in attacks:
            results, values = entrant.results(attack), entrant.accuracies(attack)
            line[f"{attack}_mean"] = mean(values) if values else None
            line[f"{attack}_std"] = deviation(values)
            line |= {f"{attack}_s{s}": results[s].accuracy if s in results else None for s in seeds}
            line[f"{attack}_images"] = next((r.count for r in results.values()), None)
        row = entrant.published
        line["paper_row"] = row.row if row else None
        line |= {f"paper_{name}": getattr(row, name, None) for name in PAPERS}
        lines.append(line)
    return csv_text(lines)


def table_tex(attacks: Sequence[str], entrants: Sequence[Entrant]) -> str:
    """Return the results beside the papers' rows as a tabular that needs no package."""
    published = any(entrant.published for entrant in entrants)
    heads = [f"paper's {name}" for name in PAPERS.values()] if published else []
    rows = [["entry", *map(attack_name, attacks), *heads]]
    for entrant in entrants:
        cells = [spread(entrant.accuracies(attack), r"\pm") for attack in attacks]
        row = entrant.published
        papers = ["-"] * len(heads) if row is None else scores(row)
        rows.append([entrant.name, *cells, *papers])
    head, *body = [" & ".join(map(escaped, row)) + r" \\" for row in rows]
    columns = "l" + "r" * (len(rows[0]) - 1)
    return "\n".join(
        [
            *(f"% {e.name}: published for {e.published.row}" for e in entrants if e.published),
            f"\\begin{{tabular}}{{{columns}}}",
            *(r"\hline", head, r"\hline", *body, r"\hline"),
            "\\end{tabular}\n",
        ]
    )


def escaped(text: str) -> str:
    """Return text as LaTeX takes it; a figure with its deviation in mathematics."""
    if r"\pm" in text:
        return f"${text}$"
    text = re.sub(r"([\\{}&%$#_])", r"\\\1", text).replace(r"\\", r"\textbackslash ")
    return text.replace("--", "-{}-")
