"""LAS-AT: a second network learns how to attack each image (Jia et al., CVPR 2022).

Arxiv 2203.06616, official code jiaxiaojunQAQ/LAS-AT. A strategy network draws for each image the
radius, the number of steps and their length of the attack on it, which raises the cross-entropy
from a uniform start in the ball of --eps; the trained network minimises the cross-entropy of x' to
labels of which the true class has 0.7. Every 20 steps the strategy is first taught by REINFORCE: it
plans an attack in training mode, and minimises -R * sum over choices of mean log p(choice), where

R = min(CE(x', y), 10) + 4 * robust accuracy + 2 * natural accuracy

with the accuracies on the batch of a copy of the trained network after a step of SGD on x'. The
attack on the copy has two restarts and moves only images that are classified rightly yet; the copy
is in training mode meanwhile, as in the official code.

Differences to that code: radii and step lengths are in eighths of --eps, which is 1/255 for 8/255;
the strategy's own schedule, whose drops that code never reaches, is left out; the attack always
takes as many steps as the most that can be chosen, of which those beyond an image's number are of
length 0; the attack on the copy does not end early where no image is classified rightly. The
strategy computes in float32, and is taught on whole batches, which --micro-batch-size does not cut.
What is not finite teaches it nothing.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cure_fast.batch import Batch, weighed
from cure_fast.classifier import ImageClassifier, attack_mode
from cure_fast.config import MethodSettings
from cure_fast.config.checks import POSITIVE, Bounds, Count, check
from cure_fast.losses import cross_entropy
from cure_fast.methods.lbgat import architecture_beside, check_architecture
from cure_fast.models.building import build_like
from cure_fast.step.method import Method, SetUp, rows
from cure_fast.step.policy import Policy
from cure_fast.step.run import Run, Terms
from cure_fast.step.state import Statistics


class LasSettings(MethodSettings):
    """LAS-AT. --step-size and --attack-steps are of the attack that measures the reward alone."""

    true_share: Annotated[float, Bounds(0.5, 1)] = 0.7
    """Share of the true class in the labels of the loss, 0.5 to 1; the others share the rest."""
    strategy: str | None = None
    """Architecture of the strategy network; None takes ResNet-18 for a wide ResNet (paper), and for
    others another one like them."""
    strategy_eps: tuple[int, ...] = tuple(range(3, 16))
    """Radii to choose from, in eighths of --eps, 1 to 1000 (paper: 255ths, from 3 to 15)."""
    strategy_steps: tuple[int, ...] = tuple(range(3, 15))
    """Numbers of attack steps to choose from, 1 to 1000."""
    strategy_step_sizes: tuple[int, ...] = tuple(range(1, 6))
    """Lengths of a step to choose from, in eighths of --eps, 1 to 1000."""
    strategy_every: Count = 20
    """Training steps from one lesson of the strategy to the next, 1 or more."""
    strategy_lr: Annotated[float, Bounds(POSITIVE, 1000)] = 1e-4
    """Learning rate of the strategy, above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("strategy_eps", "strategy_steps", "strategy_step_sizes"):
            choices = getattr(self, name)
            rising = bool(choices) and list(choices) == sorted({*choices})
            inside = rising and 1 <= choices[0] and choices[-1] <= 1000
            check(inside, name, choices, "one or more increasing whole numbers from 1 to 1000")


class Strategy(nn.Module):
    """A network whose logits are the scores of several choices, one behind the other."""

    def __init__(self, network: ImageClassifier, sizes: list[int]) -> None:
        super().__init__()
        self.network, self.sizes = network, sizes

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the log-probabilities [N, size] of each choice for images [N, C, H, W]."""
        return [F.log_softmax(part, dim=1) for part in self.network(x).split(self.sizes, dim=1)]


class Strategist(Policy):
    """Plans the attack of each step, and teaches the strategy what the trained network needs."""

    moves_weights = False

    def __init__(self, run: Run) -> None:
        super().__init__()
        settings = run.settings
        chosen = (settings.strategy_eps, settings.strategy_steps, settings.strategy_step_sizes)
        self.choices = [torch.tensor(values, device=run.device) for values in chosen]
        network = build_like(
            run.model,
            seed=run.config.run.seed,
            model=architecture_beside(run, settings.strategy),
            num_classes=sum(map(len, chosen)),
        )
        network.compute_dtype = None
        self.strategy = Strategy(network, [*map(len, chosen)]).to(run.device).eval()
        self.networks = {"strategy": self.strategy}
        self.period = settings.strategy_every
        # Without momentum it has no state that a checkpoint would have to hold.
        self.optimizer = torch.optim.SGD(self.strategy.parameters(), lr=settings.strategy_lr)
        self.reward = torch.zeros((), device=run.device)
        self.state = {"reward": self.reward}

    def before(self, run: Run, batch: Batch) -> None:
        """Teach the strategy where that is due, and leave a plan of the step's attack as notes."""
        if (run.step + 1) % run.settings.strategy_every == 0:
            self.teach(run, batch)
        with torch.no_grad():
            self.plan(run, batch, self.strategy(batch.x))

    def plan(self, run: Run, batch: Batch, scores: list[Tensor]) -> Tensor:
        """Draw a plan, leave it as notes, and return its log-probability, the mean over images."""
        unit, log_p = run.config.attack.eps / 8, torch.zeros((), device=run.device)
        source, drawn = run.generators["attack"], []
        for values, score in zip(self.choices, scores, strict=True):
            # A draw by the probabilities, without a look at them.
            like = torch.empty(score.shape, device=run.device)
            noise = run.drawn(like, partial(Tensor.exponential_, generator=source))
            place = (score.detach().exp() / noise).argmax(dim=1)
            log_p = log_p + score.gather(1, place[:, None]).mean()
            drawn.append(values[place])
        eps, steps, step_size = drawn
        batch.notes.update(eps=unit * eps, steps=steps, step_size=unit * step_size)
        return log_p

    def teach(self, run: Run, batch: Batch) -> None:
        """Move the strategy towards plans of high reward (REINFORCE)."""
        (trial,), statistics = batch.split(1), Statistics([self.strategy])
        statistics.keep()
        self.strategy.train()
        log_p = self.plan(run, trial, self.strategy(batch.x))
        with attack_mode(run.model, "eval"):
            trial = trial.attacked(attack(run, trial))
        reward = reward_of(run, trial)
        weighed(-reward * log_p, run.part).backward()
        add_up_gradients(run, self.strategy)
        norm = nn.utils.clip_grad_norm_(self.strategy.parameters(), 1.0)
        if norm.isfinite():
            self.optimizer.step()
            self.reward.copy_(reward)
        else:
            statistics.restore()
        self.optimizer.zero_grad()
        self.strategy.eval()

    def epoch_metrics(self, run: Run) -> dict[str, Any]:
        """Return the reward of the last lesson, 0 before the first."""
        return {"reward": float(self.reward)}


