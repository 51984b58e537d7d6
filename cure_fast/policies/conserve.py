"""CURE's conserving step: which weights may move, decided by robust gradient prominence.

CURE scores weights by two gradients of its loss. The policy ``rgp`` takes the mask to any method:
its score is the magnitude of the gradient that updates, as in mode ``rgp`` of the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from operator import itemgetter
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from cure_fast.batch import Batch
from cure_fast.classifier import ImageClassifier, block_first_convs
from cure_fast.config import MethodSettings
from cure_fast.config.checks import Bounds, Share
from cure_fast.errors import InputError
from cure_fast.kernels import Selection, rgp_mask_
from cure_fast.step.policy import Policy, PolicyInfo, Wanted
from cure_fast.step.run import Run, Terms

# Title and caption of the chart of the epochs' ``updated``.
UPDATED = (
    "Weights updated per layer",
    "Share of each tensor's weights whose gradient the mask kept, mean over the epoch's steps. "
    "With --mask-scope tensor it is nearly constant by construction, near 100 less --percentile; "
    "small tensors deviate, as they count in whole weights. Momentum and weight decay still move "
    "the weights that are masked, but for --freeze hard.",
)


class ConserveSettings(MethodSettings):
    """Which weights are conserved in a step."""

    percentile: Annotated[float, Bounds(0, 100)] = 30.0
    """Percent of each tensor's weights to conserve in a step, 0 to 100 (paper: 30, 50 or 20)."""
    alpha: Share = 0.1
    """Weight of the natural gradient in the score, 0 to 1; 1 - alpha weighs the adversarial one.
    The code's independent weights a and b equal alpha = a/(a+b), as only the order matters."""
    score: Literal["abs", "signed", "abs_of_sum"] = "abs"
    """Score: magnitudes (paper), signed sum (code), or magnitude of the sum."""
    score_loss: Literal["ce", "kl"] = "ce"
    """Adversarial loss in the score: CE(x') (paper), or the KL of Eq. 5 without beta (code)."""
    mask_layers: Literal["all_but_classifier", "block_conv1", "conv", "all"] = "all_but_classifier"
    """Tensors to mask: all but the classifier (default), each block's first convolution (code), all
    convolutions, or all (paper: "each layer")."""
    mask_stem: bool = True
    """Mask the first convolution (and its BatchNorm) too (paper; the code leaves it out)."""
    mask_scope: Literal["tensor", "global"] = "tensor"
    """Percentile of each tensor (paper and code), or one over all masked tensors together."""
    mask_every: Annotated[int, Bounds(1, 1_000_000)] = 1
    """Steps from one selection of the mask to the next, 1 or more. Above 1 the steps between keep
    the mask they find and save the score's gradients: faster, and no longer the published CURE."""
    freeze: Literal["grad", "hard"] = "grad"
    """Masked weights: gradient zeroed, so that momentum and weight decay still move them (paper and
    code), or held fast in this step (hard)."""


def maskable_parameters(
    model: ImageClassifier, mask_layers: str, mask_stem: bool
) -> dict[str, nn.Parameter]:
    """Return the parameters that the mask may touch, by name, in the model's order.

    Raises:
        InputError: if no tensor is left.
    """
    parameters = dict(model.named_parameters())
    module = {name: name.rpartition(".")[0] for name in parameters}
    stem = {name for name in parameters if module[name] in model.stem_names}
    if mask_layers == "block_conv1":
        chosen = set(block_first_convs(model)) | {n for n in stem if parameters[n].ndim == 4}
    elif mask_layers == "conv":
        chosen = {name for name, p in parameters.items() if p.ndim == 4}
    elif mask_layers == "all_but_classifier":
        chosen = {name for name in parameters if module[name] != model.classifier_name}
    else:
        chosen = set(parameters)
    if not mask_stem:
        chosen -= stem
    if not chosen:
        raise InputError(f"--mask-layers {mask_layers}: {type(model).__name__} has no such tensor.")
    return {name: p for name, p in parameters.items() if name in chosen}


