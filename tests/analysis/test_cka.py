"""``cka`` against a transcription into NumPy, and against what is known of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import cure_fast
from cure_fast.analysis.cka import LABELS, Features, alignment, hsic, kernels
from cure_fast.errors import InputError
from cure_fast.evaluation.evaluate import adversarial_images
from small import Convolutional


@pytest.fixture
def pictures():
    return np.random.default_rng(3).integers(0, 256, (24, 8, 8, 3), np.uint8)


LABELS_OF_PICTURES = np.arange(24) % 3


def plain_hsic(k, other):
    """METHODS 3.8 as it is written, for two kernels [N, N] with zero diagonals."""
    n, one = len(k), np.ones(len(k))
    whole = (one @ k @ one) * (one @ other @ one) / ((n - 1) * (n - 2))
    cross = one @ k @ other @ one
    return (np.trace(k @ other) + whole - 2 / (n - 2) * cross) / (n * (n - 3))


def plain_kernel(features):
    k = features.astype(np.float64) @ features.astype(np.float64).T
    np.fill_diagonal(k, 0)
    return k


def similarity(*features):
    """CKA of features [N, D] with the first of them."""
    found = torch.stack([(each @ each.T).double() for each in features])
    own = hsic(found, found)
    return alignment([(own, own.diagonal(), own.diagonal())])[0]


def test_hsic_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 9, 5)) + 1, rng.normal(size=(3, 9, 4)) - 2
    found = hsic(*(torch.from_numpy(f @ f.transpose(0, 2, 1)) for f in (first, second)))
    expected = [[plain_hsic(plain_kernel(f), plain_kernel(g)) for g in second] for f in first]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_alike_is_1_rotated_too_and_independent_0():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(200, 20, generator=draw, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(20, 20, generator=draw, dtype=torch.float64))
    other = torch.randn(200, 20, generator=draw, dtype=torch.float64)
    alike, moved, independent, constant = similarity(
        features, 3 * features @ rotation + 1, other, torch.zeros(200, 20)
    )
    assert alike == pytest.approx(1, abs=1e-12) and moved == pytest.approx(1, abs=1e-9)
    # The biased estimate is near 20 / 220 here.
    assert abs(independent) < 0.03
    assert constant is None


def test_calls_are_seen_in_their_order_and_before_they_are_written_over(pictures):
    network = Convolutional().eval()
    result = cure_fast.analysis.cka(network, pictures, LABELS_OF_PICTURES, attack="fgsm")
    layers = ["conv1", "bn1", "relu", "conv2", "relu_2", "mean", "linear"]
    assert result.numbers["layers"] == {"Convolutional": layers}
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        second = network.conv2(network.relu(network.bn1(network.conv1(x))))
    inplace = nn.Sequential(network.conv2, nn.ReLU(inplace=True))
    for model, images, names, expected in (
        (network, x, ["relu_2"], [torch.relu(second)]),
        (inplace, network.conv1(x).relu().detach(), ["0"], None),
    ):
        found = kernels(model, images, names)
        with torch.no_grad():
            values = expected or [network.conv2(images)]
        flat = values[0].flatten(1) - values[0].flatten(1).mean(0)
        torch.testing.assert_close(found[0].float(), flat @ flat.T, rtol=1e-4, atol=1e-5)


def test_a_branch_is_added_and_an_unknown_call_is_read_at_its_module():
    class Own(nn.Linear):
        def forward(self, input):
            return input @ self.weight.T

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = Own(5, 5)

        def forward(self, x):
            x = x + self.own(x).relu_()
            return x.add(1) + torch.ones(5)

    names = []
    block = Block()
    with Features(block, 4, lambda name, _: names.append(name)) as watching, torch.no_grad():
        block(torch.rand(4, 5))
    assert names == ["own", "relu", "add"] and watching.by_module == ["own"]
    assert not block._forward_hooks and not block.own._forward_pre_hooks


def test_the_map_is_that_of_numpy_over_batches(pictures):
    network = Convolutional().eval()
    layers = ["conv1", "relu", "linear"]
    result = cure_fast.analysis.cka(
        network, pictures, LABELS_OF_PICTURES, layers=layers, attack="pgd5", batch=8
    )
    sums = np.zeros((3, 3, 3))
    for part in np.split(np.arange(24), 3):
        images = torch.from_numpy(pictures[part])
        attacked = adversarial_images(
            network,
            images,
            torch.from_numpy(LABELS_OF_PICTURES[part]),
            attack="pgd5",
            eps=8 / 255,
            step_size=None,
            batch_size=8,
            device="cpu",
            seed=0,
        )
        kinds = []
        for x in (images.permute(0, 3, 1, 2).float() / 255, attacked):
            with torch.no_grad():
                first = network.conv1(x)
                each = (first, network.bn1(first).relu(), network(x))
            kinds.append([plain_kernel(f.flatten(1).numpy()) for f in each])
        for place, (rows, columns) in enumerate(((0, 1), (0, 0), (1, 1))):
            sums[place] += [[plain_hsic(k, m) for m in kinds[columns]] for k in kinds[rows]]
    expected = sums[0] / np.sqrt(np.outer(np.diag(sums[1]), np.diag(sums[2])))
    assert result.numbers["batches"] == [8, 8, 8]
    for row in result.rows:
        place = layers.index(row["natural"]), layers.index(row["adversarial"])
        assert row["cka"] == pytest.approx(expected[place], abs=1e-4)
    assert [row["natural"] == row["adversarial"] for row in result.rows] == [True] * 3 + [False] * 6


def test_the_network_is_left_as_it_was(pictures):
    network = Convolutional().train()
    network.bn1.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    cure_fast.analysis.cka(network, pictures, LABELS_OF_PICTURES, attack="fgsm")
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"layers": ["conv9"]}, "--layers: .* conv1, bn1, .* got 'conv9'. Perhaps you meant conv"),
        ({"batch": 3}, "--batch: expected a number at least 4"),
        ({"batch": 4, "count": 7}, "--limit: expected images of which each batch has 4 or more"),
        ({"count": 3}, "--limit: expected"),
        ({"attack": "aa"}, "--attack: expected fgsm, pgdK or cwK, got 'aa'"),
        ({"attack": "pgd9-t"}, "--attack: expected fgsm, pgdK or cwK"),
        ({"layers": []}, "--layers: expected a name"),
    ],
)
def test_what_does_not_fit_is_a_line(settings, told, pictures, convolutional):
    count = settings.pop("count", 24)
    with pytest.raises(InputError, match=told) as error:
        cure_fast.analysis.cka(
            convolutional, pictures[:count], LABELS_OF_PICTURES[:count], **settings
        )
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_network_outside_of_python_is_refused(pictures):
    scripted = torch.jit.trace(Convolutional().eval(), torch.rand(2, 3, 8, 8))
    with pytest.raises(InputError, match="layers can be seen"):
        cure_fast.analysis.cka(scripted, pictures, LABELS_OF_PICTURES, attack="fgsm")


def test_maps_have_few_labels_and_one_scale(pictures):
    deep = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(40)), nn.Flatten(), nn.Linear(192, 3))
    models = {"deep": deep.eval(), "small": Convolutional().eval()}
    result = cure_fast.analysis.cka(models, pictures, LABELS_OF_PICTURES, attack="fgsm")
    maps = [axes for axes in result.figure().axes if axes.images]
    assert [axes.get_title() for axes in maps] == ["deep", "small"]
    for axes in maps:
        assert len(axes.get_xticklabels()) <= LABELS
        assert axes.images[0].get_clim() == (0, 1)
