"""CURE: conserve, update, revise (Gowda, Zonooz, Arani, ICLR 2024; code NeurAI-Lab/CURE 03fe414).

One step, from a naturally trained network (equation numbers of the paper):

1. x' by PGD on KL(p(x) || p(x')) (Eq. 4).
2. L = CE(x, y) + beta * KL(p(x) || p(x')) (Eq. 5) + gamma * [KL(p_rev(x) || p(x)) +
   KL(p_rev(x') || p(x'))] (Eq. 8), where rev is the revision model, without gradient.
3. Conserve: score each weight by alpha |dCE(x)/dw| + (1-alpha) |dCE(x')/dw| (Eq. 6) and zero the
   gradient of L where the score is below its tensor's percentile.
4. Update with SGD.
5. Revise: with probability r, rev = d * rev + (1-d) * theta (Eq. 7).

Paper and public code differ in many points. Each is a setting of :class:`CureSettings`; the
presets ``cure`` (the default choices), ``cure_paper`` and ``cure_official`` set them together, and
docs/cure.md lists them side by side. The signed score of the public code masks other weights than
the paper's: the most negative sums rather than the smallest magnitudes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from cure_fast.config import Config, MethodSettings
from cure_fast.config.checks import check, check_literals, check_range
from cure_fast.losses import cross_entropy, kl_divergence, kl_divergence_from
from cure_fast.methods import natural
from cure_fast.methods.trades import unclamped_start
from cure_fast.policies.average import Revision, revision_rate
from cure_fast.policies.conserve import Conserve
from cure_fast.step.method import Method, Policy, Terms, backward_total

if TYPE_CHECKING:
    from cure_fast.training.trainer import Run


@dataclass(frozen=True, kw_only=True)
class CureSettings(MethodSettings):
    """CURE. Where paper and public code differ, the help names both choices."""

    percentile: float = 30.0
    """Percent of each tensor's weights to conserve in a step, 0 to 100 (paper: 30, 50 or 20)."""
    alpha: float = 0.1
    """Weight of the natural gradient in the score, 0 to 1; 1 - alpha weighs the adversarial one.
    The code's independent weights a and b equal alpha = a/(a+b), as only the order matters."""
    beta: float = 5.0
    """Weight of KL(p(x) || p(x')) (paper: 1 by Eq. 5; code: 5)."""
    gamma: float = 1.0
    """Weight of the consistency loss (paper: 1, or 0.5 for WRN-34-10; code: 1)."""
    rgp: bool = True
    """Conserve weights by robust gradient prominence; off is the ablation without RGP."""
    revision: bool = True
    """Keep a revision model and the consistency loss; off is the ablation without revision."""
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
    mask_every: int = 1
    """Steps from one selection of the mask to the next, 1 or more. Above 1 the steps between keep
    the mask they find and save the score's gradients: faster, and no longer the published CURE."""
    freeze: Literal["grad", "hard"] = "grad"
    """Masked weights: gradient zeroed, so that momentum and weight decay still move them (paper and
    code), or held fast in this step (hard)."""
    update: Literal["total", "prominence"] = "total"
    """Gradient that is masked: of the total loss (paper and code), or the score's own mixture plus
    the consistency gradient, which is then the score too (the code's mode 'all')."""
    objective: Literal["cure", "rgp"] = "cure"
    """Loss: CURE's, or CE(x) + CE(x') + gamma * consistency masked by the magnitude of its own
    gradient (the code's mode 'rgp', which its efficient variant runs)."""
    inner: Literal["kl", "ce_kl", "ce"] = "kl"
    """Objective of the attack: KL (Eq. 4 and code), CE + inner_kl_weight * KL (Algorithm 1), CE."""
    inner_kl_weight: float = 1.0
    """Weight of KL in the attack's ce_kl objective (Algorithm 1 calls it alpha)."""
    natural_target: Literal["attached", "detached"] = "attached"
    """Let the KL's gradient flow through p(x) (paper and code), or stop it there."""
    revision_rate: float = 0.2
    """Probability of a revision update in a step, 0 to 1 (paper and code: 0.2)."""
    revision_decay: float = 0.999
    """Share of the revision model that stays in an update, 0 to 1 (paper and code: 0.999)."""
    revision_warmup: bool = True
    """Bound that share by 1 - 1/(t+1) in step t (code; the paper has no such bound)."""
    revision_rate_decay: Literal["none", "freeze", "halve", "cosine"] = "none"
    """Decay of the rate: none (code's default), 0 after revision_decay_start (freeze), halved in
    each step after it (code's ema_dynamic), or cosine over the run. The paper gives no rule."""
    revision_decay_start: float = 0.5
    """Share of the run after which freeze and halve act (code: epoch 100 of 200)."""
    revision_order: Literal["after", "before"] = "after"
    """Revision update after the optimiser's step (code), or before the loss (Algorithm 1)."""
    revision_buffers: Literal["own", "average"] = "own"
    """BatchNorm statistics of the revision model: from its own forwards (code), or averaged."""
    revision_mode: Literal["train", "eval"] = "train"
    """BatchNorm of the revision model: batch statistics (code), or running ones."""
    evaluate_revision: bool = False
    """Evaluate the revision model too (paper and code report the trained network alone)."""
    natural_share: float = 0.0
    """Share of the epochs, 0 to 1, that train naturally before CURE (CURE_Eff, code: 0.4)."""

    def __post_init__(self) -> None:
        check_literals(self)
        check_range(self, "percentile", 0, 100)
        for name in ("alpha", "revision_rate", "revision_decay", "revision_decay_start"):
            check_range(self, name, 0, 1)
        check_range(self, "natural_share", 0, 1)
        check_range(self, "mask_every", 1, 1_000_000)
        for name in ("beta", "gamma", "inner_kl_weight"):
            check_range(self, name, 0)
        check(
            self.objective == "cure" or self.update == "total",
            "update",
            self.update,
            "total with --objective rgp, whose one gradient is also its score",
        )
        plain = (self.mask_scope, self.freeze, self.update, self.objective)
        check(
            self.mask_every == 1 or plain == ("tensor", "grad", "total", "cure"),
            "mask_every",
            self.mask_every,
            "1 with --mask-scope global, --freeze hard, --update prominence and --objective rgp",
        )


