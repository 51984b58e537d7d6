"""Runs of the two engines on the same images, side by side, and what tells them apart.

The engines round differently, and a step has decisions that hang on a sign: of a pixel's gradient
in the attack, and of a score minus its threshold in the mask. So the pairs of runs here share their
adversarial images (the fast engine's; how many pixels the eager engine would have chosen otherwise
is kept), begin each step from the same state, and a weight that one of them masks and the other
does not is counted rather than compared.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cure_fast.batch import Batch
from cure_fast.config import AttackConfig, Config, ModelConfig, OptimConfig, RunConfig
from cure_fast.methods import find_method, select_method
from cure_fast.models import ImageClassifier, build_model
from cure_fast.step.policy import Policy
from cure_fast.step.state import TrainState as Run
from cure_fast.training.trainer import build_run, next_step
from tiny_step import FixedLoader, teachers_like

CPU = torch.device("cpu")
CLASSES = 10
WIDTHS = {"resnet18": 2, "preactresnet18": 2, "wrn28-10": 1, "resnet-small": 4, "vit-tiny": 8}
NORMALIZE = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))

# A relative difference that rounding explains. Float32 rounds by 6e-8; a gradient sums over a
# thousand products in another order, a dozen layers deep, which measures 1e-6 at most.
ROUNDING = 1e-5
# Weights of a run whose scores lie so close to the threshold that rounding decides. Of 20,000
# scores in a hundred thousandths of their spread about one does.
FLIPS = 3
# Share of pixels whose gradient has no certain sign. One that flips moves the image, and with it
# the gradient of the next step: 1 % in one of a hundred steps was the most.
SIGNS = 0.03

# Eight bits: a rounding is of 2^-9. Two dozen layers of them, partly correlated, in other places
# for copies, folding and autocast, make some hundredths of a gradient.
HALF = torch.bfloat16
HALF_BOUND = 2**-4


def batches(
    count: int = 4, *, size: int = 6, pixels: int = 8, last: int | None = None, seed: int = 5
) -> list[tuple[Tensor, Tensor]]:
    """Images in channels_last and labels; the last batch has ``last`` images."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        n = last if last is not None and number == count - 1 else size
        x = torch.rand(n, 3, pixels, pixels, generator=generator)
        y = torch.randint(CLASSES, (n,), generator=generator)
        found.append((x.contiguous(memory_format=torch.channels_last), y))
    return found


def make_run(
    method: str = "cure",
    engine: str = "fast",
    *,
    model: str | ImageClassifier | None = None,
    without: Sequence[str] = (),
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    data: list[tuple[Tensor, Tensor]] | None = None,
    device: torch.device = CPU,
    dtype: torch.dtype | None = None,
    attack: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    policies: dict[str, Any] | None = None,
    teachers: dict[str, ImageClassifier] | None = None,
    **settings: Any,
) -> Run:
    """Return a run of a method on a tiny network; equal calls give equal runs.

    Args:
        method: as ``--method`` takes it.
        engine: as ``--engine`` takes it.
        model: a name, or a network; for methods of transformers a small one of those.
        without: as ``--engine-without`` takes it.
        normalize: mean and deviation of a normalising first layer.
        data: batches of an epoch.
        device: where all is.
        dtype: the model's ``compute_dtype``.
        attack: changes to the attack, which starts uniformly in the ball: near x, where the KL of
            the default start is flat, rounding decides the sign of most gradients.
        optim: changes to the optimiser.
        run: changes to the run's section.
        policies: further ones by name, with their settings.
        teachers: networks by name, which the run gets copies of.
        settings: changes to the method's settings.
    """
    config = Config(
        # What methods make further networks of.
        model=ModelConfig(model="resnet-small", width=4),
        attack=AttackConfig(
            **{"eps": 0.1, "step_size": 0.03, "attack_steps": 3, "start": "uniform"}
            | (attack or {})
        ),
        optim=OptimConfig(**{"epochs": 2, "lr": 0.05, "batch_size": 6} | (optim or {})),
        run=RunConfig(
            **{"engine": engine, "engine_without": tuple(without), "log_every": 1} | (run or {})
        ),
    )
    config = select_method(config, method)
    config = replace(config, policies={**config.policies, **(policies or {})})
    if settings:
        config = replace(config, settings=replace(config.settings, **settings))
    if model is None:
        model = "vit-tiny" if find_method(method).needs_attention else "resnet-small"
    if isinstance(model, str):
        torch.manual_seed(1)
        options = {"width": WIDTHS[model], "normalize": normalize, "image_size": 8}
        model = build_model(model, num_classes=CLASSES, **options)
    model.to(device)
    model.compute_dtype = dtype
    data = batches() if data is None else data
    loader = FixedLoader([(x.to(device), y.to(device)) for x, y in data], CLASSES)
    given = teachers_like(model, method) if teachers is None else copy.deepcopy(teachers)
    return build_run(config, model, loader, device, given)


