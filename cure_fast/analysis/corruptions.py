"""Accuracy on corrupted images: CURE's Fig. 7, by groups, and Fig. 9, one by one.

The paper has 17 corruptions of four groups at severity 3. They are those of CIFAR-10-C, read from
its files, or made anew by :mod:`.corrupting`, all but frost.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cure_fast.analysis.corrupting import (
    GROUPS,
    KINDS,
    SEVERITIES,
    check_images,
    corrupt,
    made,
)
from cure_fast.analysis.shape import Analysis, Numbers, Settings, Subject, Task
from cure_fast.config.checks import check, find
from cure_fast.errors import InputError
from cure_fast.figures import (
    PAGE,
    line_styles,
    new_figure,
    outside_legend,
    percent_axis,
)
from cure_fast.figures.panels import bar_styles, grouped_bars
from cure_fast.files import user_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the paper's figures.
SEVERITY = 3
# Images [N, H, W, C] of a corruption at a severity.
Source = Callable[[str, int], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class CorruptionsSettings(Settings):
    """Settings of ``corruptions``."""

    corruptions: tuple[str, ...] = GROUPS[:4]
    """Corruptions by the names of CIFAR-10-C, such as gaussian_noise, or groups of them: blur,
    digital, weather, noise, and extra for saturate and spatter."""
    severities: tuple[int, ...] = SEVERITIES
    """Severities, 1 to 5; the figure's bars are of 3 where that is among them."""
    corrupted: str | None = None
    """Folder of CIFAR-10-C or another set of its form, with labels.npy and a file for each
    corruption; None makes the images anew, without frost."""


def compute(task: Task, settings: CorruptionsSettings) -> Numbers:
    """Return the accuracy of each network under each corruption at each severity."""
    for severity in settings.severities:
        check(severity in SEVERITIES, "severities", severity, "severities 1 to 5")
    check(len(settings.severities) > 0, "severities", settings.severities, "at least one")
    anew = settings.corrupted is None
    names = chosen(settings.corruptions, anew=anew)
    source = making(task, names) if anew else reading(task, names, str(settings.corrupted))
    # All networks have one set of images before the next is made.
    source = lru_cache(maxsize=1)(source)

    def accuracy(subject: Subject, name: str, severity: int) -> float:
        images = natural_bytes(task) if severity == 0 else source(name, severity)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        right = task.logits(subject.network, pixels).argmax(1) == task.labels
        return 100 * int(right.sum()) / len(right)

    severities = sorted({*settings.severities})
    cases = [("natural", 0), *((name, severity) for name in names for severity in severities)]
    found = task.each(
        {
            f"{name} {severity}: {subject.name}": partial(accuracy, subject, name, severity)
            for name, severity in cases
            for subject in task.subjects
        },
        "corruptions",
    )
    rows = [
        {
            "model": subject.name,
            "corruption": name,
            "group": KINDS[name].group if severity else "",
            "severity": severity,
            "accuracy": found[f"{name} {severity}: {subject.name}"],
        }
        for subject in task.subjects
        for name, severity in cases
    ]
    made_by = (
        {package: version(package) for package in ("numpy", "scipy", "pillow")} if anew else {}
    )
    return {"rows": rows, "regenerated": anew, "made_by": made_by}


def chosen(words: Sequence[str], *, anew: bool) -> list[str]:
    """Return the corruptions that names and groups stand for; of groups those that there are."""
    table = {
        group: [name for name, kind in KINDS.items() if kind.group == group] for group in GROUPS
    }
    names = []
    for word in words:
        group = find("--corruptions", {**table, **{name: [name] for name in KINDS}}, word)
        names += [n for n in group if not anew or word == n or KINDS[n].make is not None]
    check(len(names) > 0, "corruptions", tuple(words), "at least one")
    return [*dict.fromkeys(names)]


def making(task: Task, names: Sequence[str]) -> Source:
    """Return what makes corrupted images anew; raise ``InputError`` where it could not."""
    for name in names:
        made(name)
    if importlib.util.find_spec("scipy") is None:
        raise InputError(
            "corruptions: images are corrupted by scipy, which is not installed. Run: python -m "
            "pip install scipy"
        )
    images = natural_bytes(task)
    check_images(images, names)
    return lambda name, severity: corrupt(images, name, severity, seed=task.seed)


def natural_bytes(task: Task) -> np.ndarray:
    """Return the images as uint8 [N, H, W, C], floats rounded."""
    images = task.images
    return (images if images.dtype == torch.uint8 else (255 * images).round().byte()).numpy()


