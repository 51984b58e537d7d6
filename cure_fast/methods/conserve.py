"""CURE's conserving step: which weights may move, decided by robust gradient prominence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cure_fast.errors import InputError
from cure_fast.kernels import rgp_mask_
from cure_fast.kernels.rgp import Score
from cure_fast.method import Policy, Terms
from cure_fast.models import ImageClassifier, block_first_convs

if TYPE_CHECKING:
    from cure_fast.methods.cure import CureSettings
    from cure_fast.trainer import Run


def maskable_parameters(
    model: ImageClassifier, mask_layers: str, mask_stem: bool
) -> dict[str, nn.Parameter]:
    """Return the parameters that the mask may touch, by name, in the model's order.

    Args:
        model: the network.
        mask_layers: ``all_but_classifier``, ``block_conv1`` (first convolution of each block),
            ``conv`` (convolutions) or ``all``.
        mask_stem: whether the stem's tensors take part too.

    Raises:
        InputError: if no tensor is left.
    """
    parameters = dict(model.named_parameters())
    stem = {name for name in parameters if _inside(name, model.stem_names)}
    if mask_layers == "block_conv1":
        chosen = set(block_first_convs(model)) | {n for n in stem if parameters[n].ndim == 4}
    elif mask_layers == "conv":
        chosen = {name for name, p in parameters.items() if p.ndim == 4}
    elif mask_layers == "all_but_classifier":
        chosen = {name for name in parameters if not _inside(name, (model.classifier_name,))}
    else:
        chosen = set(parameters)
    if not mask_stem:
        chosen -= stem
    if not chosen:
        raise InputError(f"--mask-layers {mask_layers}: {type(model).__name__} has no such tensor.")
    return {name: p for name, p in parameters.items() if name in chosen}


def _inside(name: str, modules: Sequence[str]) -> bool:
    """Return whether the parameter ``name`` belongs to one of the top-level ``modules``."""
    return name.split(".", 1)[0] in modules


class Conserve(Policy):
    """Masks gradients of low prominence; counts the fraction of weights left to update.

    Args:
        model: the network that is trained.
        settings: CURE's settings.
        active: from the run to whether the step under way is masked.
    """

    def __init__(
        self, model: ImageClassifier, settings: CureSettings, active: Callable[[Run], bool]
    ) -> None:
        self.settings = settings
        self.active = active
        chosen = maskable_parameters(model, settings.mask_layers, settings.mask_stem)
        self.names = list(chosen)
        self.parameters = list(chosen.values())
        self.kept_sum = torch.zeros(len(self.names))
        self.kept_steps = 0
        self.frozen: list[tuple[Tensor, Tensor]] = []

    def backward(self, run: Run, terms: Terms) -> None:
        """Add every gradient of the terms, those of the score among them."""
        scaled = {name: run.scale(term) for name, term in terms.items()}
        if self.updates_by_score:
            self._direction(scaled).backward()
            return
        for name in ("natural_ce", self.adversarial_term):
            run.add_gradients(name, self._gradients_of(scaled[name]))
        scaled["total"].backward()

    def on_grads(self, run: Run) -> None:
        """Zero the masked entries of the maskable gradients in place."""
        if not self.active(run):
            return
        grads = self._grads()
        if self.updates_by_score:
            natural = adversarial = [grad.clone() for grad in grads]
        else:
            natural = run.gradients["natural_ce"]
            adversarial = run.gradients[self.adversarial_term]
        kept = self._mask(grads, natural, adversarial)
        self.kept_sum = self.kept_sum.to(kept.device) + kept
        self.kept_steps += 1

    @property
    def updates_by_score(self) -> bool:
        """Whether the gradient that updates is also the score."""
        return self.settings.objective == "rgp" or self.settings.update == "prominence"

    @property
    def adversarial_term(self) -> str:
        """Name of the loss whose gradient is the adversarial part of the score."""
        return "adversarial_ce" if self.settings.score_loss == "ce" else "kl"

    def _direction(self, terms: Terms) -> Tensor:
        """Return the loss whose gradient updates: the total, or the score's mixture of losses."""
        settings = self.settings
        if settings.update == "total":
            return terms["total"]
        mixture = (
            settings.alpha * terms["natural_ce"]
            + (1 - settings.alpha) * terms[self.adversarial_term]
        )
        if settings.revision:
            mixture = mixture + settings.gamma * terms["consistency"]
        return mixture

    def _gradients_of(self, term: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(
            term, self.parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return list(grads)

    def _grads(self) -> list[Tensor]:
        grads = [parameter.grad for parameter in self.parameters]
        assert all(grad is not None for grad in grads), (
            "every maskable weight takes part in the loss"
        )
        return grads  # pyright: ignore[reportReturnType]

    def _mask(
        self, grads: list[Tensor], natural: list[Tensor], adversarial: list[Tensor]
    ) -> Tensor:
        """Zero the masked entries of ``grads``; return the fraction kept, float32 [L]."""
        settings = self.settings
        score: Score = "abs" if settings.objective == "rgp" else settings.score
        if settings.mask_scope == "tensor" and settings.freeze == "grad":
            return rgp_mask_(
                grads,
                natural,
                adversarial,
                percentile=settings.percentile,
                alpha=settings.alpha,
                score=score,
            )
        keep = self._keep(natural, adversarial, score)
        for grad, kept in zip(grads, keep, strict=True):
            grad.mul_(kept)
        if settings.freeze == "hard":
            self.frozen = [
                (kept == 0, parameter.detach().clone())
                for kept, parameter in zip(keep, self.parameters, strict=True)
            ]
        return torch.stack([kept.mean() for kept in keep])

    def _keep(self, natural: list[Tensor], adversarial: list[Tensor], score: Score) -> list[Tensor]:
        """Return 1 where a weight may move, 0 where masked, float32, shaped as the weights."""
        shapes = [grad.shape for grad in natural]
        if self.settings.mask_scope == "global":
            natural = [torch.cat([grad.flatten() for grad in natural])]
            adversarial = [torch.cat([grad.flatten() for grad in adversarial])]
        keep = [torch.ones_like(grad, dtype=torch.float32) for grad in natural]
        rgp_mask_(
            keep,
            natural,
            adversarial,
            percentile=self.settings.percentile,
            alpha=self.settings.alpha,
            score=score,
        )
        if self.settings.mask_scope == "global":
            parts = keep[0].split([shape.numel() for shape in shapes])
            keep = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return keep

    def on_step(self, run: Run) -> None:
        """Put masked weights back to their value before the step, where freezing is hard."""
        with torch.no_grad():
            for (mask, before), parameter in zip(self.frozen, self.parameters, strict=False):
                parameter.copy_(torch.where(mask, before, parameter))
        self.frozen = []

    def epoch_metrics(self, run: Run) -> dict[str, object]:
        """Return the fraction of weights updated per tensor over the epoch."""
        return {"updated": self.take_updated()}

    def take_updated(self) -> dict[str, float] | None:
        """Return the mean fraction updated per tensor since the last call, or ``None``."""
        if not self.kept_steps:
            return None
        fractions = (self.kept_sum / self.kept_steps).tolist()
        self.kept_sum, self.kept_steps = torch.zeros_like(self.kept_sum), 0
        return dict(zip(self.names, fractions, strict=True))

    def state_dict(self) -> dict[str, object]:
        """Return the counts of the epoch that is under way."""
        return {"kept_sum": self.kept_sum.cpu(), "kept_steps": self.kept_steps}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore the counts."""
        assert isinstance(state["kept_sum"], Tensor) and isinstance(state["kept_steps"], int)
        self.kept_sum, self.kept_steps = state["kept_sum"], state["kept_steps"]
