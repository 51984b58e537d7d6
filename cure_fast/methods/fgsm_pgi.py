"""FGSM-PGI: one step from the last epoch's perturbation (Jia et al., ECCV 2022, arXiv 2207.08859).

L = CE(x', t) + weight * MSE(z(x'), z(x0)), gradient through both logits, with smoothed targets t.
Each training image has a memory: x0 = x + its prior perturbation, and x' is one step of eps from
there up CE(., t). The next epoch's prior is such a step too, along the momentum
m <- g / mean|g| + decay * m of the gradients g. Every few epochs priors become random corners of
the ball anew, and momenta zero. The paper calls this FGSM-MEP, and FGSM-EP without momentum.

Official code: jiaxiaojunQAQ/FGSM-PGI. Differences: it divides g by the norm of the whole batch's,
the paper by that of the image's, as here. It has the gradient of x0's pass and the logits for the
MSE of one pass, where here the loss passes x0 anew; in ``--attack-mode train`` BatchNorm's
statistics so see x0 twice. The memory is in half precision: 0.6 GB for CIFAR-10, in each
checkpoint.

``--step-size`` and ``--start`` do not concern the training's attack.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.config import Config
from cure_fast.config.checks import Count, Share, Weight
from cure_fast.methods.fgsm_rs import FgsmSettings, check_signs, single_step
from cure_fast.methods.trades import unclamped_start
from cure_fast.step.method import Method, SetUp
from cure_fast.step.policy import Policy
from cure_fast.step.run import Run, Terms


class PgiSettings(FgsmSettings):
    """FGSM-PGI."""

    fgsm_step: Weight = 1.0
    """Length of the step as a multiple of --eps, 0 or more."""
    pgi_weight: Weight = 10.0
    """Weight of the distance between the logits of start and step, 0 or more."""
    pgi_decay: Share = 0.3
    """Share of an image's momentum that stays in each epoch, 0 to 1; 0 is FGSM-EP."""
    pgi_true: Share = 0.6
    """Target of the true class, 0 to 1; the others have equal parts of the rest."""
    pgi_reset: Count = 40
    """Epochs after which priors are drawn anew, 1 or more (CIFAR-10: 40, CIFAR-100: 10)."""


class Prior(Policy):
    """Remembers perturbation and momentum of each training image."""

    moves_weights = False

    def __init__(self, run: Run) -> None:
        super().__init__()
        shape = (run.loader.set_size, *run.loader.image_shape)
        self.state = {
            "prior": torch.empty(shape, dtype=torch.float16, device=run.device),
            # Of any size relative to its mean, which is beyond float16.
            "momentum": torch.empty(shape, dtype=torch.bfloat16, device=run.device),
        }
        self.draw(run, 0)

    def draw(self, run: Run, epoch: int) -> None:
        """Begin ``epoch`` with random corners of the ball, and no momentum."""
        prior, eps = self.state["prior"], run.config.attack.eps
        corners = np.random.default_rng([run.config.run.seed, epoch])
        signs = corners.integers(2, size=tuple(prior.shape), dtype=np.int8) * 2 - 1
        prior.copy_(torch.from_numpy(signs)).mul_(min(1.0, run.settings.fgsm_step) * eps)
        self.state["momentum"].zero_()

    def recall(self, name: str, batch: Batch) -> Tensor:
        """Return what is remembered of the batch's images, in their type and layout."""
        return torch.empty_like(batch.x).copy_(self.state[name][batch.index])

    def on_step(self, run: Run, batch: Batch) -> None:
        """Remember what the attack noted, unless the step moves nothing."""
        for name, memory in self.state.items():
            new, skip = batch.notes[name].to(memory.dtype), run.engine.skip
            kept = new if skip is None else torch.where(skip, memory[batch.index], new)
            memory.index_copy_(0, batch.index, kept)

    def on_epoch_end(self, run: Run) -> None:
        """Draw priors anew, where the next epoch begins so."""
        if (run.epoch + 1) % run.settings.pgi_reset == 0:
            self.draw(run, run.epoch + 1)


def smoothed(logits: Tensor, y: Tensor, true: float) -> Tensor:
    """Return the cross-entropy [N] to targets that give the label ``true``, the others the rest."""
    log_p = F.log_softmax(logits, dim=1)
    own = log_p.gather(1, y[:, None]).squeeze(1)
    others = (log_p.sum(dim=1) - own) / (logits.shape[1] - 1)
    return -(true * own + (1 - true) * others)


def attack(run: Run, batch: Batch) -> Tensor:
    """Return images one step from their prior; note the start, and what to remember."""
    settings, memory, eps = run.settings, run.policy(Prior), run.config.attack.eps
    size = settings.fgsm_step * eps

    def look(start: Tensor) -> Tensor:
        batch.notes["start"] = start.clone()
        start.requires_grad_().register_hook(remember)
        return start

    def remember(grad: Tensor) -> None:
        scale = grad.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(grad.dtype).tiny)
        momentum = grad / scale + settings.pgi_decay * memory.recall("momentum", batch)
        moved = batch.notes["start"] - batch.x + size * momentum.sign()
        batch.notes["prior"] = (batch.x + moved.clamp(-eps, eps)).clamp(0, 1) - batch.x
        batch.notes["momentum"] = momentum

    return run.pgd(
        batch.x,
        lambda logits: smoothed(logits, batch.y, settings.pgi_true).sum(),
        start=memory.recall("prior", batch),
        step_size=size,
        before=look,
    )


def loss(run: Run, batch: Batch) -> Terms:
    """Return CE(x', t) + weight * MSE(z(x'), z(x0))."""
    settings = run.settings
    logits, logits_adv = run.model(batch.notes["start"]), run.model(batch.x_adv)
    adversarial_ce = smoothed(logits_adv, batch.y, settings.pgi_true).mean()
    apart = (logits_adv - logits).square().mean()
    total = adversarial_ce + settings.pgi_weight * apart
    return {"total": total, "adversarial_ce": adversarial_ce, "apart": apart}


def preset(config: Config) -> Config:
    """Return ``config`` with one step, from where the prior leads, also outside of [0, 1]."""
    return unclamped_start(single_step(config))


pgi = partial(
    SetUp,
    "jiaxiaojunQAQ/FGSM-PGI",
    epochs=110,
    milestones=(100 / 110, 105 / 110),
    attack_steps=1,
    clamp_start=False,
    attack_mode="train",
)

FGSM_PGI = Method(
    name="fgsm_pgi",
    label="FGSM-PGI",
    title="FGSM-PGI: one step from each image's last perturbation, and distance of the two logits",
    arxiv="2207.08859",
    paper="Jia et al., Prior-Guided Adversarial Initialization for Fast Adversarial Training, "
    "ECCV 2022",
    settings=PgiSettings(),
    attack=attack,
    loss=loss,
    policies=lambda run: (Prior(run),),
    check=check_signs,
    preset=preset,
    one_step=True,
    published={"cifar100/*": pgi(pgi_reset=10), "*": pgi()},
)
