"""Methods that need what none of the package does: trained guides, teachers, hooks."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from cure_fast.losses import cross_entropy, kl_divergence
from cure_fast.methods.pgd_at import PGD_AT, attack
from cure_fast.models import build_model

CLASSES = 10


def guide(run):
    """A further network whose weights take gradients, which the run's optimiser trains."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        network = build_model("resnet-small", num_classes=CLASSES, width=4)
    network.compute_dtype = run.model.compute_dtype
    return {"guide": network}


def guided_loss(run, batch):
    """Cross-entropy of the guide, whose logits the trained network follows (as in LBGAT)."""
    taught, logits_adv = run.networks["guide"](batch.x), run.model(batch.x_adv)
    natural_ce = cross_entropy(taught, batch.y).mean()
    apart = F.mse_loss(logits_adv, taught)
    return {"total": natural_ce + apart, "natural_ce": natural_ce, "apart": apart}


GUIDED = replace(PGD_AT, name="guided", networks=guide, loss=guided_loss)


def taught_loss(run, batch):
    """KL from each teacher to the trained network (as in KD+SWA)."""
    logits_adv = run.model(batch.x_adv)
    with torch.no_grad():
        taught = [teacher(batch.x_adv) for teacher in run.teachers.values()]
    total = sum(kl_divergence(logits, logits_adv).mean() for logits in taught)
    return {"total": total}


TAUGHT = replace(PGD_AT, name="taught", loss=taught_loss)


def derived_loss(run, batch):
    """Cross-entropy with the classifier one step up its own loss (as in RAT)."""
    linear = run.model.get_submodule(run.model.classifier_name)
    (grad,) = run.engine.derive(
        cross_entropy(run.model(batch.x_adv), batch.y).mean(), [linear.weight]
    )
    logits = run.model(batch.x_adv)
    # In place between the first way back and the rest of the loss.
    length = grad.norm().clamp_(min=1e-6)
    total = cross_entropy(logits, batch.y).mean() + (linear.weight * (grad / length)).sum().square()
    return {"total": total}


DERIVED = replace(PGD_AT, name="derived", loss=derived_loss)


def hooked_attack(run, batch):
    """PGD through a first layer that lets half of the gradient pass (as A&P drops some)."""

    def half(_layer, _inputs, out):
        return 0.5 * out + 0.5 * out.detach()

    first = run.model.get_submodule(run.model.stem_names[0])
    handle = first.register_forward_hook(half)
    try:
        return attack(run, batch)
    finally:
        handle.remove()


HOOKED = replace(PGD_AT, name="hooked", attack=hooked_attack)

SAMPLES = {method.name: method for method in (GUIDED, TAUGHT, DERIVED, HOOKED)}
