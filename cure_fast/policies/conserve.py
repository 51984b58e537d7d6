"""CURE's conserving step: which weights may move, decided by robust gradient prominence.

CURE scores weights by two gradients of its loss. The policy ``rgp`` takes the mask to any method:
its score is the magnitude of the gradient that updates, as in mode ``rgp`` of the authors' code.
"""

from __future__ import annotations

import math
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
from cure_fast.kernels.rgp import is_below, order_statistic
from cure_fast.kernels.workspace import rank_of
from cure_fast.step.policy import Policy, PolicyInfo, Wanted
from cure_fast.step.run import Run, Terms

# Titles and captions of the charts of what an epoch's row holds of each layer.
BY_LAYER = {
    "movement": (
        "Movement of the weights per layer",
        "Norm of the change of a layer's weights over the epoch, divided by their norm at its "
        "start. Momentum and weight decay move masked weights too, but for --freeze hard.",
    ),
    "mask_overlap": (
        "Overlap of the mask from epoch to epoch, per layer",
        "Masked in the last step of this epoch and of the one before, of all that are masked in "
        "one of the two (Jaccard).",
    ),
    "masked_energy": (
        "Gradient energy that the mask takes, per layer",
        "Sum of squares of the masked scores over that of all of a layer's, in the last step.",
    ),
    "updated": (
        "Weights updated per layer",
        "Share of a layer's weights that the mask kept in the epoch's last step.",
    ),
    "prominent": (
        "Weights above a common percentile per layer",
        "Share of a layer's weights whose score reaches the percentile of the scores of all layers "
        "together, in the epoch's last step. The mask by a percentile of each tensor keeps the "
        "same share of all.",
    ),
}


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
        if mask_layers == "all_but_classifier" and set(module.values()) == {model.classifier_name}:
            why = "the network's only layer is its classifier; use --mask-layers all"
        else:
            why = "the network has no such layer; choose another, such as all"
        raise InputError(f"--mask-layers {mask_layers}: {why}.")
    return {name: p for name, p in parameters.items() if name in chosen}


