"""AWP: adversarial weight perturbation around any loss (Wu et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.config import MethodSettings
from cure_fast.config.checks import Weight, Whole
from cure_fast.step.policy import Policy, PolicyInfo
from cure_fast.step.run import Run


class AwpSettings(MethodSettings):
    """AWP."""

    awp_gamma: Weight = 0.005
    """Length of the perturbation relative to each tensor's norm (AT: 0.01, TRADES: 0.005)."""
    awp_warmup: Whole = 0
    """Epochs before the weights are perturbed, 0 or more (TRADES: 10)."""


class Perturb(Policy):
    """Computes each update at weights that one step up the loss perturbs, then takes them back."""

    def __init__(self, run: Run, settings: AwpSettings) -> None:
        super().__init__()
        self.settings = settings
        named = run.model.named_parameters()
        self.weights = [w for name, w in named if w.ndim > 1 and "weight" in name]

    def phase(self, run: Run) -> bool:
        """Return whether weights are perturbed."""
        return run.epoch >= self.settings.awp_warmup

    @contextmanager
    def around(self, run: Run, batch: Batch) -> Iterator[None]:
        """Perturb the weights for the loss and its gradient."""
        if not self.phase(run):
            yield
            return
        grads = run.engine.gradients(batch, self.weights)
        weights = [weight.detach() for weight in self.weights]
        saved = [weight.clone() for weight in weights]
        perturbed = [
            # A gradient that is not finite perturbs nothing; the loss will then not be finite.
            weight + torch.where(grad.norm().isfinite(), grad * self._length(weight, grad), 0)
            for weight, grad in zip(weights, grads, strict=True)
        ]
        # From here on nothing needs memory, which could run out while weights are elsewhere.
        for weight, at in zip(weights, perturbed, strict=True):
            weight.copy_(at)
        try:
            yield
        finally:
            # In this order a step that moves nothing leaves every bit as it was.
            for weight, before, at in zip(weights, saved, perturbed, strict=True):
                weight.sub_(at).add_(before)

    def _length(self, weight: Tensor, grad: Tensor) -> Tensor:
        return self.settings.awp_gamma * weight.norm() / (grad.norm() + 1e-20)


AWP = PolicyInfo(
    name="awp",
    label="AWP",
    title="AWP: each update is computed at adversarially perturbed weights",
    arxiv="2004.05884",
    paper="Wu, Xia and Wang, Adversarial Weight Perturbation, NeurIPS 2020",
    settings=AwpSettings(),
    build=Perturb,
)
