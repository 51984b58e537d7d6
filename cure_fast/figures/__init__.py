"""What the figures of all analyses share: looks, colours of methods, files.

Figures are as wide as one or two columns of a paper, in millimetres of a printed page. The colours
are Okabe and Ito's, which the colour-blind tell apart, and lines differ by dashes and markers too.
No state of matplotlib is changed: each figure is an object of its own, drawn under local settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from cure_fast.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Widths in inches: a column of a paper with two, and the whole page.
COLUMN, PAGE = 3.4, 7.0
# Of lines and letters, and of what lies behind them. A page that shows the figure finds them by
# these values, and puts its own in their place.
INK, PAPER = "#1d232b", "#fefefe"
GRID = "#d4d8dd"
# Of what is in no network's colour: words of legends, and marks beside curves.
FAINT, MARK = "#5b6570", "#9aa2ab"
# Okabe and Ito, Color Universal Design, 2008; the yellow is too light for lines.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#777777", "#8c510a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
# Methods have the same colour in all figures; others get one by their name.
OF_METHODS = {
    **{"natural": 6, "pgd_at": 0, "trades": 2, "mart": 3, "cure": 1, "piat": 4, "nmse": 5},
    "piat_nmse": 7,
}
# Of the first run of a method, the second and so on; below 0 towards black.
SHADES = (0.0, -0.4, 0.45, -0.65, 0.65)
# Colours of two kinds of images.
NATURAL, ROBUST = COLOURS[0], COLOURS[1]


@contextmanager
def looks() -> Iterator[None]:
    """Draw in the block as all figures here are drawn."""
    import matplotlib

    settings: dict[Any, Any] = {
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.labelsize": 8,
        "legend.fontsize": 7,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "lines.linewidth": 1.4,
        "lines.markersize": 4,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.5,
        "legend.frameon": False,
        "figure.facecolor": PAPER,
        "axes.facecolor": PAPER,
        "savefig.facecolor": "auto",
        "image.cmap": "viridis",
        # Letters stay letters in files.
        "pdf.fonttype": 42,
        "svg.fonttype": "none",
        # Ids in SVG hang on what is drawn, not on chance.
        "svg.hashsalt": "cure-fast",
        **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
        ),
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = COLUMN, height: float = 2.4, **more: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many inches with its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **more)
    return figure, [*axes.flat]


def line_styles(subjects: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return colour, marker and dashes of the line of each subject, as numbers have them."""
    return [
        {
            "color": colour,
            "marker": MARKERS[place % len(MARKERS)],
            "linestyle": DASHES[place % len(DASHES)],
        }
        for place, colour in enumerate(colours(subjects))
    ]


def colours(subjects: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a colour of its own for each subject: its method's, or a shade of it, or a free one.

    The first of a method has the method's colour, which is the same in all figures; runs of one
    method are shades of it. Where no method is known, or another one has its colour, one is taken
    that nobody has. Methods of :data:`OF_METHODS` have theirs first, then the others by name, so
    that no colour hangs on the order of arguments.
    """
    families = [family_of(subject["method"]) for subject in subjects]
    named = sorted({*families} - {""}, key=lambda name: (name not in OF_METHODS, name))
    owners: dict[str | None, str] = {}
    for family in named:
        owners.setdefault(colour_of(family), family)
    free = cycle([colour for colour in COLOURS if colour not in owners] or COLOURS)
    first = {family: colour for colour, family in owners.items() if colour is not None}
    for family in named:
        if family not in first:
            first[family] = next(free)
    found = []
    for place, family in enumerate(families):
        shading = SHADES[families[:place].count(family) % len(SHADES)]
        found.append(shade(first[family], shading) if family else next(free))
    return found


def family_of(method: str) -> str:
    """Return what variants of a method have in common in its name."""
    return "cure" if method.startswith("cure") else method


def colour_of(method: str) -> str | None:
    """Return the colour of a method, the same in all figures; None where none is known."""
    family = family_of(method)
    if not family:
        return None
    return COLOURS[OF_METHODS.get(family, crc32(family.encode()) % len(COLOURS))]


def shade(colour: str, share: float) -> str:
    """Return a colour so far on the way to white, or where it is negative to black."""
    parts = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    end = 255 if share > 0 else 0
    mixed = (round(part + abs(share) * (end - part)) for part in parts)
    return "#" + "".join(f"{part:02x}" for part in mixed)


def plain(value: Any) -> Any:
    """Return numbers with names as matplotlib shows them: no mathematics, none left out."""
    if isinstance(value, str):
        return (" " * value.startswith("_") + value).replace("$", r"\$")
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return [*map(plain, value)] if isinstance(value, list) else value


def drawn(draw: Callable[[], Figure]) -> Figure:
    """Return what ``draw`` draws, in the looks of all figures."""
    with looks():
        return draw()


def save_figure(draw: Callable[[], Figure], folder: Path, name: str) -> list[Path]:
    """Write the figure as SVG, PNG and PDF and return the files."""
    written = []
    with looks():
        figure = draw()
        # The layout around pictures settles in a first drawing.
        figure.draw_without_rendering()
        for ending, metadata in (
            ("svg", {"Date": None}),
            ("png", {}),
            ("pdf", {"CreationDate": None}),
        ):
            path = folder / f"{name}.{ending}"
            with replacing(path) as temporary:
                figure.savefig(temporary, format=ending, dpi=250, metadata=metadata)
            written.append(path)
    return written


def percent_axis(axes: Axes, label: str = "accuracy in %", *, across: bool = False) -> None:
    """Let an axis go from 0 to 100 percent."""
    if across:
        axes.set_xlim(0, 100)
        axes.set_xlabel(label)
    else:
        axes.set_ylim(0, 100)
        axes.set_ylabel(label)


def epoch_axis(axes: Axes) -> None:
    """Let the horizontal axis count epochs, which are whole."""
    from matplotlib.ticker import MaxNLocator

    # Where there is one epoch it would else put fractions around it.
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")


def outside_legend(figure: Figure, axes: Sequence[Axes], columns: int = 2) -> None:
    """Put one legend below all axes, of the names that any of them has, each once."""
    found: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        figure.legend(
            [*found.values()], [*found], loc="outside lower center", ncols=min(columns, len(found))
        )