def reading(task: Task, names: Sequence[str], folder: str) -> Source:
    """Return what reads images of CIFAR-10-C's form; raise ``InputError`` for files of another.

    ``NAME.npy`` is uint8 [5 N, H, W, C], severity s from row (s - 1) N on, and ``labels.npy`` has
    their labels [5 N].
    """
    place = user_path(folder, "--corrupted")
    if not place.is_dir():
        raise InputError(
            f"--corrupted: expected a folder of CIFAR-10-C's arrays, such as fog.npy, got {place}."
        )
    labels = array(place, "labels")
    check_stored(place, "labels", labels, labels.ndim == 1 and len(labels) % 5 == 0, "[5 N]")
    images, count = len(labels) // 5, len(task.labels)
    check_stored(place, "labels", labels, images >= count, f"of {count} images or more each")
    of_first = labels.reshape(5, images)[:, :count]
    if not np.array_equal(of_first, np.broadcast_to(task.labels.numpy(), of_first.shape)):
        raise InputError(
            f"{place / 'labels.npy'}: expected the labels of the first {count} test images at all "
            "severities, got others. Name the folder of the same data set, in the same order."
        )
    stored = {name: array(place, name) for name in names}
    shape = (5 * images, *task.images.shape[1:])
    for name, found in stored.items():
        right = found.dtype == np.uint8 and found.shape == shape
        check_stored(place, name, found, right, f"uint8 {list(shape)}")

    def source(name: str, severity: int) -> np.ndarray:
        start = (severity - 1) * images
        return np.array(stored[name][start : start + count])

    return source


def array(folder: Path, name: str) -> np.ndarray:
    """Return the array in a file, which stays on the disk until it is looked at."""
    path = folder / f"{name}.npy"
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected an array of CIFAR-10-C's form, but it does not read "
            f"({' '.join(str(error).split())}). Check --corrupted, or leave {name} out."
        ) from error


def check_stored(folder: Path, name: str, found: np.ndarray, right: bool, form: str) -> None:
    """Raise ``InputError`` for an array of another form."""
    if not right:
        raise InputError(
            f"{folder / name}.npy: expected {form}, got {found.dtype} {list(found.shape)}. Name "
            "another folder with --corrupted."
        )


def draw(numbers: Numbers) -> Figure:
    """Return bars of groups and of corruptions, and a line over severities where there are more."""
    rows, subjects = numbers["rows"], numbers["subjects"]
    severities = sorted({row["severity"] for row in rows} - {0})
    shown = SEVERITY if SEVERITY in severities else severities[len(severities) // 2]
    names = [*dict.fromkeys(row["corruption"] for row in rows if row["severity"])]
    groups = [g for g in GROUPS if any(KINDS[name].group == g for name in names)]

    def mean(model: str, severity: int, among: Sequence[str]) -> float:
        return float(
            np.mean(
                [
                    r["accuracy"]
                    for r in rows
                    if (
                        r["model"] == model
                        and r["severity"] == severity
                        and r["corruption"] in among
                    )
                ]
            )
        )

    figure, axes = new_figure(2, 2, width=PAGE, height=4.6)
    grid = axes[0].get_gridspec()
    assert grid is not None
    for each in axes:
        each.remove()
    several = len(severities) > 1
    of_groups = figure.add_subplot(grid[0, 0] if several else grid[0, :])
    one_by_one = figure.add_subplot(grid[1, :])
    styles = bar_styles(subjects)
    for panel, bars in (
        (of_groups, {group: [n for n in names if KINDS[n].group == group] for group in groups}),
        (one_by_one, {name: [name] for name in names}),
    ):
        heights: dict[str, list[float | None]] = {
            s["name"]: [mean(s["name"], shown, among) for among in bars.values()] for s in subjects
        }
        labels = [label_of(name) for name in bars]
        grouped_bars(panel, labels, heights, styles, slanted=panel is one_by_one)
        percent_axis(panel)
    how = "regenerated without frost" if numbers["regenerated"] else "as stored"
    of_groups.set_title(f"groups, severity {shown}, {how}")
    one_by_one.set_title(f"each corruption, severity {shown}, {how}")
    if several:
        over = figure.add_subplot(grid[0, 1])
        for subject, style in zip(subjects, line_styles(subjects), strict=True):
            y = [mean(subject["name"], s, names) for s in severities]
            natural = mean(subject["name"], 0, ["natural"])
            over.plot([0, *severities], [natural, *y], label=subject["name"], **style)
        over.set_xticks([0, *severities], ["natural", *map(str, severities)])
        over.set_xlabel("severity")
        over.set_title(f"mean of all, {how}")
        percent_axis(over)
    outside_legend(figure, [of_groups], columns=4)
    return figure


def label_of(name: str) -> str:
    """Return what people read instead of the name of a corruption or a group."""
    words = name.removesuffix("_compression").removesuffix("_transform").replace("_", " ")
    return "JPEG" if words == "jpeg" else words


def files_of(settings: CorruptionsSettings) -> list[tuple[str, int, int]]:
    """Return what tells whether the arrays of ``--corrupted`` are the same: names, sizes, times."""
    if settings.corrupted is None:
        return []
    found = sorted(user_path(settings.corrupted, "--corrupted").glob("*.npy"))
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]


CORRUPTIONS = Analysis(
    name="corruptions",
    title="Accuracy on corrupted images",
    source="CURE, Fig. 7 and 9",
    about=(
        "Nothing is trained on such images. Where they are called regenerated they are made anew "
        "with the constants of CIFAR-10-C, without frost, which takes photographs: accuracies are "
        "not those on CIFAR-10-C, but of images of the same kind."
    ),
    settings=CorruptionsSettings(),
    compute=compute,
    draw=draw,
    depends=files_of,
)
