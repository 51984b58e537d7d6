"""The fast engine's step is the eager engine's, and fit for a CUDA graph, as far as a CPU tells."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engine_runs as runs
from cure_fast.engine.copies import HALF_LAYERS
from cure_fast.kernels import TensorList, tables, workspace
from cure_fast.methods import METHODS
from cure_fast.policies import POLICIES
from cure_fast.step.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = tuple(runs.WIDTHS)
# cure_eff's natural share takes it over its warm start after the first of two epochs.
CASES = {
    **{name: (name, {}) for name in METHODS},
    "cure_eff": ("cure_eff", {"natural_share": 0.5}),
    "cure_eff_official": ("cure_eff_official", {"natural_share": 0.5}),
    "global mask": ("cure", {"mask_scope": "global"}),
    "hard freeze": ("cure", {"freeze": "hard"}),
    "prominence": ("cure", {"update": "prominence"}),
    "rgp": ("cure", {"objective": "rgp"}),
    "averaged statistics": (
        "cure",
        {"revision_buffers": "average", "revision_mode": "eval", "revision_rate": 0.9},
    ),
    "signed score": ("cure", {"score": "signed", "score_loss": "kl"}),
    "Algorithm 1": (
        "cure",
        {"inner": "ce_kl", "revision_order": "before", "revision_rate": 0.9},
    ),
    "mask of two steps": ("cure", {"mask_every": 2}),
    "no mask": ("cure", {"rgp": False, "natural_target": "detached", "inner": "ce"}),
}
EVERYWHERE = ("natural", "trades", "cure")
# Their mask has new tables at each step, so that a GPU goes on without a graph.
NOT_CAPTURABLE = ("global mask", "hard freeze")


@pytest.mark.parametrize(
    ("case", "model", "steps"),
    [(case, None, 2) for case in CASES]
    + [(case, model, 1) for case in EVERYWHERE for model in MODELS if model != "resnet-small"],
)
def test_a_step_is_the_eager_one(case, model, steps):
    """With every feature that a CPU has; cure_eff's goes over its warm start."""
    method, settings = CASES[case]
    # Of several steps the attack is the same for all methods, and so is its number.
    attack = {"attack_steps": 3 if case in EVERYWHERE and model is None else 1}
    both = runs.pair(method, model=model, data=runs.batches(1), attack=attack, **settings)
    runs.assert_steps_equal(both, steps)


@pytest.mark.parametrize("method", ["pgd_at", "cure"])
def test_an_attack_in_train_mode_is_the_eager_one(method):
    """It goes through the network itself, whose statistics it moves."""
    both = runs.pair(method, attack={"attack_mode": "train"}, data=runs.batches(1))
    runs.assert_steps_equal(both, 2)
    counted = both.fast.model.bn1.num_batches_tracked
    # Per step three attack steps, with KL the natural images too; then the passes of the loss.
    assert int(counted) == 2 * {"pgd_at": 3 + 1, "cure": 1 + 3 + 2}[method]


@pytest.mark.parametrize("method", ["pgd_at", "cure"])
def test_an_attack_in_an_l2_ball_is_the_eager_one(method):
    both = runs.pair(method, attack={"norm": "l2", "eps": 0.5}, data=runs.batches(1))
    runs.assert_steps_equal(both, 2)


@pytest.mark.parametrize("method", ["pgd_at", "cure"])
@pytest.mark.parametrize("model", ["resnet-small", "preactresnet18"])
def test_a_model_that_normalises_is_computed_alike(method, model):
    both = runs.pair(method, model=model, normalize=runs.NORMALIZE, data=runs.batches(1))
    runs.assert_steps_equal(both, 1)


@pytest.mark.parametrize(
    "optim",
    [
        {"nesterov": True},
        {"schedule": "onecycle-cosine", "nesterov": True},
        {"clip_grad": 0.01},
        {"momentum": 0.0},
        {"weight_decay": 0.0, "momentum": 0.5},
    ],
    ids=str,
)
def test_every_form_of_sgd_is_the_eager_one(optim):
    both = runs.pair("trades", optim=optim, data=runs.batches(1))
    runs.assert_steps_equal(both, 3)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_is_the_eager_one(policy):
    chosen = {policy: POLICIES[policy].settings}
    both = runs.pair("pgd_at", policies=chosen, data=runs.batches(1))
    runs.assert_steps_equal(both, 2)


