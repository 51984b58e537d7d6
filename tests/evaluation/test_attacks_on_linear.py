"""Attacks against models whose best perturbation is known in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cure_fast.attacks import pgd, start_point
from cure_fast.config.attack_names import parse_attack
from cure_fast.evaluation.evaluate import adversarial_examples, evaluate
from cure_fast.evaluation.measurement import Measurement, Round, start_in_ball, uniform_start
from cure_fast.evaluation.trust import Guard

pytestmark = pytest.mark.usefixtures("one_thread")

CPU: dict[str, Any] = {"device": "cpu", "seed": 0}


@settings(
    deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(seed=142, eps=0.296875)
@given(seed=st.integers(0, 1000), eps=st.floats(0.001, 0.3))
def test_two_classes_reach_the_optimum_exactly(linear, data, seed, eps):
    model = linear(2, seed)
    with torch.no_grad():  # at a margin of 17 the float32 gradient of the cross-entropy is cut off
        model.weight.mul_(0.5)
        model.bias.mul_(0.5)
    images, labels = data(model, 32, wrong=4)
    expected = int(model.robust(images, labels, eps).sum())
    # 25 steps of eps / 10 cross the ball, so every start ends in the best corner.
    results = evaluate(
        model,
        images,
        labels,
        num_classes=2,
        attacks=["natural", "fgsm", "pgd25", "cw25"],
        eps=eps,
        step_size=None,
        batch_size=5,
        **CPU,
    )
    assert results["natural"].correct == 28
    assert {name: r.correct for name, r in results.items() if name != "natural"} == {
        "fgsm": expected,
        "pgd25": expected,
        "cw25": expected,
    }


def test_optimum_breaks_some_and_not_all_images(linear, data):
    """The comparison above is not one of zeros with zeros."""
    model = linear(2, 3)
    images, labels = data(model, 32)
    counts = [int(model.robust(images, labels, eps).sum()) for eps in (0.0, 0.04, 0.08, 0.3)]
    assert counts[0] == 32 > counts[1] > counts[2] > counts[3]


def test_fgsm_is_one_step_of_pgd_that_crosses_the_ball(linear, data):
    model = linear(2, 5)
    images, labels = data(model, 16)
    eps = 0.05
    found = adversarial_examples(model, images, labels, eps=eps, step_size=2 * eps, steps=1, **CPU)
    x = images.numpy().astype(np.float64) / 255
    slope = (model.weight[1] - model.weight[0]).detach().view(3, 4, 4).permute(1, 2, 0).numpy()
    towards = np.where(labels.numpy() == 0, 1, -1)[:, None, None, None]
    corner = np.clip(x + eps * np.sign(slope) * towards, 0, 1)
    np.testing.assert_allclose(found["adversarial"], corner, atol=1e-6)
    results = evaluate(
        model,
        images,
        labels,
        num_classes=2,
        attacks=["fgsm", "pgd1"],
        eps=eps,
        step_size=2 * eps,
        batch_size=16,
        **CPU,
    )
    assert results["fgsm"].correct == results["pgd1"].correct
    assert results["pgd1"].correct == int((found["adversarial_prediction"] == labels.numpy()).sum())


def test_autoattack_finds_the_optimum_over_all_classes(linear, data, short_square):
    model = linear(4, 1)
    images, labels = data(model, 24, wrong=3)
    eps = 0.03
    expected = model.robust(images, labels, eps)
    assert 3 < int(expected.sum()) < 18
    result = evaluate(
        model,
        images,
        labels,
        num_classes=4,
        attacks=["aa"],
        eps=eps,
        step_size=None,
        batch_size=24,
        **CPU,
    )["aa"]
    assert result.correct == int(expected.sum())
    assert result.reliable and result.warnings == ()
    assert list(result.settings["robust_after"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]


def grey(model, count=24, side=4):
    """Return images far from black and white, and what the linear model takes them for."""
    source = torch.Generator().manual_seed(2)
    shape = (count, side, side, 3)
    images = torch.randint(96, 160, shape, dtype=torch.uint8, generator=source)
    logits = model(images.permute(0, 3, 1, 2) / 255)
    return images, logits.argmax(dim=1)


@settings(
    deadline=None, max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(seed=0, rank=4)
@given(seed=st.integers(0, 1000), rank=st.integers(0, 22))
def test_two_classes_reach_the_optimum_in_l2(linear, seed, rank):
    """The nearest image of the other class lies along the difference of the weights.

    Each step of eps / 10 turns the perturbation there by a tenth of what is left.
    """
    model = linear(2, seed)
    with torch.no_grad():
        model.weight.mul_(0.5)
    images, labels = grey(model)
    distances = model.l2_distances(images, labels).sort().values
    eps = min(float(distances[rank] + distances[rank + 1]) / 2, 0.35)  # Inside of the box.
    expected = int((distances > eps).sum())
    results = evaluate(
        model,
        images,
        labels,
        num_classes=2,
        attacks=["fgsm", "pgd100", "cw100"],
        eps=eps,
        norm="l2",
        step_size=None,
        batch_size=24,
        **CPU,
    )
    assert {r.correct for r in results.values()} == {expected}
    assert all(r.settings["norm"] == "L2" and not r.warnings for r in results.values())


def test_autoattack_finds_the_optimum_over_all_classes_in_l2(linear, short_square):
    model = linear(4, 1, side=6)
    images, labels = grey(model, side=6)
    distances = model.l2_distances(images, labels).sort().values
    eps = float(distances[7] + distances[8]) / 2
    result = evaluate(
        model,
        images,
        labels,
        num_classes=4,
        attacks=["aa"],
        eps=eps,
        norm="l2",
        step_size=None,
        batch_size=24,
        **CPU,
    )["aa"]
    assert result.correct == 16 and result.settings["norm"] == "L2"


@settings(deadline=None, max_examples=20)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    count=st.integers(1, 4),
    eps=st.floats(1e-3, 3),
    steps=st.integers(0, 3),
    start=st.sampled_from(["uniform", "normal", "zero"]),
    each=st.booleans(),
)
def test_attacks_stay_in_the_l2_ball_and_the_box(shape, count, eps, steps, start, each):
    source = torch.Generator().manual_seed(0)
    x = torch.rand(count, *shape, generator=source)
    radius = torch.linspace(0.5, 1, count) * eps if each else torch.full((count,), eps)
    x_adv = pgd(
        torch.nn.Flatten(),
        x,
        lambda z: (z**2).sum(),
        eps=radius if each else eps,
        step_size=eps,
        steps=steps,
        norm="l2",
        start=start,
        generator=source,
    )
    assert ((x_adv - x).flatten(1).norm(dim=1) <= radius * (1 + 1e-5) + 1e-6).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    if steps:
        assert not torch.equal(x_adv, x)


def test_starts_fill_the_l2_ball_evenly():
    """The length of a uniform point in a ball of d dimensions is u**(1/d)."""
    d, count = 12, 2000
    drawn = start_in_ball((3, 2, 2), torch.arange(count), "pgd", 7).flatten(1)
    grey = torch.full((count, 3, 2, 2), 0.5)
    trained = start_point(
        grey,
        eps=0.4,
        start="uniform",
        norm="l2",
        generator=torch.Generator().manual_seed(3),
    )
    for points in (drawn, ((trained - grey) / 0.4).flatten(1)):
        share = points.norm(dim=1) ** d
        # The standard error of the mean of 2,000 uniform numbers is 0.0065.
        assert float(share.mean()) == pytest.approx(0.5, abs=0.03)
        assert float(share.max()) <= 1 + 1e-4
        assert points.mean(dim=0).abs().max() < 0.03
    alone = start_in_ball((3, 2, 2), torch.tensor([5]), "pgd", 7).flatten(1)
    assert torch.equal(alone[0], drawn[5])


class Crowd(torch.nn.Module):
    """One rival class that the second pixel lowers a little, and 30 far classes that it raises."""

    def forward(self, x: Tensor) -> Tensor:
        rival, crowd = x[:, 0, 0, :1], x[:, 1, 0, :1]
        return torch.cat([1 + 0 * rival, rival - 0.1 * crowd, (0.3 * crowd).expand(-1, 30)], dim=1)


@pytest.mark.parametrize(("attack", "second_pixel"), [("cw15", -0.1), ("pgd15", 0.1)])
def test_cw_climbs_the_margin_and_pgd_the_cross_entropy(attack, second_pixel):
    task = Measurement(
        guard=Guard(Crowd(), num_classes=32),
        images=torch.full((1, 4, 4, 3), 128, dtype=torch.uint8),
        labels=torch.zeros(1, dtype=torch.int64),
        eps=0.1,
        step_size=0.02,
        batch_size=1,
        device=torch.device("cpu"),
        seed=0,
    )
    x, y = task.load(torch.arange(1))
    moved = task.perturb(parse_attack(attack), x, y, torch.arange(1), Round()) - x
    assert float(moved[0, 0, 0, 0]) == pytest.approx(0.1, abs=1e-6)
    assert float(moved[0, 1, 0, 0]) == pytest.approx(second_pixel, abs=1e-6)


@pytest.mark.parametrize("attack", ["fgsm", "pgd5", "cw5", "aa"])
def test_eps_zero_is_the_natural_accuracy(linear, data, attack, short_autoattack):
    model = linear(4, 2)
    images, labels = data(model, 12, wrong=5)
    results = evaluate(
        model,
        images,
        labels,
        num_classes=4,
        attacks=["natural", attack],
        eps=0.0,
        step_size=None,
        batch_size=12,
        **CPU,
    )
    assert results["natural"].correct == results[attack].correct == 7


@pytest.mark.parametrize("attack", ["fgsm", "pgd10", "cw10"])
def test_batch_size_does_not_matter(conv_net, data, attack):
    model = conv_net()
    images, labels = data(model, 40, wrong=6)
    counts = {
        size: evaluate(
            model,
            images,
            labels,
            num_classes=10,
            attacks=[attack],
            eps=0.06,
            step_size=None,
            batch_size=size,
            **CPU,
        )[attack].correct
        for size in (1, 7, 128)
    }
    assert len(set(counts.values())) == 1, counts
    assert 0 < counts[1] < 34


@settings(deadline=None, max_examples=30)
@given(
    indices=st.lists(st.integers(0, 2**31), min_size=1, max_size=6, unique=True),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_start_belongs_to_its_image(indices, seed):
    together = uniform_start((3, 2, 2), torch.tensor(indices), "pgd", seed)
    alone = [uniform_start((3, 2, 2), torch.tensor([i]), "pgd", seed) for i in indices]
    assert torch.equal(together, torch.cat(alone))
    assert together.dtype == torch.float32 and bool((together.abs() <= 1).all())
    assert len({tuple(row.flatten().tolist()) for row in together}) == len(indices)
    assert not torch.equal(together, uniform_start((3, 2, 2), torch.tensor(indices), "cw", seed))


def test_starts_fill_the_ball_evenly():
    draws = uniform_start((3, 4, 4), torch.arange(400), "pgd", 7).flatten()
    # 19,200 draws: the standard error of the mean is 0.0042, that of the variance 0.0022.
    assert float(draws.mean()) == pytest.approx(0, abs=0.017)
    assert float(draws.var()) == pytest.approx(1 / 3, abs=0.009)
    assert float(draws.min()) < -0.999 and float(draws.max()) > 0.999


def test_examples_match_the_evaluation(conv_net, data):
    model = conv_net()
    images, labels = data(model, 20)
    found = adversarial_examples(model, images, labels, eps=0.06, step_size=0.01, steps=10, **CPU)
    result = evaluate(
        model,
        images,
        labels,
        num_classes=10,
        attacks=["pgd10"],
        eps=0.06,
        step_size=0.01,
        batch_size=3,
        **CPU,
    )["pgd10"]
    right = found["adversarial_prediction"] == labels.numpy()
    assert int(right.sum()) == result.correct < 20
    with torch.no_grad():
        probabilities = model.eval()(images.permute(0, 3, 1, 2) / 255).softmax(1).numpy()
    expected = probabilities[range(20), found["natural_prediction"]]
    assert found["natural_confidence"] == pytest.approx(expected, rel=1e-4)
    assert ((found["adversarial_confidence"] > 0.1) & (found["adversarial_confidence"] < 1)).all()
    natural = images.numpy().astype(np.float32) / 255
    assert found["adversarial"].dtype == np.float32 and found["adversarial"].shape == natural.shape
    assert 0.05 < np.abs(found["adversarial"] - natural).max() <= 0.06 + 1e-6
    assert found["adversarial"].min() >= 0 and found["adversarial"].max() <= 1
    assert (found["natural_prediction"] == labels.numpy()).all()
    # Stored images scored again, as floats, give the same count.
    again = evaluate(
        model,
        torch.from_numpy(found["adversarial"]),
        labels,
        num_classes=10,
        attacks=["natural"],
        eps=0.06,
        step_size=None,
        batch_size=1,
        **CPU,
    )["natural"]
    assert again.correct == result.correct
