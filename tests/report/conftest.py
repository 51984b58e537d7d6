"""A made-up run folder with every file a real one has, in the documented formats."""

from __future__ import annotations

import html.parser
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cure_fast.config import (
    AttackConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
)
from cure_fast.config.values import to_dict
from cure_fast.report import write_report

VOID = {"br", "col", "hr", "img", "link", "meta"}
EPS = 8 / 255
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PAPER = {
    "row": "CURE, ResNet-18, CIFAR-10 (Table 1)",
    "natural": 86.76,
    "pgd20": 54.92,
    "cw20": 52.48,
    "aa": 49.69,
}
METHOD_SETTINGS = {
    "percentile": 30.0,
    "alpha": 0.1,
    "beta": 5.0,
    "gamma": 1.0,
    "rgp": True,
    "revision": True,
    "mask_scope": "tensor",
    "freeze": "grad",
}


def tensors(count: int) -> list[str]:
    """Return names as a ResNet's convolutions and BatchNorms have them."""
    names = ["conv1.weight", "bn1.weight", "bn1.bias"]
    for layer in range(1, 5):
        for block in range(2):
            for part in ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight"):
                names.append(f"layer{layer}.{block}.{part}")
            names.append(f"layer{layer}.{block}.bn2.bias")
            names.append(f"layer{layer}.{block}.shortcut.0.weight")
    assert count <= len(names)
    return names[:count]


def make_config() -> dict[str, Any]:
    config = Config(
        name="cifar10-small",
        method="cure",
        data=DataConfig(data="cifar10", train_images=5000, val_images=500),
        model=ModelConfig(model="resnet18", width=16),
        pretrain=PretrainConfig(pretrain_epochs=8),
        attack=AttackConfig(eps=EPS, step_size=2 / 255, attack_steps=5),
        optim=OptimConfig(epochs=15, schedule="onecycle"),
        eval=EvalConfig(attacks=("natural", "pgd20", "cw20", "aa"), aa_limit=256),
    )
    return to_dict(config) | {"settings": dict(METHOD_SETTINGS)}


def epoch_row(stage: str, epoch: int, total: int, names: list[str], rng: Any) -> dict[str, Any]:
    share = epoch / total
    terms = {"total": 2.2 * math.exp(-2 * share) + 0.05 * rng.random()}
    validation = {"natural": 40 + 45 * math.sqrt(share), "robust": None, "attack": None}
    row: dict[str, Any] = {}
    if stage == "train":
        natural, kl = 1.7 * math.exp(-share), 0.35 + 0.1 * share
        terms = {"natural_ce": natural, "adversarial_ce": natural + 0.5, "kl": kl}
        terms = {"total": natural + 5 * kl + 0.2, **terms, "consistency": 0.2 * (1 - share)}
        robust = 38 - 40 * (share - 0.8) ** 2 + rng.random()
        validation = {"natural": 60 + 12 * share, "robust": robust, "attack": "pgd10"}
        terms |= {"natural_accuracy": 70 + 9 * share, "adversarial_accuracy": 41 + 8 * share}
        terms["gradient_norm"] = 3.0 - share
        row["movement"] = {name: float(0.2 * (1 - share) + 0.02 * rng.random()) for name in names}
        row["masked_energy"] = {name: float(0.01 + 0.01 * rng.random()) for name in names}
        row["mask"] = {"energy": 0.012, "never_updated": 0.3 ** (1 + 6 * share)}
        if epoch > 1:
            row["mask_overlap"] = {name: float(0.2 + 0.4 * rng.random()) for name in names}
            row["mask"]["overlap"] = 0.2 + 0.3 * share
    return {
        "event": "epoch",
        "stage": stage,
        "epoch": epoch,
        "step": epoch * 40,
        "lr": 0.1 * min(4 * share, (1 - share) / 0.75 + 1e-9),
        "terms": terms,
        "images": 5000,
        "seconds": 31.0 if stage == "train" else 2.4,
        "images_per_s": (161.0 if stage == "train" else 2083.0) * (1 + 0.05 * rng.random()),
        "validation": {**validation, "count": 500},
        "validation_seconds": 2.0,
        **row,
        "revision": {"rate": 0.2, "moves": 8} if stage == "train" else None,
    }


