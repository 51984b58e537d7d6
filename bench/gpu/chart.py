"""A bar chart as SVG, written by hand: groups of bars that lie, with their values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT = 900, 206, 110
TOP, BAR, GAP, GROUP_GAP, BOTTOM = 84, 22, 5, 40, 46
COLOURS = {
    "fast": "#1f6f54",
    "eager+compile": "#4a7fb5",
    "eager+reduce-overhead": "#2f5683",
    "authors": "#b4552d",
    "eager": "#8a8f98",
}
OTHER_COLOUR = "#6b5b95"
INK, FAINT, PAPER = "#1d2129", "#d9dde3", "#fbfbf9"
FONT = "font-family=\"Helvetica, Arial, 'Liberation Sans', sans-serif\""


@dataclass(frozen=True)
class Bar:
    """A bar: its label, its length, and the range that is drawn as a line over its end."""

    label: str
    low: float
    value: float
    high: float


def bar_chart(title: str, note: str, groups: Mapping[str, Sequence[Bar]]) -> str:
    """Return a chart of groups of bars, 900 pixels wide.

    Args:
        title: heading.
        note: line below it.
        groups: bars by the name of their group, values above 0.
    """
    ticks = nice_ticks(max((bar.high for bars in groups.values() for bar in bars), default=1.0))
    scale = (WIDTH - LEFT - RIGHT) / ticks[-1]
    body: list[str] = []
    y = TOP
    for name, bars in groups.items():
        body.append(_text(16, y + 16, name, size=16, weight="bold"))
        y += 26
        for bar in bars:
            body += _bar(bar, y, scale)
            y += BAR + GAP
        y += GROUP_GAP - GAP - 18
    height = y + BOTTOM
    axis = []
    for tick in ticks:
        x = LEFT + scale * tick
        axis.append(f'<line x1="{x:.1f}" y1="{TOP - 4}" x2="{x:.1f}" y2="{y}" stroke="{FAINT}"/>')
        axis.append(_text(x, y + 20, f"{tick:g}", size=13, anchor="middle"))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" role="img" {FONT}>',
            f"<title>{escape(title)}</title>",
            f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}"/>',
            _text(16, 34, title, size=20, weight="bold"),
            _text(16, 58, note, size=14),
            *axis,
            *body,
            "</svg>",
            "",
        ]
    )


def nice_ticks(largest: float) -> list[float]:
    """Return four to eight round numbers from 0 to ``largest`` or just above."""
    step = 10.0 ** math.floor(math.log10(largest / 4))
    for factor in (1, 2, 5, 10):
        if largest / (factor * step) <= 7:
            step *= factor
            break
    return [step * i for i in range(math.ceil(largest / step - 1e-9) + 1)]


def _bar(bar: Bar, y: float, scale: float) -> list[str]:
    middle = y + BAR / 2
    length, low, high = (scale * value for value in (bar.value, bar.low, bar.high))
    digits = 2 if bar.value < 10 else 1 if bar.value < 100 else 0
    value = f"{bar.value:,.{digits}f}"
    return [
        _text(LEFT - 10, middle + 5, bar.label, size=14, anchor="end"),
        f'<rect x="{LEFT}" y="{y:.1f}" width="{max(1.0, length):.1f}" height="{BAR}" '
        f'fill="{COLOURS.get(bar.label, OTHER_COLOUR)}"/>',
        f'<line x1="{LEFT + low:.1f}" y1="{middle:.1f}" x2="{LEFT + high:.1f}" y2="{middle:.1f}" '
        f'stroke="{INK}" stroke-width="2"/>',
        _text(LEFT + max(length, high) + 8, middle + 5, f"{value} s", size=14),
    ]


def _text(
    x: float, y: float, text: str, *, size: int, anchor: str = "start", weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{INK}">{escape(text)}</text>'
    )
