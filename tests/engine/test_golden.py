"""Losses of 20 steps that must not change: of every method, and with every recipe's settings.

The eager engine in float64 is held to the stored losses; the fast engine's float32 losses follow
them. Where a change of the computation is meant, write the file anew and look at the difference:

    PYTHONPATH=tests/support python tests/engine/test_golden.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import engine_runs as runs
from cure_fast import attacks
from cure_fast.config import Config
from cure_fast.methods import METHODS, select_method
from cure_fast.recipes import RECIPES, find_recipe
from cure_fast.training.trainer import build_run
from tiny_step import FixedLoader, small_model, teachers_like

pytestmark = pytest.mark.usefixtures("one_thread")

STORED = Path(__file__).with_name("golden_losses.json")
STEPS, PER_EPOCH = 20, 4
CASES = [f"method {name}" for name in METHODS] + [f"recipe {name}" for name in RECIPES]
# Kinds of loss and of what goes on from step to step: a mask and an average, phases, perturbed
# weights, weights of images, also from an epoch on, a state of each image, a teacher, a second
# network, a schedule, and a recipe. In test_fast.py each method's steps are the eager ones.
KINDS = (
    *("method cure", "method cure_eff", "method awp_at", "method mart", "method te_trades"),
    *("method ard", "method lbgat", "method fat", "method fgsm_pgi", "method mail_trades"),
    "recipe cifar10-resnet18-fast",
)
CPU = torch.device("cpu")


def golden_config(case):
    """A recipe's or method's settings, schedule and optimiser, for a tiny network.

    In a deep network the last BatchNorms would see six values each, and float32 would be lost in a
    few steps: by a tenth of the loss after five steps of ResNet-18.
    """
    kind, name = case.split(" ")
    config = find_recipe(name if kind == "recipe" else "quickstart")
    if kind == "method":
        config = select_method(config, name)
    plain = Config()
    return replace(
        config,
        # What the run below takes no notice of, so that recipes that differ in it alone run once.
        **{part: getattr(plain, part) for part in ("name", "data", "model", "pretrain", "eval")},
        # The uniform start: at the default one the KL is so flat that rounding decides signs.
        attack=replace(config.attack, attack_steps=1, start="uniform"),
        # A tenth of the rate: six images make steps of a hundred too wild to be followed.
        optim=replace(
            config.optim, epochs=STEPS // PER_EPOCH, batch_size=6, lr=config.optim.lr / 10
        ),
    )


def losses(case, engine, dtype):
    """Total losses of the steps."""
    config = golden_config(case)
    key = repr((config, engine, dtype))  # Recipes of one method are alike here.
    if key not in FOUND:
        FOUND[key] = _losses(config, engine, dtype)
    return FOUND[key]


FOUND: dict[str, list[float]] = {}


def _losses(config, engine, dtype):
    config = replace(config, run=replace(config.run, engine=engine, log_every=1))
    torch.manual_seed(11)
    model = small_model(config.method, num_classes=runs.CLASSES)
    data = [(x.to(dtype), y) for x, y in runs.batches(PER_EPOCH)]
    taught = teachers_like(model.to(dtype), config.method)
    run = build_run(config, model.to(dtype), FixedLoader(data, runs.CLASSES), CPU, taught)
    assert run.engine.name == engine
    real = attacks.start_point

    def start_point(x, *, eps, start, norm, clamp_start, generator, draw):
        # In float32, as other dtypes draw other numbers.
        if isinstance(eps, torch.Tensor):
            noise = torch.empty(x.shape).uniform_(-1, 1, generator=generator)
            noise *= eps.view(-1, 1, 1, 1)
        else:
            noise = torch.empty(x.shape).uniform_(-eps, eps, generator=generator)
        return real(x, eps=eps, start=noise.to(x.dtype), norm=norm, clamp_start=clamp_start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacks, "start_point", start_point)
        return runs.totals(runs.train(run, STEPS))


@pytest.fixture(scope="module")
def stored():
    return json.loads(STORED.read_text(encoding="utf-8"))


def test_every_method_and_recipe_has_its_losses(stored):
    assert list(stored) == CASES
    assert all(len(values) == STEPS for values in stored.values())
    # They learn; cure_eff_official's loss has another term once its warm-up is over, and ARD's
    # teacher, at temperature 30, says the same of all images.
    learned = {case for case in CASES if sum(stored[case][-4:]) < sum(stored[case][:4])}
    assert learned == {*CASES} - {"method cure_eff_official", "method ard"}


@pytest.mark.parametrize("case", CASES)
def test_the_eager_engine_has_the_stored_losses(case, stored):
    # Float64 rounds by 1e-16; a flipped sign or mask would show in the third digit.
    assert losses(case, "eager", torch.float64) == pytest.approx(stored[case], rel=1e-6)


# Of float32 sums in another order: 4e-7 at most, with two sets of convolution kernels. Where the
# sign of a pixel's gradient or a mask flips by float32's rounding, in either engine, six small
# images feel it: 1.1e-2 at most.
ROUNDING, FLIPPED = 1e-5, 0.05
# ARD's KL of 1e-4 is a difference of logarithms that are alike to four digits: 8e-4 measured.
FIRST = {"method ard": 2e-3}


def off(case):
    """Relative differences of the fast engine's losses from the stored ones."""
    golden = torch.tensor(json.loads(STORED.read_text(encoding="utf-8"))[case])
    return (torch.tensor(losses(case, "fast", torch.float32)) / golden - 1).abs()


# They draw noise of their own, in float32 other numbers than in float64.
OWN_NOISE = ("method n_fgsm", "method st_at")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case in KINDS else pytest.mark.slow)
        for case in CASES
        if case not in OWN_NOISE
    ],
)
def test_the_fast_engine_follows_them(case):
    assert off(case)[0] < FIRST.get(case, ROUNDING) and off(case).max() < FLIPPED


def test_few_runs_of_the_fast_engine_leave_them_by_more_than_rounding():
    # Three in four stay within rounding for all their steps, with either set of kernels.
    assert sum(bool(off(case).max() < ROUNDING) for case in KINDS) >= 4


def main():
    golden = {case: losses(case, "eager", torch.float64) for case in CASES}
    STORED.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