@dataclass
class Images:
    """The adversarial images of a run, kept where a CUDA graph writes them too."""

    kept: dict[torch.Size, Tensor] = field(default_factory=dict)

    def of(self, run: Run) -> None:
        """Keep a copy of what the run's attack makes from here on."""
        attack = run.method.attack

        def keeping(run: Run, batch: Batch) -> Tensor:
            made = attack(run, batch)
            if made.shape not in self.kept:
                self.kept[made.shape] = torch.empty_like(made)
            self.kept[made.shape].copy_(made.detach())
            return made

        run.method = replace(run.method, attack=keeping)

    def given_to(self, run: Run, other_pixels: list[float]) -> None:
        """Give these to a run instead of its own; note the share of pixels that differ."""
        attack = run.method.attack

        def given(run: Run, batch: Batch) -> Tensor:
            own = attack(run, batch)
            made = self.kept[own.shape]
            other_pixels.append(((own - made).abs() > 1e-5).float().mean().item())
            return made.clone(memory_format=torch.preserve_format)

        run.method = replace(run.method, attack=given)


@dataclass
class Pair:
    """A run of the fast engine, and one of the eager engine that follows it."""

    fast: Run
    eager: Run
    # Of each step: share of pixels that the eager engine would have chosen otherwise.
    other_pixels: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert (self.fast.engine.name, self.eager.engine.name) == ("fast", "eager")
        images = Images()
        images.of(self.fast)
        images.given_to(self.eager, self.other_pixels)

    def align(self) -> None:
        """Give the eager run the fast one's state."""
        align(self.fast, self.eager)

    def step(self, x: Tensor, y: Tensor) -> tuple[Any, Any]:
        """Take a step of each; return their terms."""
        return step(self.fast, x, y), step(self.eager, x, y)


def pair(method: str = "cure", *, without: Sequence[str] = (), **options: Any) -> Pair:
    """Return two equal runs of a method; see :func:`make_run`."""
    return Pair(
        make_run(method, "fast", without=without, **options),
        make_run(method, "eager", **options),
    )


@torch.no_grad()
def align(source: Run, target: Run) -> None:
    """Copy weights, statistics and momenta, in place."""
    for name, network in source.all_networks.items():
        for tensor, own in zip(
            network.state_dict().values(),
            target.all_networks[name].state_dict().values(),
            strict=True,
        ):
            own.copy_(tensor)
    for parameter, own in zip(source.model.parameters(), target.model.parameters(), strict=True):
        buffer = momentum(source, parameter)
        state = target.optimizer.state[own]
        if buffer is not None and state.get("momentum_buffer") is not None:
            state["momentum_buffer"].copy_(buffer)


def momentum(run: Run, parameter: Tensor) -> Tensor | None:
    """Return a momentum buffer, or None where there is none."""
    return run.optimizer.state[parameter].get("momentum_buffer")


