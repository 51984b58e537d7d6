"""Charts as inline SVG: axes, lines, points, a heat map; the page's style sheet colours them."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from cure_fast.report.html import element, join

# Size of a line chart in its own units; small, so that its text stays legible on a telephone.
WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 16, 40
# Above this many points a line carries no markers.
MOST_MARKERS = 60
# Dark blue, teal, yellow: lightness rises steadily, so it reads without colour vision too.
HEAT_COLOURS = np.array([(27, 38, 77), (38, 124, 138), (247, 219, 108)], dtype=np.float64)


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: what the legend says.
        style: CSS class that gives the colour.
        pieces: stretches of (x, y, label) points; nothing is drawn between two stretches.
        dash: SVG dash pattern.
        marker: ``circle``, ``square`` or ``none``.
        faint: thin and pale, behind the others, and cut off at the axis' ends.
    """

    name: str
    style: str
    pieces: list[list[tuple[float, float, str]]]
    dash: str = ""
    marker: str = "circle"
    faint: bool = False


@dataclass(frozen=True)
class Axis:
    """Range and labelled ticks of an axis."""

    low: float
    high: float
    ticks: list[tuple[float, str]]
    title: str

    def share(self, value: float) -> float:
        """Return where a value lies, 0 at the low and 1 at the high end."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Band:
    """A shaded stretch of the x axis with a title, such as a stage of the run."""

    low: float
    high: float
    title: str
    shaded: bool


def nice_step(span: float, count: int) -> float:
    """Return 1, 2 or 5 times a power of ten that cuts ``span`` into about ``count`` parts."""
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)


def linear_axis(high: float, title: str, *, low: float = 0.0, parts: int = 5) -> Axis:
    """Return an axis that holds ``low`` and ``high``, with round ticks at both ends."""
    span = high - low if high > low else 1.0
    step = nice_step(span, parts)
    first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], [(t, f"{t:,.6g}") for t in ticks], title)


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    lines: list[Line],
    x_axis: Axis,
    y_axis: Axis,
    *,
    label: str,
    bands: Iterable[Band] = (),
    mark: tuple[float, str] | None = None,
) -> Markup:
    """Return a chart of lines, in order from back to front.

    The label says what it shows to readers who do not see it; the mark is a place on the x axis,
    such as the best epoch, with its title.
    """
    parts = [*(_band(band, x_axis) for band in bands), _grid(x_axis, y_axis)]
    if mark:
        x, title = _x(x_axis, mark[0]), mark[1]
        anchor = "end" if x > WIDTH * 0.6 else "start"
        parts.append(element("line", class_="mark", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM))
        side = -5.0 if anchor == "end" else 5.0
        parts.append(element("text", title, x=x + side, y=HEIGHT - BOTTOM - 7, text_anchor=anchor))
    faint = [_line(line, x_axis, y_axis) for line in lines if line.faint]
    if faint:
        # An inner svg cuts off what lies outside it.
        width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        box = f"{LEFT} {TOP} {width} {height}"
        parts.append(element("svg", *faint, x=LEFT, y=TOP, width=width, height=height, viewBox=box))
    parts += [_line(line, x_axis, y_axis) for line in lines if not line.faint]
    return element(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, class_="chart"
    )


def _band(band: Band, x_axis: Axis) -> Markup:
    left = _x(x_axis, band.low)
    wide = _x(x_axis, band.high) - left
    parts = []
    if band.shaded:
        height = HEIGHT - TOP - BOTTOM
        parts.append(element("rect", class_="band", x=left, y=TOP, width=wide, height=height))
    if wide > 6.2 * len(band.title):
        parts.append(
            element("text", band.title, x=left + wide / 2, y=TOP - 5, text_anchor="middle")
        )
    return join(parts)


def _grid(x_axis: Axis, y_axis: Axis) -> Markup:
    parts = []
    for value, label in y_axis.ticks:
        y = _y(y_axis, value)
        parts.append(element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(element("text", label, x=LEFT - 6, y=y + 4, text_anchor="end"))
    bottom = HEIGHT - BOTTOM
    for value, label in x_axis.ticks:
        x = _x(x_axis, value)
        parts.append(element("line", class_="tick", x1=x, x2=x, y1=bottom, y2=bottom + 4))
        parts.append(element("text", label, x=x, y=bottom + 17, text_anchor="middle"))
    parts.append(element("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(element("text", x_axis.title, x=middle, y=HEIGHT - 6, text_anchor="middle"))
    upright = f"translate(12 {(TOP + bottom) / 2:.0f}) rotate(-90)"
    parts.append(element("text", y_axis.title, text_anchor="middle", transform=upright))
    return join(parts)


def _line(line: Line, x_axis: Axis, y_axis: Axis) -> Markup:
    parts = []
    markers = line.marker != "none" and sum(map(len, line.pieces)) <= MOST_MARKERS
    for piece in line.pieces:
        places = [(_x(x_axis, x), _y(y_axis, y), text) for x, y, text in piece]
        # A single point has no line to show it.
        if len(places) > 1:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
            parts.append(element("path", d=path, stroke_dasharray=line.dash or None))
        if markers or len(places) == 1:
            parts += [_marker(line.marker, x, y, text) for x, y, text in places]
    return element("g", *parts, class_=f"line {line.style}{' faint' if line.faint else ''}")


def _marker(marker: str, x: float, y: float, text: str) -> Markup:
    title = element("title", text)
    if marker == "square":
        return element("rect", title, x=x - 3, y=y - 3, width=6, height=6)
    return element("circle", title, cx=x, cy=y, r=3.2)


def legend(lines: list[Line]) -> Markup:
    """Return the list that names the lines, each with a sample."""
    items = []
    for line in lines:
        parts = [element("path", d="M1 6H27", stroke_dasharray=line.dash or None)]
        if line.marker != "none":
            parts.append(_marker(line.marker, 14, 6, line.name))
        style = f"line {line.style}{' faint' if line.faint else ''}"
        sample = element("g", *parts, class_=style)
        drawing = element("svg", sample, viewBox="0 0 28 12", class_="sample", aria_hidden="true")
        items.append(element("li", drawing, element("span", line.name)))
    return element("ul", *items, class_="legend")


def heat_map(
    rows: list[str], columns: list[str], values: np.ndarray, *, high: float, label: str
) -> Markup:
    """Return a heat map of percentages, with each row's mean at its right.

    Values are [rows, columns] in [0, high]; NaN is drawn grey. Some columns are named below.
    """
    height = 15 if len(rows) <= 24 else 12
    left, wide, top = 190, 400, 6
    bottom = top + height * len(rows)
    place = {"x": left, "y": top, "width": wide, "height": bottom - top}
    colours = picture(heat_colours(values / high))
    parts = [element("image", href=colours, **place, preserveAspectRatio="none")]
    for index, name in enumerate(rows):
        known = values[index][np.isfinite(values[index])]
        y = top + height * (index + 0.5) + 3.5
        mean = f"{known.mean():.1f} %" if known.size else "none"
        parts.append(element("text", name, x=left - 6, y=y, text_anchor="end"))
        parts.append(element("text", mean, x=left + wide + 6, y=y))
    every = max(1, round(nice_step(max(len(columns), 2), 8)))
    for index, name in enumerate(columns):
        if index % every == 0 or len(columns) <= 10:
            x = left + wide * (index + 0.5) / len(columns)
            parts.append(element("text", name, x=x, y=bottom + 14, text_anchor="middle"))
    parts.append(element("text", "epoch", x=left + wide / 2, y=bottom + 29, text_anchor="middle"))
    parts.append(element("text", "mean", x=left + wide + 6, y=bottom + 14))
    style = "chart heat small" if height < 15 else "chart heat"
    return element(
        "svg", *parts, viewBox=f"0 0 660 {bottom + 34}", role="img", aria_label=label, class_=style
    )


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Return the colours uint8 [R, C, 3] of fractions [R, C] in [0, 1]; NaN is grey."""
    places = np.linspace(0, 1, len(HEAT_COLOURS))
    channels = [np.interp(values, places, HEAT_COLOURS[:, channel]) for channel in range(3)]
    colours = np.stack(channels, axis=-1)
    colours[np.isnan(values)] = 128
    return np.rint(colours).astype(np.uint8)


def picture(pixels: np.ndarray) -> str:
    """Return the address of a PNG that holds its own pixels, uint8 [H, W, 3]."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
