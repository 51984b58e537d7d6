"""CURE's conserving step: which weights may move, decided by robust gradient prominence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cure_fast.errors import InputError
from cure_fast.kernels import Selection, rgp_mask_
from cure_fast.kernels.rgp import Score
from cure_fast.models import ImageClassifier, block_first_convs
from cure_fast.step.method import Policy, Terms

if TYPE_CHECKING:
    from cure_fast.methods.cure import CureSettings
    from cure_fast.training.trainer import Run


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
        self.moves_weights = settings.freeze == "hard"
        chosen = maskable_parameters(model, settings.mask_layers, settings.mask_stem)
        self.names = list(chosen)
        self.parameters = list(chosen.values())
        device = self.parameters[0].device
        self.kept_sum = torch.zeros(len(self.names), device=device)
        self.kept_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.frozen: list[tuple[Tensor, Tensor]] = []
        # The last selection, where steps keep it, and whether it comes from a checkpoint.
        self.selection: Selection | None = None
        self.stored = False

    def backward(self, run: Run, terms: Terms) -> None:
        """Add every gradient of the terms, those of the score among them."""
        if self.updates_by_score:
            run.backward(self._direction(terms))
            return
        scored = ("natural_ce", self.adversarial_term) if self.selects(run) else ()
        run.backward(
            terms["total"],
            further={name: terms[name] for name in scored},
            parameters=self.parameters,
        )

    def on_grads(self, run: Run) -> None:
        """Zero the masked entries of the maskable gradients in place."""
        if not self.active(run):
            return
        kept = self._mask(run, self._grads())
        skip = run.engine.skip
        self.kept_sum += kept if skip is None else kept * ~skip
        self.kept_steps += 1 if skip is None else ~skip

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

    def _grads(self) -> list[Tensor]:
        grads = [parameter.grad for parameter in self.parameters]
        assert all(grad is not None for grad in grads), (
            "every maskable weight takes part in the loss"
        )
        return grads  # pyright: ignore[reportReturnType]

    def _mask(self, run: Run, grads: list[Tensor]) -> Tensor:
        """Mask the step's gradients; return the fraction kept, float32 [L]."""
        settings = self.settings
        if not self.selects(run):
            assert self.selection is not None
            run.engine.mask(self.parameters, self.selection)
            return self.selection.kept
        if self.updates_by_score:
            natural = adversarial = [grad.clone() for grad in grads]
        else:
            natural = run.gradients["natural_ce"]
            adversarial = run.gradients[self.adversarial_term]
        score: Score = "abs" if settings.objective == "rgp" else settings.score
        if settings.mask_scope == "tensor" and settings.freeze == "grad":
            selection = run.engine.select(
                self.parameters,
                natural,
                adversarial,
                percentile=settings.percentile,
                alpha=settings.alpha,
                score=score,
            )
            run.engine.mask(self.parameters, selection)
            if settings.mask_every > 1:
                self.selection, self.stored = selection, False
            return selection.kept
        keep = self._keep(natural, adversarial, score)
        for grad, kept in zip(grads, keep, strict=True):
            grad.mul_(kept)
        if settings.freeze == "hard":
            self.frozen = [
                (kept == 0, parameter.detach().clone())
                for kept, parameter in zip(keep, self.parameters, strict=True)
            ]
        return torch.stack([kept.mean() for kept in keep])

    def selects(self, run: Run) -> bool:
        """Return whether the step selects its mask, and does not keep that of the step before."""
        return self.selection is None or run.batch % self.settings.mask_every == 0

    def phase(self, run: Run) -> str:
        """Return what the step does for its mask; a mask from a checkpoint lies elsewhere."""
        if self.selects(run):
            return "select"
        return "stored" if self.stored else "keep"

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
        self.kept_sum.zero_()
        self.kept_steps.zero_()
        return dict(zip(self.names, fractions, strict=True))

    def state_dict(self) -> dict[str, object]:
        """Return the counts of the epoch that is under way."""
        state = {"kept_sum": self.kept_sum.cpu(), "kept_steps": int(self.kept_steps)}
        if self.selection is None:
            return state
        found = self.selection
        masks = [
            torch.zeros(p.shape, dtype=torch.bool) if values is None else (values < limit).cpu()
            for p, values, limit in zip(
                self.parameters, found.scores, found.thresholds, strict=True
            )
        ]
        return {**state, "masks": masks, "kept": found.kept.cpu()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore the counts."""
        assert isinstance(state["kept_sum"], Tensor) and isinstance(state["kept_steps"], int)
        self.kept_sum.copy_(state["kept_sum"])
        self.kept_steps.fill_(state["kept_steps"])
        self.selection, self.stored = None, "masks" in state
        if self.stored:
            # Scores of 0 and 1 around a threshold of 1 mask the same weights.
            device = self.kept_sum.device
            scores = [
                torch.empty_like(parameter).copy_(~mask)
                for parameter, mask in zip(self.parameters, state["masks"], strict=True)  # pyright: ignore[reportArgumentType]
            ]
            count = len(scores)
            self.selection = Selection(
                scores,
                torch.ones(count, device=device),
                state["kept"].to(device),  # pyright: ignore[reportAttributeAccessIssue]
                torch.zeros(count, dtype=torch.int32, device=device),
            )