def tensors(run: Run) -> dict[str, Tensor]:
    """Return everything that a step moves, by name: weights, statistics, momenta."""
    found = {
        f"{name}.{key}": value
        for name, network in run.all_networks.items()
        for key, value in network.state_dict().items()
    }
    for name, parameter in run.model.named_parameters():
        buffer = momentum(run, parameter)
        if buffer is not None:
            found[f"momentum.{name}"] = buffer
    return found


def snapshot(run: Run) -> dict[str, Tensor]:
    """Return copies of everything that a step moves, and of what counts it."""
    run.engine.flush()
    counters = {
        f"policies.{place}.{name}": value.clone()
        for place, policy in enumerate(run.policies)
        for name, value in counts(policy).items()
    }
    return {name: value.detach().clone() for name, value in tensors(run).items()} | counters


def counts(policy: Policy) -> dict[str, Tensor]:
    """Return what a policy keeps, without what the mask tells of its epoch's last step.

    That is of the step tried last, and no epoch's row takes it where that step was left out.
    """
    kept = policy.state_dict()
    return flat(
        {k: v for k, v in kept.items() if k not in {"begun", "masks", "energies", "prominent"}}
    )


def flat(value: Any, name: str = "") -> dict[str, Tensor]:
    """Return the tensors and numbers in nested dictionaries and lists, by their path."""
    if value is None:
        return {}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in flat(item, f"{name}/{key}").items()}
    return {name: torch.as_tensor(value)}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that differ in any bit, or are in one of them alone."""
    return [
        name
        for name in {**a, **b}
        if name not in a or name not in b or not torch.equal(a[name], b[name])
    ]


def distance(a: Tensor, b: Tensor) -> float:
    """Return the difference relative to the length of ``b``; integers must be equal."""
    if not b.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    a, b = a.double(), b.double()
    found = float((a - b).norm() / b.norm().clamp_min(1e-12))
    return float("inf") if math.isnan(found) else found


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest distance of two states, and of which tensor."""
    assert a.keys() == b.keys()
    return max((distance(a[name], b[name]), name) for name in a)