def metrics(pretrain: int, train: int, names: list[str]) -> str:
    rng = np.random.default_rng(7)
    rows = []
    for stage, count, planned in (("pretrain", pretrain, max(pretrain, 1)), ("train", train, 15)):
        for epoch in range(1, count + 1):
            row = epoch_row(stage, epoch, planned, names, rng)
            for part in (0, 0.5):
                position = epoch - 1 + part
                share = position / planned
                step = {"event": "step", "stage": stage, "epoch": position}
                step |= {"step": int(position * 40), "lr": 0.1 * min(4 * share, (1 - share) / 0.75)}
                total = row["terms"]["total"] * (0.85 + 0.3 * rng.random())
                rows.append({**step, "terms": {**row["terms"], "total": total}})
            rows.append(row)
    return "".join(json.dumps(row) + "\n" for row in rows)


def attack_result(
    attack: str, correct: int, count: int, *, reliable: bool = True, warnings: tuple[str, ...] = ()
) -> dict[str, Any]:
    settings: dict[str, Any] = {"eps": EPS, "step_size": EPS / 10, "steps": 20, "start": "uniform"}
    if attack == "natural":
        settings = {}
    if attack == "aa":
        after = {
            "apgd-ce": correct + 12,
            "apgd-t": correct + 1,
            "fab-t": correct,
            "square": correct,
        }
        settings = {"eps": EPS, "version": "standard", "pyautoattack": "0.2.0"}
        settings |= {"robust_after": after, "natural_correct": correct + 100}
    return {
        "attack": attack,
        "correct": correct,
        "count": count,
        "accuracy": 100 * correct / count,
        "seconds": 61.5 if attack == "aa" else 4.25,
        "precision": "float32",
        "settings": settings,
        "warnings": list(warnings),
        "reliable": reliable,
    }


def make_results() -> dict[str, Any]:
    trained = {"natural": (712, 1000), "pgd20": (371, 1000), "cw20": (343, 1000), "aa": (80, 256)}
    start = {"natural": (831, 1000), "pgd20": (2, 1000), "cw20": (1, 1000), "aa": (0, 256)}
    return {
        "format": 1,
        "recipe": "cifar10-small",
        "method": "cure",
        "model": "resnet18",
        "data": "cifar10",
        "classes": CLASSES,
        "test_images": 1000,
        "eps": EPS,
        "step_size": EPS / 10,
        "paper": PAPER,
        "models": {
            "trained": {
                "title": "CURE, best epoch 12 of 15",
                "attacks": {k: attack_result(k, *v) for k, v in trained.items()},
                "nrr_cw": 46.3,
                "nrr_aa": 43.4,
            },
            "start": {
                "title": "naturally trained start",
                "attacks": {k: attack_result(k, *v) for k, v in start.items()},
                "nrr_cw": 0.2,
                "nrr_aa": 0.0,
            },
        },
        "warnings": [],
    }