class Conserve(Policy):
    """Masks gradients of low prominence; counts the fraction of weights left to update.

    Args:
        active: from the run to whether the step under way is masked.
        by_update: the gradient that updates is the score too; else the score is a mixture of the
            gradients of the terms ``natural_ce`` and ``adversarial_ce`` (or ``kl``) of the loss.
    """

    def __init__(
        self,
        model: ImageClassifier,
        settings: ConserveSettings,
        *,
        active: Callable[[Run], bool],
        by_update: bool = False,
    ) -> None:
        super().__init__()
        self.settings, self.active, self.by_update = settings, active, by_update
        # Terms of the loss whose gradients make the score.
        self.scored = ("natural_ce", "adversarial_ce" if settings.score_loss == "ce" else "kl")
        self.moves_weights = settings.freeze == "hard"
        chosen = maskable_parameters(model, settings.mask_layers, settings.mask_stem)
        self.names = list(chosen)
        self.parameters = list(chosen.values())
        device = self.parameters[0].device
        self.kept_sum = torch.zeros(len(self.names), device=device)
        self.kept_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.state = {"kept_sum": self.kept_sum, "kept_steps": self.kept_steps}
        # Where freezing is hard: the weights before the step, and which of them are masked.
        self.kept_weights: list[Tensor] = []
        self.frozen: list[Tensor] = []
        # The last selection, where steps keep it, and whether it comes from a checkpoint.
        self.selection: Selection | None = None
        self.stored = False

    def wants(self, run: Run) -> dict[str, Wanted]:
        """Return what the score is made of, in a step that selects the mask by it.

        A score that is linear in the two gradients is the gradient of one mixture of the losses.
        """
        if not self.active(run) or self.by_update or not self.selects(run):
            return {}
        alpha = self.settings.alpha
        if self.settings.score == "abs":
            return {name: Wanted(itemgetter(name), self.parameters) for name in self.scored}

        def mixture(terms: Terms) -> Tensor:
            natural, adversarial = (terms[name] for name in self.scored)
            return alpha * natural + (1 - alpha) * adversarial

        return {"score": Wanted(mixture, self.parameters)}

    def around(self, run: Run, batch: Batch) -> AbstractContextManager[None]:
        """Keep the weights where freezing is hard, before another policy moves them."""
        if self.settings.freeze == "hard" and self.active(run):
            self.kept_weights = [parameter.detach().clone() for parameter in self.parameters]
        return super().around(run, batch)

    def on_grads(self, run: Run) -> None:
        """Zero the masked entries of the maskable gradients in place."""
        if not self.active(run):
            return
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        assert len(grads) == len(self.parameters), "every maskable weight takes part in the loss"
        kept = self._mask(run, grads)
        skip = run.engine.skip
        self.kept_sum += kept if skip is None else kept * ~skip
        self.kept_steps += 1 if skip is None else ~skip

    def _mask(self, run: Run, grads: list[Tensor]) -> Tensor:
        """Mask the step's gradients; return the fraction kept, float32 [L]."""
        settings = self.settings
        if not self.selects(run):
            assert self.selection is not None
            run.engine.mask(self.parameters, self.selection)
            return self.selection.kept
        if self.by_update:
            natural = adversarial = [grad.clone() for grad in grads]
        elif settings.score == "abs":
            natural, adversarial = (run.gradients[name] for name in self.scored)
        else:
            natural = adversarial = run.gradients["score"]
        if settings.mask_scope == "tensor" and settings.freeze == "grad":
            selection = run.engine.select(
                self.parameters,
                natural,
                adversarial,
                percentile=settings.percentile,
                alpha=settings.alpha,
                score=settings.score,
            )
            run.engine.mask(self.parameters, selection)
            if settings.mask_every > 1:
                self.selection, self.stored = selection, False
            return selection.kept
        keep = self._keep(natural, adversarial)
        for grad, kept in zip(grads, keep, strict=True):
            grad.mul_(kept)
        if settings.freeze == "hard":
            self.frozen = [kept == 0 for kept in keep]
        return torch.stack([kept.mean() for kept in keep])

    def selects(self, run: Run) -> bool:
        """Return whether the step selects its mask, and does not keep that of the step before."""
        return self.selection is None or run.batch % self.settings.mask_every == 0

    def phase(self, run: Run) -> str:
        """Return what the step does for its mask; a mask from a checkpoint lies elsewhere."""
        if self.selects(run):
            return "select"
        return "stored" if self.stored else "keep"

    def _keep(self, natural: list[Tensor], adversarial: list[Tensor]) -> list[Tensor]:
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
            score=self.settings.score,
        )
        if self.settings.mask_scope == "global":
            parts = keep[0].split([shape.numel() for shape in shapes])
            keep = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return keep

    def on_step(self, run: Run, batch: Batch) -> None:
        """Put masked weights back to their value before the step, where freezing is hard."""
        with torch.no_grad():
            for masked, before, parameter in zip(
                self.frozen, self.kept_weights, self.parameters, strict=False
            ):
                parameter.copy_(torch.where(masked, before, parameter))
        self.frozen, self.kept_weights = [], []

    def epoch_metrics(self, run: Run) -> dict[str, Any]:
        """Return the mean fraction updated per tensor since the last call; None for no step."""
        if not self.kept_steps:
            return {"updated": None}
        fractions = (self.kept_sum / self.kept_steps).tolist()
        self.kept_sum.zero_()
        self.kept_steps.zero_()
        return {"updated": dict(zip(self.names, fractions, strict=True))}

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of the epoch that is under way, and the mask that steps keep."""
        state, found = super().state_dict(), self.selection
        if found is None:
            return state
        masks = [
            torch.zeros(p.shape, dtype=torch.bool) if values is None else (values < limit).cpu()
            for p, values, limit in zip(
                self.parameters, found.scores, found.thresholds, strict=True
            )
        ]
        return {**state, "masks": masks, "kept": found.kept.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore counts and mask."""
        super().load_state_dict(state)
        self.selection, self.stored = None, "masks" in state
        if self.stored:
            # Scores of 0 and 1 around a threshold of 1 mask the same weights.
            device = self.kept_sum.device
            scores = [
                torch.empty_like(parameter).copy_(~mask)
                for parameter, mask in zip(self.parameters, state["masks"], strict=True)
            ]
            count = len(scores)
            self.selection = Selection(
                scores,
                torch.ones(count, device=device),
                state["kept"].to(device),
                torch.zeros(count, dtype=torch.int32, device=device),
            )


class RgpSettings(MethodSettings):
    """CURE's mask for any method."""

    rgp_percentile: Annotated[float, Bounds(0, 100)] = 30.0
    """Percent of each tensor's weights to conserve in a step, 0 to 100: the smallest gradients."""
    rgp_layers: Literal["all_but_classifier", "block_conv1", "conv", "all"] = "all_but_classifier"
    """Tensors to mask: all but the classifier, each block's first convolution, all convolutions, or
    all."""


def build_rgp(run: Run, settings: RgpSettings) -> Policy:
    """Return the mask by the magnitude of the gradient that updates."""
    chosen = ConserveSettings(percentile=settings.rgp_percentile, mask_layers=settings.rgp_layers)
    return Conserve(run.model, chosen, active=lambda run: True, by_update=True)


RGP = PolicyInfo(
    name="rgp",
    label="RGP",
    title="RGP: CURE's mask; weights whose gradient is smallest in their tensor are conserved",
    paper="Gowda et al., Conserve-Update-Revise to Cure Generalization and Robustness, ICLR 2024",
    settings=RgpSettings(),
    build=build_rgp,
    fixed=("rgp_layers",),
)
