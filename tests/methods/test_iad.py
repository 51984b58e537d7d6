"""IAD-I and IAD-II against their official losses, in double precision, and before they begin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny_step
from cure_fast.methods import METHODS, publish, select_method
from cure_fast.recipes import find_recipe
from known_logits import Step

kl_loss = nn.KLDivLoss(reduction="none")


def kl(target, outputs):
    """Per image, as the official code sums it."""
    return kl_loss(F.log_softmax(outputs, dim=1), F.softmax(target, dim=1)).sum(dim=1)


def official_trust(guide, y, beta):
    """The loop over images, without gradients."""
    found = torch.ones(len(y), dtype=guide.dtype)
    for pp in range(len(y)):
        found[pp] = F.softmax(guide, dim=1)[pp][y[pp].item()].pow(beta).item()
    return found


def step_one(active):
    robust = ("natural", "adversarial") if active else ("natural",)
    return Step({"model": ("adversarial", "natural"), "robust": robust})


def official_one(made, alpha, temp, beta, weight_teacher):
    """ZFancy/IAD's IAD-I.py once it has begun."""
    outputs, basic_outputs = made.logits["model"].values()
    teacher_outputs, guide = made.logits["robust"].values()
    trust, count = official_trust(guide, made.y, beta), len(made.y)
    taught = kl(teacher_outputs / temp, outputs / temp)
    taught = taught.mul(trust) if weight_teacher else taught
    loss = alpha * temp * temp * (1 / count) * torch.sum(taught)
    loss = loss + alpha * (1 / count) * torch.sum(kl(basic_outputs, outputs).mul(1 - trust))
    return loss + (1.0 - alpha) * F.cross_entropy(basic_outputs, made.y)


@pytest.mark.parametrize("weight_teacher", [False, True])
@pytest.mark.parametrize(
    ("alpha", "temperature", "beta"), [(1.0, 1.0, 0.1), (0.6, 1.0, 2.0), (0.9, 4.0, 0.1)]
)
def test_the_first_loss_is_the_official_one(alpha, temperature, beta, weight_teacher):
    made = step_one(active=True)
    settings = {"alpha": alpha, "temperature": temperature, "beta": beta}
    terms = made.terms("iad", epoch=1, iad_weight_teacher=weight_teacher, **settings)
    made.assert_equal(terms["total"], official_one(made, alpha, temperature, beta, weight_teacher))
    # Both branches of the student's own KL have a gradient.
    assert all(grad.abs().max() > 1e-5 for grad in made.gradients(terms["own_kl"]))


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_before_it_begins_the_first_is_ard(alpha):
    made = step_one(active=False)
    settings = {"alpha": alpha, "temperature": 1.0, "kl_mean": "images"}
    ours, base = (made.terms(name, epoch=0, **settings) for name in ("iad", "ard"))
    assert torch.equal(ours["total"], base["total"])
    for a, b in zip(made.gradients(ours["total"]), made.gradients(base["total"]), strict=True):
        assert torch.equal(a, b)


def step_two(active):
    model = ("adversarial", "natural") if active else ("adversarial",)
    return Step({"model": model, "robust": ("adversarial",), "natural": ("adversarial",)})


def official_two(made, alpha1, alpha2, temp, beta):
    """ZFancy/IAD's IAD-II.py; before it begins the student does not see natural images."""
    outputs, *basic_outputs = made.logits["model"].values()
    teacher_outputs = made.logits["robust"]["adversarial"]
    st_outputs = made.logits["natural"]["adversarial"]
    count = len(made.y)
    robust = (1 / count) * torch.sum(kl(teacher_outputs / temp, outputs / temp))
    if basic_outputs:
        trust = official_trust(teacher_outputs, made.y, beta)
        robust = (1 / count) * torch.sum(kl(teacher_outputs / temp, outputs / temp).mul(trust))
        own = kl(basic_outputs[0], outputs).mul(1 - trust)
        robust = robust + (1 / count) * torch.sum(own)
    natural = (1 / count) * torch.sum(kl(st_outputs / temp, outputs / temp))
    loss = (1 - alpha1 - alpha2) * F.cross_entropy(outputs, made.y)
    return loss + alpha1 * temp * temp * robust + alpha2 * temp * temp * natural


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize(("alpha1", "alpha2", "temp"), [(0.5, 0.25, 1.0), (0.2, 0.7, 3.0)])
def test_the_second_loss_is_the_official_one(active, alpha1, alpha2, temp):
    made = step_two(active)
    settings = {"robust_weight": alpha1, "natural_weight": alpha2, "temperature": temp}
    terms = made.terms("iad2", epoch=int(active), **settings)
    made.assert_equal(terms["total"], official_two(made, alpha1, alpha2, temp, 0.1))


def test_before_it_begins_the_second_has_the_gradients_of_two_taught_by_cross_entropy():
    made = step_two(active=False)
    settings = {"robust_weight": 0.5, "natural_weight": 0.25, "temperature": 1.0}
    ours, base = (made.terms(name, **settings)["total"] for name in ("iad2", "kd_swa"))
    torch.testing.assert_close(made.gradients(ours), made.gradients(base))
    assert not torch.allclose(ours, base)


def test_without_an_exponent_the_teacher_is_trusted_always():
    made = step_one(active=True)
    terms = made.terms("iad", epoch=1, beta=0.0)
    assert float(terms["own_kl"].detach()) == 0 and torch.equal(terms["total"], terms["kl"])


def test_a_teacher_that_is_certainly_wrong_gives_finite_gradients():
    made = step_one(active=True)
    guide = torch.full((len(made.y), 5), 0.0, dtype=torch.float64)
    guide[range(len(made.y)), made.y] = -2000.0
    made.logits["robust"]["adversarial"] = guide
    terms = made.terms("iad", epoch=1)
    student = [z.detach() for z in made.logits["model"].values()]
    torch.testing.assert_close(terms["own_kl"], kl(student[1], student[0]).mean())
    assert all(grad.isfinite().all() for grad in made.gradients(terms["total"]))


@pytest.mark.parametrize(("method", "begin"), [("iad", 60), ("iad2", 40)])
def test_it_begins_in_the_official_epoch(method, begin):
    run = tiny_step.tiny_run(method)
    run.config = publish(select_method(find_recipe("cifar10-resnet18"), method))
    active = []
    for epoch in range(200):
        run.epoch = epoch
        active.append(METHODS[method].phase(run))
    assert run.config.optim.epochs == 200 and active == [epoch >= begin for epoch in range(200)]
