"""``perturbation`` against the exact distances of linear networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import cure_fast
from cure_fast.analysis.perturbation import middle_of
from cure_fast.errors import InputError
from small import Linear

# What rounding of logits, about 1e-6, moves the boundary by, over 48 weights of about 1.
ROUNDING = 1e-6


@pytest.fixture
def network():
    """Of two classes the gradient knows the way."""
    return Linear(classes=2).eval()


def predicted(model, images):
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return model(pixels).argmax(1).numpy()


def distances(model, images, norm="linf"):
    """The distance to the boundary of two classes, image by image."""
    weight, bias = (p.detach().double().numpy() for p in model.layer.parameters())
    x = images.astype(np.float64).transpose(0, 3, 1, 2).reshape(len(images), -1) / 255
    way = weight[1] - weight[0]
    gap = np.abs(x @ way + bias[1] - bias[0])
    return gap / (np.abs(way).sum() if norm == "linf" else np.linalg.norm(way))


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_radii_are_the_distances_to_a_linear_boundary(loss, network, images):
    labels = predicted(network, images)
    result = cure_fast.analysis.perturbation(network, images, labels, loss=loss)
    exact = distances(network, images)
    step = 64 / 255 / 2**12
    assert result.numbers["resolution"] == step and result.numbers["right"] == 24
    found = np.array([row["radius"] or math.inf for row in result.rows])
    inside = exact < 64 / 255
    assert inside.sum() > 12 and not np.isfinite(found[~inside]).any()
    # Signs are right from the first step on, and 50 steps of a tenth reach the corner: the attack
    # itself gives nothing away.
    late = found[inside] - exact[inside]
    assert (late > -ROUNDING).all() and (late < step + ROUNDING).all()
    assert result.numbers["never"] == {"Linear": int((~inside).sum())}
    assert result.numbers["median"]["Linear"] == pytest.approx(np.median(exact), abs=2 * step)


def test_radii_in_l2(network, images):
    labels = predicted(network, images)
    result = cure_fast.analysis.perturbation(
        network, images, labels, norm="l2", eps=0.5, most=2.0, halvings=10
    )
    exact = distances(network, images, "l2")
    # Walls are 80/255 or farther from every pixel.
    inside = exact < 1
    found = np.array([row["radius"] or math.inf for row in result.rows])
    late = found[inside] - exact[inside]
    # Steps of a tenth turn a perturbation on the sphere to the gradient by tan(angle / 2) shrinking
    # e^0.1 times: after 50 it lacks less than 1e-3 of the radius, from wherever it started.
    assert inside.sum() > 12
    assert (late > -1e-5).all() and (late < 2 / 2**10 + 1e-3 * exact[inside] + 1e-5).all()


def test_images_beyond_the_largest_radius_are_counted_as_that(network, images):
    labels = predicted(network, images)
    exact = np.sort(distances(network, images))
    # Between the 5th and the 6th of 24.
    most = float(exact[4] + exact[5]) / 2
    result = cure_fast.analysis.perturbation(network, images, labels, most=most, halvings=3)
    radii = [row["radius"] for row in result.rows]
    assert radii.count(None) == result.numbers["never"]["Linear"] == 19
    assert all(radius <= most for radius in radii if radius is not None)
    assert result.numbers["median"] == {"Linear": None}
    assert "median beyond" in result.figure().subfigs[0].axes[0].get_legend().texts[0].get_text()


def test_the_median_counts_what_was_never_fooled():
    assert middle_of([0.1, None, 0.3]) == 0.3
    assert middle_of([None, 0.2]) is None


def test_only_what_all_networks_have_right_is_compared(network, images):
    other = Linear(classes=2, seed=1).eval()
    labels = predicted(network, images)
    both = np.flatnonzero(predicted(other, images) == labels)
    assert 0 < len(both) < 24
    models = {"one": network, "two": other}
    result = cure_fast.analysis.perturbation(models, images, labels, steps=10, halvings=6)
    assert [row["image"] for row in result.rows if row["model"] == "two"] == both.tolist()
    example = result.numbers["examples"][0]
    row = next(r for r in result.rows if (r["image"], r["model"]) == (example["image"], "two"))
    assert example["networks"]["two"]["radius"] == row["radius"]
    left, right = result.figure().subfigs
    assert len(left.axes[0].get_legend().texts) == 2
    assert len(right.axes) == 3 * len(result.numbers["examples"])
    with pytest.raises(InputError, match="expected an image that all networks classify rightly"):
        cure_fast.analysis.perturbation(network, images, 1 - labels)
    with pytest.raises(InputError, match="--most: expected a radius above 0"):
        cure_fast.analysis.perturbation(network, images, labels, most=2.0)


def test_batches_do_not_change_what_is_found(network, images):
    labels = predicted(network, images)
    first, second = (
        cure_fast.analysis.perturbation(
            network, images, labels, steps=10, halvings=6, restarts=1, batch_size=size
        ).rows
        for size in (24, 7)
    )
    assert [row["radius"] for row in first] == [row["radius"] for row in second]
