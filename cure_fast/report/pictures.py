"""The picture grid: natural images, adversarial images, and what was added to make them."""

from __future__ import annotations

import numpy as np

from cure_fast.config.checks import format_pixel
from cure_fast.report.examples import Examples
from cure_fast.report.html import Html, code, element, paragraph, scroll, section
from cure_fast.report.record import Record
from cure_fast.report.svg import data_uri, encode_png
from cure_fast.report.text import class_name


def pictures(record: Record) -> Html:
    """Return the section with one row per example image."""
    title, anchor = "What the attack does", "pictures"
    examples = record.examples
    if examples is None:
        reason = "There are no pictures: examples.npz is not in this folder. It is written by "
        advice = paragraph(reason, code("cure-fast eval"), ".", class_="absent")
        return section(title, advice, anchor=anchor)
    results, config = record.results, record.config
    # That of the evaluation, in pixel units.
    eps = config.get("eval", {}).get("eval_eps") or config["attack"]["eps"]
    eps, classes = (results.eps, results.classes) if results else (eps, [])
    factor = 0.5 / eps if eps else 1.0
    text = (
        f"Each difference is multiplied by {factor:.3g} around grey, so that grey is no change, "
        f"and black and white are the full radius eps = {format_pixel(eps)} down and up. Below "
        "each picture stands what the model takes it for: \N{CHECK MARK} right, \N{BALLOT X} wrong."
    )
    result = "trained" if results is None else results.name("trained")
    names = {"start": "start", "trained": "trained model" if result == "trained" else result}
    header = ["True class", "Natural image"]
    for model in examples.adversarial:
        header += [f"Adversarial to the {names[model]}", "Difference"]
    count = len(examples.labels)
    rows = [_row(examples, index, classes, factor, names) for index in range(count)]
    head = element("tr", *(element("th", cell, scope="col") for cell in header))
    grid = element("table", element("thead", head), element("tbody", *rows), class_="pictures")
    return section(title, paragraph(text), scroll(grid, title), anchor=anchor)


def _row(
    examples: Examples, index: int, classes: list[str], factor: float, names: dict[str, str]
) -> Html:
    label = int(examples.labels[index])
    true = class_name(classes, label)
    natural = examples.natural[index]
    verdicts = [
        _verdict(f"{names[model]}: ", examples.predictions[model, "natural"][index], label, classes)
        for model in examples.adversarial
    ]
    cells = [
        element("th", true, scope="row"),
        _cell(natural, f"Natural image {index + 1}, class {true}", *verdicts),
    ]
    for model, images in examples.adversarial.items():
        adversarial = images[index]
        against = f"the {names[model]}"
        verdict = _verdict("", examples.predictions[model, "adversarial"][index], label, classes)
        difference = adversarial.astype(np.float64) - natural
        largest = element("span", f"largest {_pixel(np.abs(difference).max())}", class_="verdict")
        cells += [
            _cell(adversarial, f"Image {index + 1} attacked to fool {against}", verdict),
            _cell(
                np.clip(0.5 + factor * difference, 0, 1),
                f"What was added to image {index + 1} against {against}",
                largest,
            ),
        ]
    return element("tr", *cells)


def _pixel(value: float) -> str:
    """Return a distance of float32 images: whole 255ths are not exact there."""
    steps = round(value * 255)
    return format_pixel(steps / 255 if abs(value * 255 - steps) < 1e-3 else float(f"{value:.3g}"))


def _verdict(prefix: str, prediction: int, label: int, classes: list[str]) -> Html:
    right = int(prediction) == label
    sign = "\N{CHECK MARK}" if right else "\N{BALLOT X}"
    spoken = element("span", "right: " if right else "wrong: ", class_="spoken")
    name = class_name(classes, int(prediction))
    text = f"{prefix}{sign} "
    return element("span", text, spoken, name, class_=f"verdict {'good' if right else 'bad'}")


def _cell(image: np.ndarray, alt: str, *captions: Html) -> Html:
    pixels = np.rint(image * 255).astype(np.uint8)
    height, width, _ = pixels.shape
    picture = element("img", src=data_uri(encode_png(pixels)), alt=alt, width=width, height=height)
    return element("td", picture, *captions)
