"""``confidence`` against the formula written out, and where the error is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import cure_fast
from cure_fast.analysis.confidence import calibration
from cure_fast.evaluation.evaluate import adversarial_images


def written_out(probabilities, labels, bins):
    """Return the expected calibration error as Guo et al. write it, in percent."""
    error = 0.0
    for m in range(1, bins + 1):
        inside = [i for i, p in enumerate(probabilities) if (m - 1) / bins < max(p) <= m / bins]
        if inside:
            accuracy = sum(int(np.argmax(probabilities[i]) == labels[i]) for i in inside)
            sure = sum(max(probabilities[i]) for i in inside)
            error += abs(accuracy / len(inside) - sure / len(inside)) * len(inside) / len(labels)
    return 100 * error


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_the_error_is_that_of_the_formula(bins):
    draw = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(300, 5, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 5, (300,), generator=draw)
    found = calibration(logits, labels, bins)
    p = logits.softmax(1).numpy()
    assert found["ece"] == pytest.approx(written_out(p, labels.numpy(), bins))
    hits = p.argmax(1) == labels.numpy()
    assert found["accuracy"] == pytest.approx(100 * hits.mean())
    assert found["confidence_right"] == pytest.approx(100 * p.max(1)[hits].mean())
    assert found["confidence_wrong"] == pytest.approx(100 * p.max(1)[~hits].mean())
    assert sum(each["share"] for each in found["bins"]) == pytest.approx(100)
    for each in found["bins"]:
        assert abs(each["confidence"] - each["middle"]) <= 50 / bins + 1e-9


def sure_of(share, count):
    """Return logits of two classes, of which the first has this probability."""
    return torch.tensor([[math.log(share), math.log(1 - share)]], dtype=torch.float64).repeat(
        count, 1
    )


def test_as_often_right_as_sure_is_no_error():
    logits = torch.cat([sure_of(0.75, 4), sure_of(0.6, 5)])
    labels = torch.tensor([0, 0, 0, 1, 0, 0, 0, 1, 1])
    assert calibration(logits, labels, 15)["ece"] == pytest.approx(0, abs=1e-9)
    # In one bin, too much and too little cancel.
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1])
    assert calibration(logits, labels, 1)["ece"] == pytest.approx(0, abs=1e-9)
    assert calibration(logits, labels, 15)["ece"] == pytest.approx(100 * (0.25 * 4 + 0.2 * 5) / 9)


def test_always_sure_and_wrong_is_all_error():
    logits = torch.tensor([[900.0, 0.0]]).repeat(6, 1)
    found = calibration(logits, torch.ones(6, dtype=torch.int64), 15)
    assert found["ece"] == found["confidence"] == found["confidence_wrong"] == 100
    assert found["accuracy"] == 0 and found["confidence_right"] is None


def test_an_edge_belongs_to_the_bin_below():
    found = calibration(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), 2)
    assert [each["middle"] for each in found["bins"]] == [25]


def test_both_kinds_of_images_are_measured(linear, images, labels):
    result = cure_fast.analysis.confidence(linear, images, labels, eps=0.03, bins=4)
    attacked = adversarial_images(
        linear,
        torch.from_numpy(images),
        torch.from_numpy(labels).long(),
        attack="pgd20",
        eps=0.03,
        step_size=None,
        batch_size=256,
        device="cpu",
        seed=0,
    )
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    for row, x in zip(result.rows, (pixels, attacked), strict=True):
        p = linear(x).detach().double().softmax(1).numpy()
        assert row["ece"] == pytest.approx(written_out(p, labels, 4))
    assert [row["on"] for row in result.rows] == ["natural", "attacked"]
    figure = result.figure()
    (told,) = [text.get_text() for text in figure.legends[0].get_texts()]
    natural, attacked = (f"{row['ece']:.1f} %" for row in result.rows)
    assert told.endswith(f"ECE {natural} natural, {attacked} attacked") and len(figure.axes) == 4
