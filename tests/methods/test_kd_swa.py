"""KD+SWA against its official loss, in double precision, and its set-up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cure_fast.errors import InputError
from cure_fast.methods import labels, publish, select_method
from cure_fast.methods.kd_swa import KdSettings
from cure_fast.policies.swa import SWA
from cure_fast.recipes import find_recipe
from cure_fast.training.schedules import lr_at
from known_logits import Step

SEES = {"model": ("adversarial",), "natural": ("adversarial",), "robust": ("adversarial",)}


def official_kd(scores, target_scores, temperature):
    """VITA-Group/Alleviate-Robust-Overfitting's loss_fn_kd: a cross-entropy."""
    log_scores = F.log_softmax(scores / temperature, dim=1)
    targets = F.softmax(target_scores / temperature, dim=1)
    return (-(targets * log_scores)).sum(dim=1).mean() * temperature**2


def official_loss(made, natural, robust, temperature):
    output_adv, target_score1, target_score2 = (
        made.logits[network]["adversarial"] for network in SEES
    )
    ce = F.cross_entropy(output_adv, made.y)
    kd1, kd2 = (official_kd(output_adv, t, temperature) for t in (target_score1, target_score2))
    return ce * (1 - natural - robust) + kd1 * natural + kd2 * robust


@pytest.mark.parametrize(
    ("natural", "robust", "temperature"), [(0.1, 0.6, 2.0), (0.5, 0.25, 1.0), (0.0, 0.0, 2.0)]
)
def test_loss_and_gradients_are_the_official_ones(natural, robust, temperature):
    made = Step(SEES)
    settings = {"natural_weight": natural, "robust_weight": robust, "temperature": temperature}
    total = made.terms("kd_swa", **settings)["total"]
    made.assert_equal(total, official_loss(made, natural, robust, temperature))


def test_it_is_no_kl():
    """A student that answers as its teacher does has a loss of the teacher's entropy."""
    made = Step(SEES)
    made.logits["robust"] = made.logits["model"]
    found = made.terms("kd_swa")["robust_kd"]
    p = (made.logits["model"]["adversarial"] / 2).softmax(dim=1)
    torch.testing.assert_close(found, 4 * -(p * p.log()).sum(dim=1).mean())
    assert float(found.detach()) > 1


def test_the_default_weights_are_the_official_ones():
    settings = KdSettings()
    assert 1 - settings.natural_weight - settings.robust_weight == pytest.approx(0.3)
    with pytest.raises(InputError, match=r"--robust-weight: expected at most 1 less"):
        KdSettings(natural_weight=0.6, robust_weight=0.5)


def test_it_brings_swa_and_goes_without():
    config = select_method(find_recipe("quickstart"), "kd_swa")
    assert config.policies == {"swa": SWA.settings}
    assert labels("kd_swa", config.policies) == "KD + SWA" and labels("kd_swa") == "KD"
    chosen = replace(SWA.settings, swa_start=0.5)
    again = select_method(replace(config, policies={"swa": chosen}), "kd_swa")
    assert again.policies == {"swa": chosen}


def test_the_published_set_up():
    config = publish(select_method(find_recipe("cifar10-resnet18"), "kd_swa"))
    rates = {epoch: lr_at(config.optim, epoch / 200) for epoch in (0, 49, 50, 149, 150, 199)}
    expected = {0: 0.1, 49: 0.1, 50: 0.01, 149: 0.01, 150: 1e-3, 199: 1e-3}
    assert rates == pytest.approx(expected)
    assert (config.optim.epochs, config.optim.weight_decay) == (200, 5e-4)
    assert (config.attack.start, config.attack.attack_mode) == ("uniform", "train")
    assert config.data.val_images == 5000 and config.data.crop_mode == "zero"
    assert config.model.normalize == "dataset" and config.policies == {"swa": SWA.settings}
    digits = find_recipe("quickstart")
    assert publish(select_method(digits, "kd_swa")).data == digits.data
