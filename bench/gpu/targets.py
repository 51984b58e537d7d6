"""The numbers that the fast engine is to reach, beside those that were measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[Mapping[str, Any]]
Results = Mapping[str, Mapping[str, Any]]

KERNELS = "kernels"


@dataclass(frozen=True)
class Target:
    """A number to reach.

    Attributes:
        text: what it is of.
        wanted: the number.
        at_most: whether smaller is better.
        unit: of the number.
        find: from the results by part to the number; None where it was not measured.
    """

    text: str
    wanted: float
    at_most: bool
    unit: str
    find: Callable[[Results], tuple[float, str] | None]

    def verdict(self, results: Results) -> str:
        """Return one line: the target, what was found, and by how much it is missed."""
        bound = f"{'at most' if self.at_most else 'at least'} {self.wanted:g}{self.unit}"
        found = self.find(results)
        if found is None:
            return f"not measured: {self.text}, {bound}"
        number, note = found
        reached = number <= self.wanted if self.at_most else number >= self.wanted
        off = abs(number - self.wanted) / self.wanted
        word = "reached" if reached else f"missed by {100 * off:.1f} %"
        return f"{word}: {self.text}, {bound}; measured {number:.4g}{self.unit}{note}"


def row_of(results: Results, part: str, **key: str | int) -> Mapping[str, Any] | None:
    """Return the measured row of a part whose key holds these values."""
    for row in results.get(part, {}).get("rows", ()):
        if row["seconds"] and key.items() <= row["key"].items():
            return row
    return None


def step_of(
    results: Results, method: str, engine: str, *, model: str = "resnet18", batch: int = 128
) -> Mapping[str, Any] | None:
    """Return the row of a training step."""
    return row_of(results, f"{model}-{batch}", method=method, engine=engine)


def milliseconds(model: str) -> Callable[[Results], tuple[float, str] | None]:
    """Return what finds the time of CURE's step on the fast engine at batch 128, in ms."""

    def find(results: Results) -> tuple[float, str] | None:
        row = step_of(results, "cure", "fast", model=model)
        return None if row is None else (1e3 * row["seconds"][1], "")

    return find


def figure(name: str, factor: float, batch: int) -> Callable[[Results], tuple[float, str] | None]:
    """Return what finds a figure of CURE's step with ResNet-18 on the fast engine."""

    def find(results: Results) -> tuple[float, str] | None:
        row = step_of(results, "cure", "fast", batch=batch)
        return None if row is None else (factor * row["figures"][name], "")

    return find


def ratio(over: tuple[str, str], under: tuple[str, str]) -> Callable[..., tuple[float, str] | None]:
    """Return what finds the ratio of two steps' times, each given by method and engine."""

    def find(results: Results) -> tuple[float, str] | None:
        above, below = step_of(results, *over), step_of(results, *under)
        if above is None or below is None:
            return None
        apart = above["together"] != below["together"]
        note = " (not taken in turns)" if apart else ""
        return above["seconds"][1] / below["seconds"][1], note

    return find


def update_share(results: Results) -> tuple[float, str] | None:
    """Return the share in percent of the update's kernels in CURE's step.

    They are those replayed from a CUDA graph, as the engine replays them in its own: launched by
    Python they take as long as Python does.
    """
    step = step_of(results, "cure", "fast")
    update = row_of(
        results, KERNELS, operation="update+ema", shapes="resnet18", provider="triton-graph"
    )
    if step is None or update is None:
        return None
    note = " (two parts' figures, the kernels' from a CUDA graph)"
    return 100 * update["seconds"][1] / step["seconds"][1], note


TARGETS = (
    Target(
        "CURE's step over TRADES', fast engine",
        1.20,
        True,
        "x",
        ratio(("cure", "fast"), ("trades", "fast")),
    ),
    Target(
        "CURE's step, authors' engine over fast",
        5.0,
        False,
        "x",
        ratio(("cure", "authors"), ("cure", "fast")),
    ),
    Target(
        "CURE's step, eager+compile (default mode) over fast",
        2.5,
        False,
        "x",
        ratio(("cure", "eager+compile"), ("cure", "fast")),
    ),
    Target("CURE's step, ResNet-18, batch 128", 16, True, " ms", milliseconds("resnet18")),
    Target(
        "CURE's epoch, ResNet-18, batch 128", 6.3, True, " s", figure("epoch_seconds", 1.0, 128)
    ),
    Target("share of the bf16 ceiling, same step", 37, False, " %", figure("share", 100.0, 128)),
    Target("CURE's step, WRN-34-10, batch 128", 150, True, " ms", milliseconds("wrn34-10")),
    Target("selection, mask and update in CURE's step", 1.5, True, " %", update_share),
    Target("beyond: CURE's step, ResNet-18, batch 128", 14, True, " ms", milliseconds("resnet18")),
    Target(
        "beyond: CURE's epoch, ResNet-18, batch 512",
        4.5,
        True,
        " s",
        figure("epoch_seconds", 1.0, 512),
    ),
)


def verdicts(results: Results) -> list[str]:
    """Return one line per target; a rehearsal on tiny shapes has measured none."""
    real = {part: result for part, result in results.items() if not result["about"]["tiny"]}
    return [target.verdict(real) for target in TARGETS]