def masked_otherwise(runs: Pair, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return by parameter where one run masked the gradient and the other did not.

    Where it is masked, the step adds weight decay alone to the momentum.
    """
    optim = runs.fast.config.optim
    found = {}
    for name, parameter in runs.fast.model.named_parameters():
        own = dict(runs.eager.model.named_parameters())[name]
        w = before[f"model.{name}"]
        old = before.get(f"momentum.{name}", torch.zeros_like(w))
        still = optim.momentum * old + optim.weight_decay * w
        ours, theirs = momentum(runs.fast, parameter), momentum(runs.eager, own)
        if ours is None or theirs is None:
            assert ours is theirs and not optim.momentum
            found[name] = torch.zeros_like(w, dtype=torch.bool)
            continue
        # Far below any gradient that matters, above the rounding of the product.
        bound = 1e-6 * still.abs() + 1e-12
        masked = ((ours - still).abs() <= bound, (theirs - still).abs() <= bound)
        found[name] = masked[0] ^ masked[1]
    return found


def assert_equal_step(
    runs: Pair, before: dict[str, Tensor], *, bound: float = ROUNDING, flips: int = FLIPS
) -> None:
    """Assert that the step after ``before`` moved both runs alike, but for rounding."""
    otherwise = masked_otherwise(runs, before)
    assert sum(int(flipped.sum()) for flipped in otherwise.values()) <= flips
    ours, theirs = tensors(runs.fast), tensors(runs.eager)
    assert ours.keys() == theirs.keys()
    for name, flipped in otherwise.items():
        for key in {f"model.{name}", f"momentum.{name}"} & ours.keys():
            ours[key] = torch.where(flipped, theirs[key], ours[key])
    found, name = worst(ours, theirs)
    assert found <= bound, f"{name}: {found:.1e}"


def assert_equal_terms(ours: Any, theirs: Any, bound: float = ROUNDING) -> None:
    """Assert that both have the same terms but for rounding."""
    assert ours is not None and theirs is not None and ours.keys() == theirs.keys()
    scale = max((abs(float(value)) for value in theirs.values()), default=0)
    for name in theirs:
        # Of the largest: a KL of nearly equal logits is a small difference of large numbers.
        assert abs(float(ours[name] - theirs[name])) <= bound * scale, name


def assert_equal_counters(runs: Pair, bound: float = ROUNDING) -> None:
    """Assert that policies and run counted the same."""
    for run in (runs.fast, runs.eager):
        run.engine.flush()
    for name in ("counted", "skipped", "skipped_in_row", "step", "batch"):
        assert getattr(runs.fast, name) == getattr(runs.eager, name), name
    # A term of skipped steps alone has a sum of 0, or none.
    assert_equal_terms(runs.fast.sums, runs.eager.sums, bound)
    for ours, theirs in zip(runs.fast.policies, runs.eager.policies, strict=True):
        first, second = counts(ours), counts(theirs)
        assert first.keys() == second.keys()
        for key, value in first.items():
            torch.testing.assert_close(value, second[key], rtol=bound, atol=bound, msg=key)


def step(run: Run, x: Tensor, y: Tensor) -> dict[str, Tensor] | None:
    """Take a step on images; return its terms."""
    return next_step(run, Batch(x, y, torch.arange(len(y), device=y.device)))[1]


def reach(run: Run, place: int) -> None:
    """Go to a step of the run; a new epoch counts anew, as in training."""
    epoch, batch = divmod(place, run.loader.batches_per_epoch)
    if epoch != run.epoch:
        run.engine.flush()
        run.engine.reset_sums()
    run.epoch, run.batch = epoch, batch


def train(run: Run, number: int, start: int = 0) -> list[dict[str, Tensor] | None]:
    """Take steps on the run's batches in turn, from epoch to epoch; return clones of the terms."""
    found = []
    for place in range(start, start + number):
        reach(run, place)
        terms = step(run, *run.loader.batches[run.batch])  # pyright: ignore[reportAttributeAccessIssue]
        found.append(None if terms is None else {k: v.clone() for k, v in terms.items()})
    return found


def totals(terms: Iterable[dict[str, Tensor] | None]) -> list[float]:
    """Return the total losses of steps."""
    return [float("nan") if found is None else float(found["total"]) for found in terms]


def patched_attack(run: Run, change: Callable[[Tensor], Tensor]) -> None:
    """Let ``change`` follow the run's attack."""
    attack = run.method.attack
    run.method = replace(run.method, attack=lambda run, batch: change(attack(run, batch)))


def assert_steps_equal(
    both: Pair, count: int, *, bound: float = ROUNDING, signs: float = SIGNS, **bounds: Any
) -> None:
    """Take steps from equal states, each of them equal."""
    for place in range(count):
        for run in (both.fast, both.eager):
            reach(run, place)
        both.align()
        before = snapshot(both.fast)
        ours, theirs = both.step(*both.fast.loader.batches[both.fast.batch])
        assert_equal_terms(ours, theirs, bound)
        assert_equal_step(both, before, bound=bound, **bounds)
        assert differing(before, snapshot(both.fast))  # It has moved.
    assert_equal_counters(both, bound)
    if both.fast.method.uses_attack:
        assert max(both.other_pixels) <= signs


def half_distance(first: Run, second: Run, before: dict[str, Tensor]) -> float:
    """Return the distance of two steps from ``before``, relative to the longer of the steps."""
    steps = []
    for run in (first, second):
        now = tensors(run)
        flat = [
            (now[name] - before[name]).flatten()
            for name, value in before.items()
            if name.startswith("model.") and value.is_floating_point()
        ]
        steps.append(torch.cat(flat))
    return float((steps[0] - steps[1]).norm() / max(step.norm() for step in steps))
