"""How the page writes names, numbers and intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from cure_fast.config.attack_names import attack_name as attack_name
from cure_fast.config.checks import format_pixel
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.plugins.lookup import short
from cure_fast.step.method import WRITTEN

# 97.5 % quantile of the standard normal.
Z95 = 1.959963984540054
PIXEL_FIELDS = frozenset({"eps", "step_size", "eval_eps", "eval_step_size"})
# A path from the root or from home: alone or behind a word such as ``folder:``, and within a text.
WHOLE_PATH = re.compile(r"((?:--?[\w-]+=)?(?:\w\w+:)?)(?:~|[A-Za-z]:)?[/\\].*?([^/\\]*)[/\\]?")
PATH_IN_TEXT = re.compile(
    r"""(?<![^\s'"=:(,])(?:~|[A-Za-z]:)?[/\\](?:[^\s'"/\\]+[/\\])+([^\s'"/\\]*)"""
)
DATA = {**WRITTEN, "digits": "handwritten digits"}


def data_name(data: str) -> str:
    """Return a data set's name as papers write it, or the last part of a path or reference."""
    if data.startswith("folder:"):
        return data.removeprefix("folder:").rstrip("/").rsplit("/", 1)[-1]
    return DATA.get(data, short(data))


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
    """Return a distance in pixel units: ``8/255``, ``0.8/255``, or ``0.15`` where that is it."""
    text, tenths = format_pixel(value), 2550 * value
    if "/" in text or math.isclose(float(f"{value:.3g}"), value, rel_tol=1e-9):
        return text
    # Float32 images hold 255ths only nearly.
    whole = tenths >= 1 and math.isclose(tenths, round(tenths), rel_tol=1e-4)
    return f"{round(tenths) / 10:g}/255" if whole else f"{value:.4g}"


def without_folders(value: Any) -> Any:
    """Return text, or all text inside lists and mappings, with ``…/name`` for absolute paths.

    A page is sent to others, whom folders of this machine tell more than they should.
    """
    if isinstance(value, str):
        if whole := WHOLE_PATH.fullmatch(value):
            return f"{whole[1]}…/{whole[2]}"
        return PATH_IN_TEXT.sub(r"…/\1", value)
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if isinstance(value, dict):
        return {without_folders(key): without_folders(item) for key, item in value.items()}
    return value


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