WITHOUT = [("fuse",), ("fuse", "copies")]


@pytest.mark.parametrize("without", WITHOUT, ids=",".join)
@pytest.mark.parametrize("case", ["trades", "cure", "hard freeze"])
def test_each_feature_can_be_left_out(without, case):
    method, settings = CASES[case]
    both = runs.pair(method, without=without, data=runs.batches(1), **settings)
    runs.assert_steps_equal(both, 2)
    prepared = both.fast.engine.prepared
    assert prepared.update.fused == ("fuse" not in without)


# Numbers that change from step to step.


@pytest.mark.parametrize("schedule", ["cosine", "multistep", "onecycle"])
def test_numbers_arrive_in_every_step(schedule):
    both = runs.pair(
        "cure",
        data=runs.batches(3),
        optim={"schedule": schedule, "milestones": (0.4, 0.7)},
        revision_rate=0.9,
        revision_rate_decay="cosine",
    )
    rates = []
    real = both.fast.engine.step

    def noting(batch):
        terms = real(batch)
        numbers = both.fast.engine.prepared.numbers
        sent = dict(zip(numbers.functions, numbers.values[1:].tolist(), strict=False))
        assert sent["lr"] == both.fast.optimizer.param_groups[0]["lr"]
        assert sent["revision decay"] == min(1 - 1 / (both.fast.step + 2), 0.999)
        assert numbers.step == both.fast.step
        rates.append(tuple(sent.values()))
        return terms

    both.fast.engine.step = noting
    runs.assert_steps_equal(both, 6)
    revision = both.fast.policies[1]
    assert 0 < int(revision.moves) < 6
    assert len({lr for lr, *_ in rates}) >= (3 if schedule == "multistep" else 5)
    assert len({rest for _, *rest in map(tuple, rates) for rest in [tuple(rest)]}) == 6


# Half precision.


@pytest.mark.parametrize("method", ["natural", "pgd_at", "trades", "cure"])
def test_half_precision_copies_are_autocast(method):
    """The same images for all: half precision makes other attacks."""
    options = {"dtype": runs.HALF, "data": runs.batches(1), "model": "resnet-small"}
    both = runs.pair(method, **options)
    autocast = runs.pair(method, without=["copies"], **options)
    runs.patched_attack(autocast.fast, lambda made: images.kept[made.shape].clone())
    images = runs.Images()
    images.of(both.fast)
    before = {name: value.clone() for name, value in runs.tensors(both.fast).items()}
    ours, theirs = both.step(*both.fast.loader.batches[0])
    cast = runs.step(autocast.fast, *autocast.fast.loader.batches[0])
    assert both.fast.engine.prepared.copies and not autocast.fast.engine.prepared.copies
    runs.assert_equal_terms(ours, theirs, 2**-6)
    runs.assert_equal_terms(cast, theirs, 2**-6)
    for first, second in (
        (both.fast, both.eager),
        (both.fast, autocast.fast),
        (autocast.fast, both.eager),
    ):
        assert runs.half_distance(first, second, before) < runs.HALF_BOUND


class Shrinking(Policy):
    """Moves weights in a way of its own after each step."""

    def on_step(self, run, batch):
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.mul_(0.99)


@pytest.mark.parametrize("mover", ["none", "hard freeze", "shrinking"])
def test_copies_are_the_rounded_weights_after_each_step(mover):
    settings = {"freeze": "hard"} if mover == "hard freeze" else {}
    run = runs.make_run(dtype=runs.HALF, data=runs.batches(2), **settings)
    if mover == "shrinking":
        run.policies = (*run.policies, Shrinking())
    for number in range(4):
        runs.train(run, 1, start=number % 4)
        prepared = run.engine.prepared
        copied = {
            name: prepared.copies[id(parameter)]
            for name, parameter in run.model.named_parameters()
            if id(parameter) in prepared.copies
        }
        layers = [m for m in run.model.modules() if isinstance(m, HALF_LAYERS)]
        assert len(copied) == len(layers) + 1  # The classifier's bias.
        for name, copy in copied.items():
            assert torch.equal(copy, run.model.get_parameter(name).to(runs.HALF)), name
        assert prepared.rewrites == (mover != "none")