def make_examples(images: int = 6, side: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    grid = np.linspace(0, 1, side, dtype=np.float32)
    natural = np.empty((images, side, side, 3), np.float32)
    for index in range(images):
        colour = rng.random(3).astype(np.float32)
        disc = (grid[:, None] - 0.5) ** 2 + (grid[None, :] - 0.5) ** 2 < 0.03 + 0.02 * index
        natural[index] = 0.2 + 0.6 * np.where(disc[..., None], colour, grid[:, None, None])
    arrays = {"natural": natural, "labels": rng.integers(0, 10, images)}
    arrays["attack"] = np.array("pgd20")
    for model in ("start", "trained"):
        delta = EPS * rng.choice([-1.0, 0.3, 1.0], natural.shape)
        arrays[f"{model}_adversarial"] = np.clip(natural + delta, 0, 1).astype(np.float32)
        arrays[f"{model}_natural_prediction"] = arrays["labels"].copy()
        wrong = (arrays["labels"] + 1) % 10
        kept = np.arange(images) % 3 != 0 if model == "trained" else np.zeros(images, bool)
        arrays[f"{model}_adversarial_prediction"] = np.where(kept, arrays["labels"], wrong)
        for kind, sure in (("natural", 0.983), ("adversarial", 0.617)):
            arrays[f"{model}_{kind}_confidence"] = np.full(images, sure, np.float32)
    return arrays


def write_run(
    folder: Path,
    *,
    pretrain: int = 8,
    train: int = 15,
    names: int = 59,
    results: dict[str, Any] | None = None,
    examples: dict[str, np.ndarray] | None = None,
    environment: bool = True,
) -> Path:
    """Write a run folder; ``results`` and ``examples`` of None leave their files out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(make_config()))
    (folder / "metrics.jsonl").write_text(metrics(pretrain, train, tensors(names)))
    if environment:
        facts = {
            "cure_fast": "0.1.0",
            "python": "3.11.2",
            "torch": "2.11.0",
            "torchvision": "0.26.0",
            "triton": "3.6.0",
            "numpy": "2.2.0",
            "platform": "Linux-6.1-x86_64",
            "cpu": "Some Processor @ 2.5 GHz",
            "gpu": None,
            "driver": None,
            "commit": "0123456789abcdef",
            "dirty": True,
            "started": "2026-01-02T03:04:05+0000",
            "command": shlex.split(
                "cure-fast train cifar10-small --out 'runs/a b' --data-root '/srv/me/my data/c10'"
            ),
            "loader": "ffcv: installed, 2 threads",
        }
        (folder / "environment.json").write_text(json.dumps(facts))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    if examples is not None:
        np.savez(folder / "examples.npz", **examples)  # pyright: ignore[reportArgumentType]
    checkpoint = folder / "checkpoints" / "checkpoint-000000600"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "state.pt").write_bytes(b"0" * 1234)
    return folder


@pytest.fixture
def complete_run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", results=make_results(), examples=make_examples())


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a run folder with the given parts."""

    def make(**parts: Any) -> Path:
        return write_run(tmp_path / "run", **parts)

    return make


@pytest.fixture
def results() -> dict[str, Any]:
    return make_results()


@pytest.fixture
def examples() -> dict[str, np.ndarray]:
    return make_examples()


class Page(html.parser.HTMLParser):
    """Parses a page; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.cells: list[list[str]] = []
        # The rows of each table, and its label.
        self.tables: list[tuple[list[list[str]], str | None]] = []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append(([], dict(attrs).get("aria-label")))
        if tag == "tr":
            self.cells.append([])
            self.tables[-1][0].append(self.cells[-1])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "script" in self.open:
            return
        self.pieces.append(data)
        if "td" in self.open or "th" in self.open:
            self.cells[-1][-1] += data + " "

    def row(self, name: str) -> list[str]:
        """Return the cells of the first table row headed ``name``."""
        rows = [[" ".join(c.split()) for c in row] for row in self.cells]
        return next(row for row in rows if row and row[0] == name)

    def bars(self, group: str, label: str = "Accuracy by attack") -> dict[str, list[str]]:
        """Return the rows of a group of bars by the name of the bar: value, and what follows."""
        start = next(k for k, (t, a) in enumerate(self.tables) if a == label)
        found: dict[str, list[str]] = {}
        inside = False
        for row in self.tables[start][0]:
            cells = [" ".join(c.split()) for c in row]
            if len(cells) == 1:
                inside = cells[0] == group or cells[0].startswith(f"{group} ")
            elif inside:
                found[cells[0]] = cells[2:]
        return found

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def page_of() -> Callable[[Path], Page]:
    """A function that writes the report of a folder and returns it parsed."""
    return lambda folder: Page(write_report(folder).read_text(encoding="utf-8"))
