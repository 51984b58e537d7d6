"""Options that trade exactness for time: a mask that is kept for steps, an attack that grows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny_step
from cure_fast import attacks
from cure_fast.errors import InputError
from cure_fast.methods.cure import CureSettings
from cure_fast.models import build_model
from cure_fast.policies.conserve import Conserve
from cure_fast.step import run as run_module
from cure_fast.training import trainer
from cure_fast.training.trainer import next_step

# With neither momentum nor weight decay a masked weight does not move.
PLAIN = {"momentum": 0.0, "weight_decay": 0.0}


def run_of(engine="eager", epochs=2, attack=None, **settings):
    torch.manual_seed(4)
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(4, 8, 3, 8, 8, generator=generator)
    batches = [
        (x.to(memory_format=torch.channels_last), torch.randint(4, (8,), generator=generator))
        for x in images
    ]
    run = tiny_step.tiny_run(
        "cure",
        batches=batches,
        model=build_model("resnet-small", num_classes=4, width=3),
        dtype=torch.float32,
        attack={"start": "uniform"},
        **settings,
    )
    config = replace(
        run.config,
        optim=replace(run.config.optim, epochs=epochs, lr=0.05, **PLAIN),
        run=replace(run.config.run, engine=engine, log_every=1),
        attack=replace(run.config.attack, **(attack or {})),
    )
    run = trainer.build_run(config, run.model, run.loader, run.device)
    assert run.engine.name == engine
    return run


def moves(run, batch):
    """Which maskable weights a step moves."""
    parameters = run.policy(Conserve).parameters
    before = [p.detach().clone() for p in parameters]
    next_step(run, batch)
    return [p != old for p, old in zip(parameters, before, strict=True)]


def masks(run):
    found = run.policy(Conserve).selection
    return [s < limit for s, limit in zip(found.scores, found.thresholds, strict=True)]


@pytest.mark.parametrize("engine", ["eager", "fast"])
def test_a_mask_is_kept_until_the_next_selection(engine):
    run = run_of(engine, mask_every=3)
    batches = [*run.loader]
    moved = [moves(run, batches[0])]
    first = masks(run)
    moved += [moves(run, batch) for batch in batches[1:3]]
    assert all(map(torch.equal, masks(run), first))
    for step in moved:
        # A weight that may move can stay, where its gradient is below its last bit.
        assert not any((which & mask).any() for which, mask in zip(step, first, strict=True))
        assert all(
            which[~mask].float().mean() > 0.5 for which, mask in zip(step, first, strict=False)
        )
    moves(run, batches[3])
    assert not all(map(torch.equal, masks(run), first))


@pytest.mark.parametrize("engine", ["eager", "fast"])
def test_steps_between_compute_no_gradients_of_the_score(engine, monkeypatch):
    run, asked = run_of(engine, mask_every=2), []
    conserve = run.policy(Conserve)
    real = conserve.on_grads

    def watched(run):
        asked.append(sorted(run.gradients))
        real(run)

    monkeypatch.setattr(conserve, "on_grads", watched)
    for batch in run.loader:
        next_step(run, batch)
    assert asked == [["adversarial_ce", "natural_ce"], [], ["adversarial_ce", "natural_ce"], []]


def test_each_epoch_begins_with_a_selection():
    run = run_of(mask_every=3)
    phases = []
    for _ in range(2):
        for batch in run.loader:
            phases.append(run.policy(Conserve).phase(run))
            next_step(run, batch)
        run.epoch, run.batch = run.epoch + 1, 0
    assert phases == ["select", "keep", "keep", "select"] * 2


@pytest.mark.parametrize("engine", ["eager", "fast"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_run_stopped_in_mid_epoch_goes_on_alike(engine, after, every):
    whole, stopped = run_of(engine, mask_every=every), run_of(engine, mask_every=every)
    batches = [*whole.loader]
    for batch in batches[:after]:
        next_step(whole, batch)
        next_step(stopped, batch)
    resumed = run_of(engine, mask_every=every)
    resumed.load_state_dict(stopped.state_dict())
    for batch in batches[after:]:
        next_step(whole, batch)
        next_step(resumed, batch)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    kept, again = (r.policy(Conserve).epoch_metrics(r) for r in (whole, resumed))
    assert kept == again and {"movement", "masked_energy", "mask"} <= kept.keys()


def test_both_engines_keep_the_same_mask():
    # Without attack steps, whose signs turn where a gradient is within rounding of zero.
    none = {"attack_steps": 0}
    eager, fast = (run_of(e, attack=none, mask_every=3) for e in ("eager", "fast"))
    for batch in eager.loader:
        next_step(eager, batch)
        next_step(fast, batch)
    for a, b in zip(eager.model.parameters(), fast.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "other",
    [
        {"mask_scope": "global"},
        {"freeze": "hard"},
        {"update": "prominence"},
        {"objective": "rgp"},
    ],
    ids=str,
)
def test_settings_that_need_each_selection_refuse_to_go_without(other):
    with pytest.raises(InputError, match="--mask-every: expected 1 with --mask-scope global"):
        CureSettings(mask_every=2, **other)
    CureSettings(mask_every=1, **other)


@pytest.mark.parametrize("engine", ["eager", "fast"])
def test_an_attack_grows_over_its_share_of_the_run(engine, monkeypatch):
    real, steps = attacks.pgd, []

    def counted(*args, **kwargs):
        steps.append(kwargs["steps"])
        return real(*args, **kwargs)

    monkeypatch.setattr(run_module, "pgd", counted)
    run = run_of(engine, attack={"attack_steps": 4, "attack_ramp": 0.5})
    for _ in range(2):
        for batch in run.loader:
            next_step(run, batch)
        run.epoch, run.batch = run.epoch + 1, 0
    # Eight steps in all; the attack has grown after half of them.
    assert steps == [1, 2, 3, 4, 4, 4, 4, 4]