# Nothing that a CUDA graph could not hold.

# What reads a value on the host, gives a shape that depends on values, or brings a Python number
# to the device in a copy.
FORBIDDEN = (
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"),
    *("nonzero", "masked_select", "unique", "_unique2", "bincount", "lift_fresh"),
)


class OnDevice(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold.

    The kernels' package may do it: on a GPU its kernels run in place of its references, and
    addresses are sent from pinned memory that stays.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in FORBIDDEN and not self.in_kernels():
            raise AssertionError(f"{name} in a step")
        return func(*args, **(kwargs or {}))

    @staticmethod
    def in_kernels():
        return any("kernels" in Path(f.filename).parts for f in traceback.extract_stack())


def persistent(run):
    """Addresses of what steps read and write beside their own tensors."""
    prepared = run.engine.prepared
    update = prepared.update
    found = [prepared.numbers.values, prepared.counters.counts, prepared.counters.loss_is_finite]
    found += [*prepared.counters.sums.values(), *prepared.copies.values()]
    found += [t for pair in prepared.buffers for tensors in pair for t in tensors]
    for selector in run.engine.selectors.built.values():
        space = selector.workspace
        found += [space.thresholds, space.kept, space.histogram]
        found += [score for score in space.scores if score is not None]
    found += [v for p in run.policies for v in vars(p).values() if isinstance(v, torch.Tensor)]
    found += list(runs.tensors(run).values())
    objects = [*update.parts.values(), *run.engine.selectors.built.values()]
    return [tensor.data_ptr() for tensor in found], list(map(id, objects))


def refuse(*_, **__):
    raise AssertionError("a table is built in a step that should find all of them")


@pytest.mark.parametrize(
    ("case", "without"),
    [(case, ()) for case in CASES if case not in NOT_CAPTURABLE]
    + [(case, parts) for case in ("cure", "rgp") for parts in (("fuse",),)],
)
def test_a_step_stays_on_the_device(case, without, monkeypatch):
    method, settings = CASES[case]
    run = runs.make_run(
        method, data=runs.batches(4), without=without, attack={"attack_steps": 1}, **settings
    )
    # Only cure_eff's second epoch is of another kind.
    for epoch in range(2 if case.startswith("cure_eff") else 1):
        # From the second batch: the step behind a warm-up is of a kind of its own, never captured.
        runs.train(run, 3, start=epoch * 4 + 1)
        run.batch = 2
        before = persistent(run)
        with monkeypatch.context() as patch:
            patch.setattr(TensorList, "__init__", refuse)
            patch.setattr(workspace.Workspace, "__init__", refuse)
            patch.setattr(tables, "upload", refuse)
            run.engine.prepared.numbers.send()
            batch = run.loader.batch(0)
            for policy in run.policies:
                policy.before(run, batch)
            with OnDevice():
                run.engine.prepared.compute(batch)
        assert persistent(run) == before


@pytest.mark.parametrize(
    "wait",
    [
        lambda: torch.ones(()).item(),
        lambda: bool(torch.ones(2).any()),
        lambda: torch.arange(3)[torch.tensor([True, False, True])],
        lambda: torch.tensor(0.1),
        lambda: torch.equal(torch.ones(2), torch.ones(2)),
    ],
)
def test_what_a_graph_cannot_hold_is_noticed(wait):
    """So the test above can fail."""
    with pytest.raises(AssertionError, match="in a step"), OnDevice():
        wait()


def test_a_graph_is_of_no_use_on_a_cpu():
    run = runs.make_run(data=runs.batches(1))
    assert not run.engine.has("graph") and not run.engine.has("compile")
    assert all(run.engine.has(feature) for feature in ("copies", "fuse"))
