"""``eps-sweep`` against the closed form of a linear network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cure_fast
from small import Linear


def distances(model, images, labels):
    """Return the smallest L-inf radius that fools a linear network, image by image."""
    weight, bias = (p.detach().double().numpy() for p in model.layer.parameters())
    x = np.asarray(images, np.float64).transpose(0, 3, 1, 2).reshape(len(images), -1) / 255
    logits = x @ weight.T + bias
    found = []
    for row, label in zip(logits, labels, strict=True):
        others = [k for k in range(len(bias)) if k != label]
        gaps = [(row[label] - row[k]) / np.abs(weight[label] - weight[k]).sum() for k in others]
        found.append(min(gaps))
    return np.array(found)


def test_accuracy_at_each_radius_is_the_share_of_longer_distances(images):
    # Of two classes the gradient knows the way; of more it may go for a farther boundary.
    linear = Linear(classes=2)
    labels = linear(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).argmax(1)
    exact = distances(linear, images, labels)
    # In the widest gaps between two images, where the last step of an attack does not decide.
    ordered = np.sort(exact)
    gaps = np.argsort(ordered[1:] / ordered[:-1])[-3:]
    radii = sorted(float(np.sqrt(ordered[k] * ordered[k + 1])) for k in gaps)
    result = cure_fast.analysis.eps_sweep(linear, images, labels, radii=radii, attack="cw20")
    found = {row["eps"]: row["accuracy"] for row in result.rows}
    assert found[0.0] == 100
    for radius in radii:
        assert found[radius] == pytest.approx(100 * np.mean(exact > radius))


def test_a_curve_ends_where_nothing_is_right(images):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    labels = model(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).argmax(1)
    result = cure_fast.analysis.eps_sweep(model, images, labels, radii=[0.5, 0.6, 0.7])
    reached = [row["accuracy"] for row in result.rows]
    assert reached.count(0.0) <= 1 and reached == sorted(reached, reverse=True)
