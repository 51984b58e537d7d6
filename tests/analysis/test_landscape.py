"""``landscape`` against losses computed plainly, and what it leaves behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cure_fast
from cure_fast.analysis.landscape import draw_directions, movable
from cure_fast.errors import InputError
from cure_fast.evaluation.evaluate import adversarial_images
from small import Convolutional, Linear


@pytest.fixture
def pictures():
    return np.random.default_rng(3).integers(0, 256, (24, 8, 8, 3), np.uint8)


def attacked(model, images, labels, attack="pgd20"):
    return adversarial_images(
        model,
        torch.from_numpy(images),
        torch.as_tensor(labels),
        attack=attack,
        eps=8 / 255,
        step_size=None,
        batch_size=64,
        device="cpu",
        seed=0,
    )


def plain_loss(model, x, labels):
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model(x), torch.as_tensor(labels)))


def test_the_middle_is_the_loss_of_the_weights(pictures):
    model, labels = Convolutional().eval(), np.arange(24) % 3
    result = cure_fast.analysis.landscape(model, pictures, labels, points=3)
    middle = next(row for row in result.rows if row["a"] == row["b"] == 0)
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    assert middle["natural"] == pytest.approx(plain_loss(model, x, labels), abs=1e-6)
    adversarial = plain_loss(model, attacked(model, pictures, labels), labels)
    assert middle["adversarial"] == pytest.approx(adversarial, abs=1e-6)
    assert adversarial > middle["natural"]
    others = [row["natural"] for row in result.rows if row is not middle]
    assert len(others) == 8 and middle["natural"] not in others


def test_filters_of_directions_are_as_long_as_those_of_the_weights():
    model = Convolutional()
    for direction in draw_directions(model, "filter", 5):
        for name, weights in model.named_parameters():
            if weights.ndim == 1:
                assert not direction[name].any()
            else:
                own, found = (w.detach().flatten(1).norm(dim=1) for w in (weights, direction[name]))
                torch.testing.assert_close(found, own)
    first, second = draw_directions(model, "gaussian", 5)
    numbers = torch.cat([each.flatten() for each in first.values()])
    assert abs(float(numbers.std()) - 1) < 4 / (2 * len(numbers)) ** 0.5
    assert not torch.equal(first["conv1.weight"], second["conv1.weight"])
    # Another network of this shape goes the same way, one of another seed does not.
    again = draw_directions(Convolutional(seed=1), "gaussian", 5)
    assert all(torch.equal(first[name], again[0][name]) for name in first)
    assert not torch.equal(
        first["conv1.bias"], draw_directions(model, "gaussian", 6)[0]["conv1.bias"]
    )


def test_a_linear_network_has_the_losses_of_its_formula(linear, images, labels):
    result = cure_fast.analysis.landscape(
        linear, images, labels, points=5, span=0.4, directions="gaussian", attack="fgsm"
    )
    x = images.astype(np.float64).transpose(0, 3, 1, 2).reshape(24, -1) / 255
    weights = [p.detach().double().numpy() for p in linear.parameters()]
    ways = [
        [d.double().numpy() for d in way.values()] for way in draw_directions(linear, "gaussian", 0)
    ]
    assert {row["a"] for row in result.rows} == {-0.4, -0.2, 0, 0.2, 0.4}
    assert len(result.rows) == 25
    for row in result.rows:
        weight, bias = (
            w + row["a"] * d + row["b"] * e for w, d, e in zip(weights, *ways, strict=True)
        )
        logits = x @ weight.T + bias
        own = np.take_along_axis(logits, np.asarray(labels)[:, None], 1)[:, 0]
        expected = np.mean(np.log(np.exp(logits).sum(1)) - own)
        assert row["natural"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_images_of_each_point_are_attacked_there(linear, images, labels):
    more = {"points": 3, "attack": "fgsm"}
    once, each = (
        cure_fast.analysis.landscape(linear, images, labels, adversarial=kind, **more).rows
        for kind in ("once", "each")
    )
    assert once[4] == each[4]
    moved = Linear().eval()
    with movable(moved, draw_directions(moved, "filter", 0)) as move:
        move(-1.0, 1.0)
        row = next(row for row in each if (row["a"], row["b"]) == (-1, 1))
        expected = plain_loss(moved, attacked(moved, images, labels, "fgsm"), labels)
        assert row["adversarial"] == pytest.approx(expected, rel=1e-5)
        assert row["adversarial"] > once[each.index(row)]["adversarial"]


def test_weights_come_back_bit_for_bit(pictures):
    model = Convolutional().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cure_fast.analysis.landscape(model, pictures, np.arange(24) % 3, points=3, attack="fgsm")
    ways = draw_directions(model, "gaussian", 0)
    with pytest.raises(RuntimeError, match="in between"), movable(model, ways) as move:
        move(0.3, -0.7)
        assert not torch.equal(before["conv1.weight"], model.conv1.weight)
        raise RuntimeError("in between")
    assert model.training and model.bn1.training
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value), name


def test_networks_share_a_scale(linear, images, labels):
    models = {"one": linear, "two": Linear(seed=1).eval(), "three": Linear(seed=2).eval()}
    result = cure_fast.analysis.landscape(models, images, labels, points=3, attack="fgsm")
    surfaces = [axes for axes in result.figure().axes if hasattr(axes, "get_zlim")]
    assert len(surfaces) == 6 and len({axes.get_zlim() for axes in surfaces}) == 1
    with pytest.raises(InputError, match="1 to 3"):
        cure_fast.analysis.landscape({**models, "four": linear}, images, labels)
    with pytest.raises(InputError, match="--attack: expected fgsm"):
        cure_fast.analysis.landscape(linear, images, labels, attack="natural")