def natural_epochs(config: Config) -> int:
    """Return the number of epochs of CURE_Eff's natural warm-up."""
    assert isinstance(config.settings, CureSettings)
    return round(config.settings.natural_share * config.optim.epochs)


def naturally(run: Run) -> bool:
    """Return whether the run is still in CURE_Eff's natural warm-up."""
    return run.epoch < natural_epochs(run.config)


def attack(run: Run, x: Tensor, y: Tensor) -> Tensor:
    """Return PGD images that raise the inner objective (Eq. 4)."""
    if naturally(run):
        return x
    settings = run.settings
    if settings.inner == "ce":
        return run.pgd(x, lambda logits: cross_entropy(logits, y).sum())
    with torch.no_grad():
        kl = kl_divergence_from(run.model(x))
    if settings.inner == "kl":
        return run.pgd(x, lambda logits: kl(logits).sum())

    def ce_and_kl(logits: Tensor) -> Tensor:
        weighted = settings.inner_kl_weight * kl(logits)
        return (cross_entropy(logits, y) + weighted).sum()

    return run.pgd(x, ce_and_kl)


def loss(run: Run, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
    """Return the terms of Eq. 5 and 8 and their total."""
    if naturally(run):
        return natural.loss(run, x, x_adv, y)
    settings = run.settings
    logits, logits_adv = run.model(x), run.model(x_adv)
    natural_ce = cross_entropy(logits, y).mean()
    adversarial_ce = cross_entropy(logits_adv, y).mean()
    target = logits.detach() if settings.natural_target == "detached" else logits
    kl = kl_divergence(target, logits_adv).mean()
    terms = {"natural_ce": natural_ce, "adversarial_ce": adversarial_ce, "kl": kl}
    if settings.objective == "rgp":
        total = natural_ce + adversarial_ce
    else:
        total = natural_ce + settings.beta * kl
    if settings.revision:
        terms["consistency"] = consistency(run, x, x_adv, logits, logits_adv)
        total = total + settings.gamma * terms["consistency"]
    return {"total": total, **terms}


def consistency(run: Run, x: Tensor, x_adv: Tensor, logits: Tensor, logits_adv: Tensor) -> Tensor:
    """Return KL(p_rev(x) || p(x)) + KL(p_rev(x') || p(x')) (Eq. 8), batch mean."""
    revision = run.networks["revision"]
    revision.train(run.settings.revision_mode == "train")
    with torch.no_grad():
        taught, taught_adv = revision(x), revision(x_adv)
    return kl_divergence(taught, logits).mean() + kl_divergence(taught_adv, logits_adv).mean()


def backward(run: Run, terms: Terms) -> None:
    """Add the gradients of the total and, for the mask, of the score (Algorithm 1, lines 19-20)."""
    if naturally(run) or not run.settings.rgp:
        backward_total(run, terms)
    else:
        run.policy(Conserve).backward(run, terms)


def networks(run: Run) -> dict[str, nn.Module]:
    """Return the revision model, a copy of the network with its own storage."""
    if not run.settings.revision:
        return {}
    return {"revision": copy.deepcopy(run.model).requires_grad_(False)}


def is_warm_start(run: Run) -> bool:
    """Return whether the step is the first after CURE_Eff's natural warm-up."""
    first = natural_epochs(run.config)
    return first > 0 and run.batch == 0 and run.epoch == first


class WarmStart(Policy):
    """Copies the trained network into the revision model when the natural warm-up ends (CURE_Eff).

    A copy, not an assignment: in the public code the two share storage from then on, which makes
    the consistency loss zero and lets the revision update shrink the trained weights.
    """

    @contextmanager
    def around(self, run: Run, x: Tensor, x_adv: Tensor, y: Tensor) -> Iterator[None]:
        """Copy parameters and buffers before the loss of the first step after the warm-up."""
        if is_warm_start(run):
            run.networks["revision"].load_state_dict(run.model.state_dict())
        yield


def rate_at(run: Run) -> float:
    """Return the probability of a revision update at the current step."""
    settings = run.settings
    if naturally(run):
        return 0.0
    return revision_rate(
        settings.revision_rate,
        settings.revision_rate_decay,
        settings.revision_decay_start,
        progress=run.progress,
        steps_past_start=run.position - int(settings.revision_decay_start * run.total_steps) + 1,
    )


def phase(run: Run) -> tuple[bool, bool, str]:
    """Return whether the step is of the natural warm-up or the first after it, and its mask's."""
    mask = run.policy(Conserve).phase(run) if run.settings.rgp else "none"
    return naturally(run), is_warm_start(run), mask


def check_config(config: Config) -> None:
    """Raise ``InputError`` where settings contradict one another."""
    settings = config.settings
    assert isinstance(settings, CureSettings)
    wanted = settings.natural_share > 0
    check(
        wanted == (natural_epochs(config) > 0) and natural_epochs(config) < config.optim.epochs,
        "natural_share",
        settings.natural_share,
        f"a share of --epochs {config.optim.epochs} that leaves at least one epoch on each side",
    )
    check(
        settings.revision_mode == "train" or settings.revision_buffers == "average",
        "revision_mode",
        settings.revision_mode,
        "--revision-buffers average with it: without train-mode forwards its own would never move",
    )
    check(
        settings.revision or not settings.evaluate_revision,
        "evaluate_revision",
        True,
        "a revision model to evaluate, so not --no-revision",
    )


def policies(run: Run) -> tuple[Policy, ...]:
    """Return the conserving mask and the revision, as far as they are switched on."""
    settings = run.settings
    chosen: list[Policy] = []
    if settings.rgp:
        chosen.append(Conserve(run.model, settings, active=lambda run: not naturally(run)))
    if settings.revision:
        if natural_epochs(run.config):
            chosen.append(WarmStart())
        chosen.append(
            Revision(
                run.networks["revision"],
                decay=settings.revision_decay,
                rate=rate_at,
                warmup=settings.revision_warmup,
                buffers=settings.revision_buffers,
                order=settings.revision_order,
            )
        )
    return tuple(chosen)


PAPER = "Gowda et al., Conserve-Update-Revise to Cure Generalization and Robustness, ICLR 2024"

CURE = Method(
    name="cure",
    label="CURE",
    title="CURE, the recommended choices where paper and code differ",
    paper=PAPER,
    settings=CureSettings(),
    attack=attack,
    loss=loss,
    backward=backward,
    networks=networks,
    policies=policies,
    check=check_config,
    phase=phase,
)


def _set(config: Config, **settings: object) -> Config:
    return replace(config, settings=replace(config.settings, **settings))


def _paper(config: Config) -> Config:
    return _set(config, beta=1.0, revision_warmup=False, revision_order="before")


def _official(config: Config) -> Config:
    config = unclamped_start(config)
    if config.attack.eps == 8 / 255:
        # The code trains within 0.031 and tests within 8/255.
        config = replace(
            config,
            attack=replace(config.attack, eps=0.031, step_size=0.007),
            eval=replace(config.eval, eval_eps=8 / 255),
        )
    return _set(
        config,
        beta=5.0,
        gamma=1.0,
        score="signed",
        score_loss="kl",
        mask_layers="block_conv1",
        mask_stem=False,
    )


def _efficient(config: Config) -> Config:
    config = replace(config, pretrain=replace(config.pretrain, pretrain_epochs=0))
    return _set(config, natural_share=0.4)


def _efficient_official(config: Config) -> Config:
    return _set(_efficient(unclamped_start(config)), objective="rgp", revision=False)


CURE_PAPER = replace(
    CURE,
    name="cure_paper",
    label="CURE (paper's choices)",
    title="CURE as the paper writes it",
    preset=_paper,
)
CURE_OFFICIAL = replace(
    CURE,
    name="cure_official",
    label="CURE (public code's choices)",
    title="CURE as the authors' code computes it",
    preset=_official,
)
CURE_EFF = replace(
    CURE,
    name="cure_eff",
    label="CURE_Eff",
    title="CURE_Eff: natural warm-up inside the same epochs (Appendix B)",
    preset=_efficient,
)
CURE_EFF_OFFICIAL = replace(
    CURE,
    name="cure_eff_official",
    label="CURE_Eff (public code's objective)",
    title="CURE_Eff with the objective of the authors' code, without its aliasing fault",
    preset=_efficient_official,
)