def attack(run: Run, batch: Batch) -> Tensor:
    """Return images attacked as the notes plan it."""
    left, step_size = batch.notes["steps"].clone(), batch.notes["step_size"].clone()
    eps = torch.full_like(step_size, run.config.attack.eps)

    def objective(logits: Tensor) -> Tensor:
        # The start is in the ball of --eps; each step leads into the image's own.
        eps.copy_(batch.notes["eps"])
        step_size.mul_(left > 0)
        left.sub_(1)
        return cross_entropy(logits, batch.y).sum()

    steps = max(run.settings.strategy_steps)
    return run.pgd(batch.x, objective, eps=eps, step_size=step_size, steps=steps, start="uniform")


def smoothed(run: Run, logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy to labels of which other classes have a part."""
    classes = logits.shape[1]
    # Torch spreads its share over all classes, the true one included.
    spread = (1 - run.settings.true_share) * classes / (classes - 1)
    return F.cross_entropy(logits, y, label_smoothing=spread)


def loss(run: Run, batch: Batch) -> Terms:
    """Return the cross-entropy of x' to smoothed labels."""
    total = smoothed(run, run.model(batch.x_adv), batch.y)
    return {"total": total, "smoothed_ce": total}


def reward_of(run: Run, batch: Batch) -> Tensor:
    """Return how far x' fools the network, and how good a step on x' makes a copy of it."""
    with torch.no_grad(), attack_mode(run.model, "eval"):
        fooled = run.mean(cross_entropy(run.model(batch.x_adv), batch.y)).clamp(max=10)
    student, decay = copy.deepcopy(run.model), run.config.optim.weight_decay
    weighed(smoothed(run, student(batch.x_adv), batch.y), run.part).backward()
    add_up_gradients(run, student)
    torch.optim.SGD(student.parameters(), lr=run.lr, weight_decay=decay).step()
    images = strongest(run, batch, student)
    with torch.no_grad(), attack_mode(student, "eval"):
        robust, natural = (
            run.mean((student(x).argmax(dim=1) == batch.y).float()) for x in (images, batch.x)
        )
    return fooled + 4 * robust + 2 * natural


def add_up_gradients(run: Run, network: nn.Module) -> None:
    """Give a network of the whole batch's loss its gradients."""
    run.add_up([p.grad for p in network.parameters() if p.grad is not None])


def strongest(run: Run, batch: Batch, student: ImageClassifier) -> Tensor:
    """Return images of the higher cross-entropy of two attacks, by the student in training mode."""
    images, highest = batch.x, torch.zeros(len(batch), device=run.device)
    step_size = torch.zeros_like(highest)

    def objective(logits: Tensor) -> Tensor:
        step_size.copy_(run.config.attack.step_length * (logits.argmax(dim=1) == batch.y))
        return cross_entropy(logits, batch.y).sum()

    with torch.no_grad(), attack_mode(student, "train"):
        for _ in range(2):
            x_adv = run.pgd(
                batch.x, objective, network=student, step_size=step_size, start="uniform"
            )
            each = cross_entropy(student(x_adv), batch.y)
            images = torch.where((each >= highest).view(-1, 1, 1, 1), x_adv, images)
            highest = torch.maximum(highest, each)
    return images


official = partial(
    SetUp,
    "jiaxiaojunQAQ/LAS-AT, wide ResNets",
    epochs=110,
    milestones=(99 / 110, 104 / 110),
    start="uniform",
)

LAS_AT = Method(
    name="las_at",
    label="LAS-AT",
    title="LAS-AT: a second network learns how to attack each image",
    arxiv="2203.06616",
    paper="Jia et al., LAS-AT: Adversarial Training with Learnable Attack Strategy, CVPR 2022",
    settings=LasSettings(),
    attack=attack,
    loss=loss,
    policies=lambda run: (Strategist(run),),
    check=check_architecture("strategy"),
    published={"*/wrn*": official(), "*": official()},
    fixed=("strategy", "strategy_eps", "strategy_steps", "strategy_step_sizes"),
    rows=rows("LAS-AT", ("cifar10", "resnet18", " (CURE's Table 1)", 82.39, 53.70, 51.96, 49.94)),
)
