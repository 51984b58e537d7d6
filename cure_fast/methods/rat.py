"""RAT: randomised adversarial training by Taylor expansion (Jin et al., CVPR 2023).

Arxiv 2303.10653, official code Alexkael/Randomized-Adversarial-Training. The paper expands TRADES'
loss of noisy weights to second order. Its code, which is followed here, attacks a copy of the
network with noise on its convolutions, and adds soft targets to the loss at the plain weights:

    L = (1 - alpha) CE(x, y) + alpha (T1 + c2 T2) + beta KL(p(x) || p(x')),
    T = [KL(S' || p(x')) + KL(S || p(x))] / 2.

The targets come from the gradients g(x), g(x') of CE(x, y) and CE(x', y) by the classifier's
weight, each summed to a number per class. T1 has S' of the gap |g(x)| - |g(x')| and S of its
negative; T2 has both, the code's slip, of g(x')^2 - g(x)^2 (``rat_fix_second``). A gap v, less its
minimum, shares out what the label does not have: to class k in the proportion of v_k.

The code passes images through the network eight times, here once each. Where the proportions are
0/0 there, they are equal here. A batch that is cut in passes has other targets in each of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.config import Config, MethodSettings
from cure_fast.config.checks import Share, Weight, check
from cure_fast.losses import cross_entropy, kl_divergence, kl_divergence_from
from cure_fast.methods.trades import unclamped_start
from cure_fast.policies.average import frozen_copy
from cure_fast.step.method import Method, SetUp, rows
from cure_fast.step.policy import Policy
from cure_fast.step.run import Run, Terms

# Against the sum of a gap, which is 1: too little to see beside a class that has a share.
TRACE = 1e-12


class RatSettings(MethodSettings):
    """RAT."""

    beta: Weight = 6.0
    """Weight of KL(p(x) || p(x')), 0 or more."""
    rat_alpha: Share = 0.2
    """Weight of the soft targets, 0 to 1; the labels have the rest."""
    rat_second: Weight = 0.5
    """Weight of the second order's targets beside the first's, 0 or more (code with AWP: 0.2)."""
    rat_fix_second: bool = False
    """Give x' the second order's gap g(x)^2 - g(x')^2, as in the first order, and not that of x."""
    rat_share: Share | None = None
    """Share of a soft target that the other classes have, 0 to 1; None takes 1 - 2/K for K classes
    (code: 0.8 for 10 and 0.98 for 100)."""
    rat_noise: Weight = 1e-4
    """Deviation of the noise on the weights of the attacked copy, 0 or more."""


class Noisy(Policy):
    """Keeps what is attacked: a copy of the network with noise on what is named a convolution."""

    moves_weights = False

    def __init__(self, run: Run) -> None:
        super().__init__()
        name = run.config.model.model
        known = bool(run.model.classifier_name)
        check(known, "model", name, "a network with an nn.Linear for its logits with --method rat")
        # No network of the run's: a checkpoint need not have what each step draws anew.
        self.network = frozen_copy(run.model).eval()
        self.generator = torch.Generator(run.device)

    @torch.no_grad()
    def before(self, run: Run, batch: Batch) -> None:
        """Take over weights and statistics, and draw the step's noise."""
        self.generator.manual_seed(run.step_seed)
        for own, theirs in zip(self.network.buffers(), run.model.buffers(), strict=True):
            own.copy_(theirs)
        theirs = dict(run.model.named_parameters())
        for name, own in self.network.named_parameters():
            own.copy_(theirs[name])
            if "conv" in name:
                noise = torch.empty_like(own).normal_(generator=self.generator)
                own.add_(noise, alpha=run.settings.rat_noise)


def attack(run: Run, batch: Batch) -> Tensor:
    """Return PGD images that raise KL(p(x) || p(x')) of the noisy copy."""
    network = run.policy(Noisy).network
    with torch.no_grad():
        kl = kl_divergence_from(network(batch.x))
    return run.pgd(batch.x, lambda logits: kl(logits).sum(), network=network)


def soft_targets(gap: Tensor, y: Tensor, share: float | None) -> Tensor:
    """Return targets [N, K]: 1 - share for the label y [N], the rest by the gap [K]."""
    share = 1 - 2 / len(gap) if share is None else share
    gap = gap - gap.min()
    own = torch.eye(len(gap), dtype=gap.dtype, device=gap.device)
    smallest = torch.finfo(gap.dtype).tiny
    others = (1 - own) * (gap / gap.sum().clamp(min=smallest) + TRACE)
    table = share * others / others.sum(dim=1, keepdim=True) + (1 - share) * own
    return table[y]


def loss(run: Run, batch: Batch) -> Terms:
    """Return the losses of labels and soft targets, and TRADES' KL."""
    settings = run.settings
    logits, logits_adv = run.model(batch.x), run.model(batch.x_adv)
    natural_ce, adversarial_ce = (cross_entropy(z, batch.y).mean() for z in (logits, logits_adv))
    weight = run.model.get_submodule(run.model.classifier_name).get_parameter("weight")
    g, g_adv = (
        run.engine.derive(ce, [weight])[0].sum(dim=1) for ce in (natural_ce, adversarial_ce)
    )

    def soft(gap_adv: Tensor, gap: Tensor) -> Tensor:
        each = [
            F.kl_div(
                F.log_softmax(z, dim=1),
                soft_targets(v, batch.y, settings.rat_share),
                reduction="batchmean",
            )
            for v, z in ((gap_adv, logits_adv), (gap, logits))
        ]
        return (each[0] + each[1]) / 2

    first, second = g.abs() - g_adv.abs(), g_adv.square() - g.square()
    by_targets = soft(first, -first) + settings.rat_second * soft(
        -second if settings.rat_fix_second else second, second
    )
    kl = kl_divergence(logits, logits_adv).mean()
    labels = (1 - settings.rat_alpha) * natural_ce + settings.rat_alpha * by_targets
    total = labels + settings.beta * kl
    return {"total": total, "natural_ce": natural_ce, "soft": by_targets, "kl": kl}


def check_mode(config: Config) -> None:
    """Raise ``InputError`` for an attack in training mode."""
    mode = config.attack.attack_mode
    wanted = "eval with --method rat, whose noisy copy is attacked in evaluation mode"
    check(mode == "eval", "attack_mode", mode, wanted)


RAT = Method(
    name="rat",
    label="RAT",
    title="RAT: TRADES on a noisy copy's images, with soft targets from the classifier's gradients",
    arxiv="2303.10653",
    paper="Jin et al., Randomized Adversarial Training via Taylor Expansion, CVPR 2023",
    settings=RatSettings(),
    attack=attack,
    loss=loss,
    policies=lambda run: (Noisy(run),),
    check=check_mode,
    published={"*": SetUp("Alexkael/Randomized-Adversarial-Training", clamp_start=False)},
    # Of SVHN a table has more under AutoAttack than under PGD, which cannot be of one network.
    rows=rows(
        "RAT",
        ("cifar10", "resnet18", ", best epoch (PIAT's Table I)", 81.63, 52.25, 49.47, 45.20),
        ("cifar100", "resnet18", ", best epoch (PIAT's Table I)", 53.35, 28.69, 25.52, 23.10),
        ("cifar10", "wrn32-10", " (PIAT's Table II)", 83.46, 57.07, None, 51.56),
        ("cifar100", "wrn32-10", " (PIAT's Table II)", 60.89, 33.39, None, 27.95),
    ),
    preset=unclamped_start,
)
