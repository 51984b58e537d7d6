"""How the page writes names, numbers and intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cure_fast.config.attack_names import attack_name as attack_name
from cure_fast.config.checks import format_pixel
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.step.method import WRITTEN

# 97.5 % quantile of the standard normal.
Z95 = 1.959963984540054
PIXEL_FIELDS = frozenset({"eps", "step_size", "eval_eps", "eval_step_size"})
DATA = {**WRITTEN, "digits": "handwritten digits"}


def data_name(data: str) -> str:
    """Return a data set's name as papers write it, or the last part of a folder's path."""
    if data.startswith("folder:"):
        return data.removeprefix("folder:").rstrip("/").rsplit("/", 1)[-1]
    return DATA.get(data, data)


def class_name(classes: list[str], index: int) -> str:
    """Return the name of a class, or its number where names are not known."""
    return classes[index] if 0 <= index < len(classes) else f"class {index}"


def percent(score: AttackResult) -> str:
    """Return an accuracy with as many digits as its number of images carries."""
    return f"{score.accuracy:.{_digits(score)}f} %"


def _digits(score: AttackResult) -> int:
    return 2 if score.count >= 1000 else 1


def points(difference: float, digits: int = 1) -> str:
    """Return a signed difference of two percentages, with a true minus sign."""
    text = f"{difference:+.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else f"{0:.{digits}f}"


def difference(score: AttackResult | None, other: AttackResult | float | None) -> str:
    """Return how far a score lies above another, or above a published percentage, in points."""
    if score is None or other is None:
        return ""
    if isinstance(other, AttackResult):
        return points(score.accuracy - other.accuracy, min(_digits(score), _digits(other)))
    return points(score.accuracy - other, _digits(score))


def wilson(correct: int, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of ``correct`` of ``count``, in percent.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    share, z2 = correct / count, Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    spread = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return 100 * max(0.0, centre - spread), 100 * min(1.0, centre + spread)


def interval(score: AttackResult) -> str:
    """Return the 95 % interval of a score, as ``65.4 to 74.9``."""
    low, high = wilson(score.correct, score.count)
    return f"{low:.1f} to {high:.1f}"


def size(count: int) -> str:
    """Return a number of bytes with its unit (powers of 1000)."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 10 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def number(value: float) -> str:
    """Return a number to four significant digits, or says that it is none."""
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def distance(value: float) -> str:
    """Return a distance in pixel units, as ``8/255`` or to four digits where that is not whole."""
    text = format_pixel(value)
    return text if "/" in text else f"{value:.4g}"


def setting(name: str, value: Any) -> str:
    """Return a setting's value; distances in pixel units as ``8/255`` where they are whole."""
    if value is None:
        return "none (default)"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float) or (isinstance(value, int) and name in PIXEL_FIELDS):
        return distance(value) if name in PIXEL_FIELDS else f"{value:g}"
    if isinstance(value, list):
        return ", ".join(setting(name, item) for item in value) or "none"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {setting(str(key), item)}" for key, item in value.items())
    return str(value)


def settings(values: Mapping[str, Any]) -> str:
    """Return settings in one line."""
    shown = [f"{name.replace('_', ' ')} {setting(name, value)}" for name, value in values.items()]
    return ", ".join(shown) or "none"
