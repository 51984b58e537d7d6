from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from markupsafe import Markup
from PIL import Image

from cure_fast.report.html import element
from cure_fast.report.svg import (
    Axis,
    Line,
    heat_colours,
    line_chart,
    linear_axis,
    nice_step,
    picture,
)
from cure_fast.report.text import attack_name, data_name, points, setting, wilson, without_folders

numbers = st.floats(1e-9, 1e12, allow_nan=False)


@given(st.integers(0, 5000), st.integers(1, 5000))
def test_wilson_interval_solves_its_equation(correct: int, count: int) -> None:
    correct = min(correct, count)
    share = correct / count
    low, high = wilson(correct, count)
    assert 0 <= low <= 100 * share + 1e-9 and 100 * share - 1e-9 <= high <= 100
    # Its ends p solve (share - p)^2 = z^2 p (1 - p) / n, the inverted score test.
    for end in (low / 100, high / 100):
        right = 1.959963984540054**2 * end * (1 - end) / count
        assert (share - end) ** 2 == pytest.approx(right, rel=1e-9, abs=1e-15)


def test_wilson_interval_of_known_counts() -> None:
    # Newcombe, Statistics in Medicine 17, 1998, Table I, method 3.
    assert wilson(81, 263) == pytest.approx((25.53, 36.62), abs=0.005)
    assert wilson(15, 148) == pytest.approx((6.24, 16.05), abs=0.005)
    assert wilson(0, 20) == pytest.approx((0, 16.11), abs=0.005)
    assert wilson(1, 29) == pytest.approx((0.61, 17.18), abs=0.005)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
def test_png_holds_the_pixels(pixels: np.ndarray) -> None:
    content = base64.b64decode(picture(pixels).removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), pixels)


@given(numbers, st.integers(2, 10))
def test_nice_steps_are_round(span: float, count: int) -> None:
    step = nice_step(span, count)
    lead = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(lead - m) for m in (1, 2, 5)) < 1e-6
    assert span / step <= count * 1.01
    assert span / step >= count / 2.6


@given(st.floats(-1e6, 0), numbers)
def test_linear_axis_holds_its_range(low: float, high: float) -> None:
    axis = linear_axis(high, "y", low=low)
    slack = 1e-6 * (high - low)
    assert axis.low <= low + slack and axis.high >= high - slack
    assert 2 <= len(axis.ticks) <= 8
    assert axis.ticks[0][0] == axis.low and axis.ticks[-1][0] == axis.high


def test_lines_break_between_stretches_and_points_stand_where_they_belong() -> None:
    axis = Axis(0, 10, [(0, "0"), (10, "10")], "x")
    line = Line("l", "c1", [[(0, 0, "a"), (10, 10, "b")], [(5, 5, "alone")]])
    chart = line_chart([line], axis, axis, label="test")
    assert chart.count("<path") == 1 and chart.count("<circle") == 3
    # Corners of the plot: left bottom (64, 240), right top (466, 16).
    assert "M64.0 240.0L466.0 16.0" in chart


def test_heat_colours_rise_in_lightness_and_mark_gaps() -> None:
    colours = heat_colours(np.linspace(0, 1, 50)[None, :])[0].astype(float)
    lightness = colours @ np.array([0.2126, 0.7152, 0.0722])
    assert np.all(np.diff(lightness) > 0)
    assert heat_colours(np.array([[np.nan]])).tolist() == [[[128, 128, 128]]]


@given(st.text())
def test_text_is_escaped_and_comes_back(text: str) -> None:
    import html

    made = element("p", text, title=text)
    assert html.unescape(made) == f'<p title="{text}">{text}</p>'
    inner = made.removeprefix("<p ").removesuffix("</p>")
    assert "<" not in inner.replace("&lt;", "")


def test_markup_is_not_escaped_twice() -> None:
    assert element("p", element("b", "a<b"), Markup("<br>")) == "<p><b>a&lt;b</b><br></p>"


@pytest.mark.parametrize(
    "given_, shown",
    [
        ("pgd20", "PGD-20"),
        ("cw100", "C&W-100"),
        ("aa", "AutoAttack"),
        ("fgsm", "FGSM"),
        ("natural", "Natural"),
        ("new", "new"),
    ],
)
def test_attack_names(given_: str, shown: str) -> None:
    assert attack_name(given_) == shown


def test_a_folder_is_named_by_its_last_part() -> None:
    assert data_name("folder:/data/my images/") == "my images"
    assert data_name("svhn") == "SVHN"


def test_differences_have_signs_and_zero_has_none() -> None:
    assert points(1.25, 2) == "+1.25"
    assert points(-3.0) == "\N{MINUS SIGN}3.0"
    assert points(-0.001) == points(0.0) == "0.0"


def test_settings_are_written_as_people_write_them() -> None:
    assert setting("eps", 8 / 255) == "8/255"
    assert setting("step_size", 0.8 / 255) == "0.8/255"
    assert setting("eps", 0.15) == "0.15" and setting("step_size", 0.1) == "0.1"
    assert setting("step_size", 0.001234) == "0.001234"
    assert setting("lr", 0.1) == "0.1"
    assert setting("flip", True) == "on"
    assert setting("limit", None) == "none (default)"
    assert setting("sub", {"a": 1, "eps": 0.1}) == "a: 1; eps: 0.1"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("/srv/me/a b/run", "…/run"),
        ("~/runs/x/", "…/x"),
        ("folder:/data/my images", "folder:…/my images"),
        ("natural:/a/b.safetensors", "natural:…/b.safetensors"),
        ("--out=/tmp/run", "--out=…/run"),
        (r"C:\\Users\\me\\run", "…/run"),
        ("no space in /var/tmp/x, sorry", "no space in …/x, sorry"),
        ("runs/a b", "runs/a b"),
        ("8/255 at 3 images/s", "8/255 at 3 images/s"),
        ("<b>x</b> http://a.test/x", "<b>x</b> http://a.test/x"),
    ],
)
def test_folders_of_this_machine_are_left_out(text: str, shown: str) -> None:
    assert without_folders(text) == shown
    assert without_folders({"a": [text]}) == {"a": [shown]}
