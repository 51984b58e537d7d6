"""HAT against its official loss, in double precision; what each network sees; its set-up."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import engine_runs as runs
import tiny_step
from cure_fast.methods import publish, select_method
from cure_fast.recipes import find_recipe
from cure_fast.step.train_step import train_step
from known_logits import Step


def helper(length):
    return lambda natural, adversarial: natural + length * (adversarial - natural)


def step(length=2.0):
    sees = {"model": ("natural", "adversarial", "helper"), "natural": ("adversarial",)}
    return Step(sees, helper=helper(length))


def official_loss(made, beta, gamma, robust_loss):
    """imrahulr/hat's hat_loss and at_hat_loss, from the logits on."""
    out_clean, out_adv, out_help = made.logits["model"].values()
    y_hr = made.logits["natural"]["adversarial"].argmax(dim=1)
    loss_clean = F.cross_entropy(out_clean, made.y, reduction="mean")
    if robust_loss == "kl":
        criterion_kl = nn.KLDivLoss(reduction="sum")
        kl = criterion_kl(F.log_softmax(out_adv, dim=1), F.softmax(out_clean, dim=1))
        loss_adv = (1 / len(made.y)) * kl
    else:
        loss_adv = F.cross_entropy(out_adv, made.y)
    loss_help = F.cross_entropy(out_help, y_hr, reduction="mean")
    return loss_clean + beta * loss_adv + gamma * loss_help


@pytest.mark.parametrize("robust_loss", ["kl", "ce"])
@pytest.mark.parametrize(("beta", "gamma"), [(2.5, 0.5), (1.0, 3.0), (0.0, 0.0)])
def test_loss_and_gradients_are_the_official_ones(beta, gamma, robust_loss):
    made = step()
    terms = made.terms("hat", beta=beta, gamma=gamma, robust_loss=robust_loss)
    made.assert_equal(terms["total"], official_loss(made, beta, gamma, robust_loss))
    # The label of the helper is the teacher's, which sees more than one class.
    assert (made.logits["natural"]["adversarial"].argmax(dim=1) != made.y).sum() > 20


def test_the_helper_is_not_clamped():
    made = step(7.0)
    assert made.images["helper"].min() < -1 and made.images["helper"].max() > 2
    assert made.terms("hat", helper_length=7.0)["helper_ce"].isfinite()


def test_a_length_of_one_sees_the_adversarial_images():
    """The very same images: natural + 1 * (adversarial - natural) rounds in its last bit."""
    run = tiny_step.tiny_run("hat", helper_length=1.0)
    batch = run.loader.batch(0)
    batch = batch.attacked(run.method.attack(run, batch))
    seen, model = [], run.model
    run.model = lambda x: seen.append(x) or model(x)
    run.method.loss(run, batch)
    natural, adversarial, helped = seen
    assert torch.equal(natural, batch.x) and torch.equal(adversarial, batch.x_adv)
    torch.testing.assert_close(helped, batch.x_adv, rtol=0, atol=1e-15)
    assert (batch.x_adv - batch.x).abs().max() > 0.05


def test_three_passes_move_the_statistics_one_by_one():
    run = tiny_step.tiny_run("hat", model=tiny_step.Normalised())
    twin, batch = copy.deepcopy(run.model), run.loader.batch(0)
    batch = batch.attacked(run.method.attack(run, batch))
    before = int(run.model.norm.num_batches_tracked)
    twin.load_state_dict(run.model.state_dict())
    run.method.loss(run, batch)
    for x in (batch.x, batch.x_adv, helper(2.0)(batch.x, batch.x_adv)):
        twin(x)
    assert int(run.model.norm.num_batches_tracked) == before + 3
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], msg=name)


@pytest.mark.parametrize(("robust_loss", "name"), [("kl", "trades"), ("ce", "pgd_at")])
def test_the_attack_raises_the_robust_term(robust_loss, name):
    torch.manual_seed(8)
    model = tiny_step.Tiny()
    ours = tiny_step.tiny_run("hat", model=copy.deepcopy(model), robust_loss=robust_loss)
    base = tiny_step.tiny_run(name, model=copy.deepcopy(model), attack={"clamp_start": False})
    assert not ours.config.attack.clamp_start
    made = [run.method.attack(run, run.loader.batch(0)) for run in (ours, base)]
    assert torch.equal(*made)


def test_a_step_trains_the_model_alone():
    run = tiny_step.tiny_run("hat", model=tiny_step.Normalised())
    teacher = run.teachers["natural"]
    before = copy.deepcopy((teacher.state_dict(), run.model.state_dict()))
    for batch in run.loader:
        train_step(run, batch)
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in before[0].items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not torch.equal(before[1]["conv1.weight"], run.model.conv1.weight)


def test_the_fast_engine_takes_its_schedule():
    optim = {"schedule": "onecycle-cosine", "nesterov": True, "lr": 0.21}
    both = runs.pair("hat", data=runs.batches(2), optim=optim)
    runs.assert_steps_equal(both, 4)
    assert both.fast.engine.name == "fast"


def test_the_published_set_up():
    config = select_method(find_recipe("cifar10-resnet18"), "hat")
    config = publish(config)
    optim = config.optim
    assert (optim.schedule, optim.epochs, optim.lr) == ("onecycle-cosine", 50, 0.21)
    assert (optim.nesterov, optim.weight_decay, optim.momentum) == (True, 5e-4, 0.9)
    attack = config.attack
    assert (attack.eps, attack.step_length, attack.start) == (8 / 255, 2 / 255, "normal")
    assert not attack.clamp_start
    settings = config.settings
    assert (settings.beta, settings.gamma, settings.helper_length) == (2.5, 0.5, 2.0)
