"""The picture grid: natural images, adversarial images, and what was added to make them."""

from __future__ import annotations

from typing import Any

import numpy as np

from cure_fast.evaluation.record import network_name
from cure_fast.report.examples import Examples
from cure_fast.report.record import Record
from cure_fast.report.svg import picture
from cure_fast.report.text import attack_name, class_name, distance


def pictures(record: Record) -> dict[str, Any] | None:
    """Return what the section of pictures shows; None where there are none."""
    examples, results, config = record.examples, record.results, record.config
    if examples is None:
        return None
    # That of the evaluation, in pixel units.
    eps = config.get("eval", {}).get("eval_eps") or config["attack"]["eps"]
    eps, classes = (results.eps, results.classes) if results else (eps, [])
    factor = 0.5 / eps if eps else 1.0
    network = results.network if results else None
    names = {key: network_name(key, record.label, network) for key in ("start", "trained")}
    return {
        "attack": attack_name(examples.attack or "an attack"),
        "eps": distance(eps),
        "factor": f"{factor:.3g}",
        "models": [names[model] for model in examples.adversarial],
        "sure": bool(examples.confidences),
        "rows": [row(examples, k, classes, factor, names) for k in range(len(examples.labels))],
    }


def row(
    examples: Examples, index: int, classes: list[str], factor: float, names: dict[str, str]
) -> dict[str, Any]:
    """Return what a row shows of one image: it, and what each network takes it and others for."""
    natural, label = examples.natural[index], int(examples.labels[index])

    def verdict(model: str, kind: str) -> dict[str, Any]:
        guess = int(examples.predictions[model, kind][index])
        sure = examples.confidences.get((model, kind))
        # Rounded down: no network is certain.
        share = None if sure is None else f"{np.floor(1000 * sure[index]) / 10:.1f} %"
        name = class_name(classes, guess)
        return {"right": guess == label, "name": name, "model": names[model], "sure": share}

    attacked = []
    for model, images in examples.adversarial.items():
        added = images[index].astype(np.float64) - natural
        attacked.append(
            {
                "image": _picture(images[index]),
                "added": _picture(np.clip(0.5 + factor * added, 0, 1)),
                "largest": distance(float(np.abs(added).max())),
                "verdict": verdict(model, "adversarial"),
            }
        )
    return {
        "number": index + 1,
        "class": class_name(classes, label),
        "width": natural.shape[1],
        "height": natural.shape[0],
        "image": _picture(natural),
        "verdicts": [verdict(model, "natural") for model in examples.adversarial],
        "attacked": attacked,
    }


def _picture(image: np.ndarray) -> str:
    return picture(np.rint(image * 255).astype(np.uint8))