class Conserve(Policy):
    """Masks gradients of low prominence; tells what the mask of each epoch's last step was like.

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
        # Of all their weights one after the other: which the epoch before masked in its last step,
        # and which every epoch so far did, of how many.
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.masked = torch.zeros(sum(self.sizes), dtype=torch.bool, device=device)
        self.never = torch.ones_like(self.masked)
        self.epochs = torch.zeros((), dtype=torch.int64, device=device)
        self.state = {"masked": self.masked, "never": self.never, "epochs": self.epochs}
        # Where freezing is hard: the weights before the step, and which of them are masked.
        self.kept_weights: list[Tensor] = []
        self.frozen: list[Tensor] = []
        # The last selection, and whether it comes from a checkpoint, which has its energies.
        self.selection: Selection | None = None
        self.stored = False
        self.energies: Tensor | None = None
        self.prominent: Tensor | None = None
        # Without selections: 1 for each weight that the last step kept.
        self.kept: list[Tensor] = []
        # The weights at the start of the epoch under way.
        self.begun: list[Tensor] = []

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

    def before(self, run: Run, batch: Batch) -> None:
        """Keep the weights that the epoch begins with."""
        if run.batch == 0:
            self.begun = [parameter.detach().clone() for parameter in self.parameters]

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
        settings = self.settings
        if not self.selects(run):
            assert self.selection is not None
            run.engine.mask(self.parameters, self.selection)
            return
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
            # Its memory is the selector's, where replays of a captured step find it too.
            self.selection, self.stored = selection, False
            return
        keep = self._keep(natural, adversarial)
        for grad, kept in zip(grads, keep, strict=True):
            grad.mul_(kept)
        if settings.freeze == "hard":
            self.frozen = [kept == 0 for kept in keep]
        self.kept = self.kept or [torch.empty_like(kept) for kept in keep]
        torch._foreach_copy_(self.kept, keep)  # pyright: ignore[reportPrivateImportUsage]

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
        """Return how far weights moved, and what the mask of the epoch's last step is like.

        All are shares: of a layer's weights, and under ``mask`` of all that are maskable. What
        cannot be told, such as the overlap of the first mask, is left out.
        """
        row, whole, masks = {}, {}, self._masks()
        if self.begun:
            moved = [
                (parameter.detach() - old).norm() / old.norm()
                for parameter, old in zip(self.parameters, self.begun, strict=True)
            ]
            row["movement"], self.begun = self._by_layer(torch.stack(moved)), []
        # A step that was left out may have been the last, and have left scores that are none.
        finite = self.selection is None or not self.selection.nonfinite.any()
        if masks and finite and self.active(run):
            now = torch.cat([mask.flatten() for mask in masks])
            if self.epochs:
                both, either = self._sums(now & self.masked), self._sums(now | self.masked)
                row["mask_overlap"] = self._by_layer(both / either)
                whole["overlap"] = float(both.sum() / either.sum())
            if (energies := self._energies()) is not None:
                row["masked_energy"] = self._by_layer(energies[0] / energies[1])
                whole["energy"] = float(energies[0].sum() / energies[1].sum())
            if (prominent := self._prominent()) is not None:
                sizes = torch.tensor(self.sizes, device=prominent.device)
                row["prominent"] = self._by_layer(prominent / sizes)
                flat = torch.tensor([p.ndim == 1 for p in self.parameters], device=sizes.device)
                for name, chosen in (("prominent_weights", ~flat), ("prominent_vectors", flat)):
                    if chosen.any():
                        share = prominent[chosen].sum() / sizes[chosen].sum()
                        whole[name] = float(share)
            if self.settings.mask_scope == "global":
                shares = [1 - mask.float().mean() for mask in masks]
                row["updated"] = self._by_layer(torch.stack(shares))
            self.never &= now
            whole["never_updated"] = float(self.never.float().mean())
            self.masked.copy_(now)
            self.epochs += 1
        return {**row, "mask": whole} if whole else row

    def masks(self, run: Run) -> dict[int, Tensor]:
        """Return the weights that the last step masked, by id of the parameter."""
        masks = self._masks() if self.active(run) else []
        return {id(p): mask for p, mask in zip(self.parameters, masks, strict=False)}

    def _masks(self) -> list[Tensor]:
        """Return the weights that the last mask holds, bool, shaped as they are; none before it."""
        if self.kept:
            return [kept == 0 for kept in self.kept]
        if self.selection is None:
            return []
        return [
            torch.zeros_like(p, dtype=torch.bool) if values is None else is_below(values, limit)
            for p, values, limit in zip(
                self.parameters, self.selection.scores, self.selection.thresholds, strict=True
            )
        ]

    def _energies(self) -> Tensor | None:
        """Return sums of the squares of scores by tensor, masked and all, [2, L]; None if gone."""
        if self.stored or self.kept or self.selection is None:
            return self.energies
        # An exempt tensor has no scores, and none of its weights is masked.
        found = [
            torch.ones_like(p) if v is None else v
            for p, v in zip(self.parameters, self.selection.scores, strict=True)
        ]
        squares = [scores.double().square() for scores in found]
        pairs = zip(squares, self._masks(), strict=True)
        masked = torch.stack([(square * mask).sum() for square, mask in pairs])
        return torch.stack([masked, torch.stack([square.sum() for square in squares])])

    def _prominent(self) -> Tensor | None:
        """Return of how many weights of each tensor the score reaches a percentile, int64 [L].

        It is that of the scores of all tensors together; None where they are gone, or all pass.
        """
        if self.stored or self.kept or self.selection is None:
            return self.prominent
        scores = [values for values in self.selection.scores if values is not None]
        if len(scores) < len(self.parameters):
            return None
        together = torch.cat([values.flatten() for values in scores])
        rank = math.ceil(rank_of(self.settings.percentile, len(together)))
        limit = order_statistic(together, rank)
        return torch.stack([(~is_below(values, limit)).sum() for values in scores])

    def _sums(self, flags: Tensor) -> Tensor:
        """Return how many flags, bool as :attr:`masked`, each tensor has, int64 [L]."""
        return torch.stack([part.sum() for part in flags.split(self.sizes)])

    def _by_layer(self, values: Tensor) -> dict[str, float]:
        """Return those [L] of layers' weights, which have two dimensions or more, by name."""
        return {
            name: value
            for name, parameter, value in zip(
                self.names, self.parameters, values.tolist(), strict=True
            )
            if parameter.ndim > 1 and math.isfinite(value)
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what epochs are compared with; in mid-epoch also its start and its last mask."""
        state = super().state_dict()
        # The next epoch begins with a selection of its own.
        if self.begun:
            state["begun"] = self.begun
        if self.begun and (masks := self._masks()):
            state |= {"masks": [mask.cpu() for mask in masks], "energies": self._energies()}
            state["prominent"] = self._prominent()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore epochs and mask."""
        # Earlier versions compared none.
        super().load_state_dict({**self.state, **state})
        device = self.masked.device
        self.kept, self.energies = [], state.get("energies")
        self.prominent = state.get("prominent")
        self.begun = [
            torch.empty_like(parameter).copy_(old)
            for parameter, old in zip(self.parameters, state.get("begun", []), strict=False)
        ]
        self.selection, self.stored = None, "masks" in state
        if self.stored:
            # Scores of 0 and 1 around a threshold of 1 mask the same weights.
            scores = [
                torch.empty_like(parameter, dtype=torch.float32).copy_(~mask)
                for parameter, mask in zip(self.parameters, state["masks"], strict=True)
            ]
            one = torch.ones(len(scores), device=device)
            self.selection = Selection(scores, one, one, torch.zeros_like(one, dtype=torch.int32))


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
    title="RGP: a mask as CURE's, but by the gradient that updates: the smallest become zero",
    arxiv="2401.14948",
    paper="Gowda et al., Conserve-Update-Revise to Cure Generalization and Robustness, ICLR 2024",
    settings=RgpSettings(),
    build=build_rgp,
    fixed=("rgp_layers",),
)
