"""Steps that are not finite: left out, counted, and an end with an explanation when they go on."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tiny_step
from cure_fast.cli.main import main
from cure_fast.engine import eager
from cure_fast.errors import DivergedError
from cure_fast.kernels import pgd_step_
from cure_fast.methods import METHODS
from cure_fast.models.weights import read_weights
from cure_fast.runs.log import read_rows
from cure_fast.step import train_step as train_step_module
from cure_fast.step.train_step import train_step
from cure_fast.training import saving
from cure_fast.training.job import train
from cure_fast.training.stages import advice
from cure_fast.training.trainer import next_step
from tiny_job import tiny


def moving(run):
    """All that a step moves but random numbers, as copies."""
    networks = {"model": run.model, **run.networks}
    return copy.deepcopy(
        [net.state_dict() for net in networks.values()] + [run.optimizer.state_dict()["state"]]
    )


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b if not isinstance(a, list) else all(map(equal, a, b))


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_with_nan_moves_nothing(method):
    # Where the revision model moves first: see the next test.
    still = {"revision_rate": 0.0} if method == "cure_paper" else {}
    run = tiny_step.tiny_run(method, model=tiny_step.Normalised(), **still)
    next_step(run, run.loader.batch(0))
    before = moving(run)
    assert next_step(run, tiny_step.poisoned(run.loader.batch(1)))[1] is None
    assert equal(before, moving(run)) and (run.skipped, run.skipped_in_row) == (1, 1)
    assert all(p.grad is None for p in run.model.parameters()) and not run.gradients
    assert next_step(run, run.loader.batch(1))[1] is not None
    assert not equal(before, moving(run)) and (run.skipped, run.skipped_in_row) == (1, 0)


def test_a_revision_model_that_moves_first_has_moved_but_stays_whole():
    run = tiny_step.tiny_run("cure_paper", model=tiny_step.Normalised(), revision_rate=1.0)
    next_step(run, run.loader.batch(0))
    revision = run.networks["revision"]
    statistics = {name: value.clone() for name, value in revision.named_buffers()}
    weights = [p.clone() for p in revision.parameters()]
    assert next_step(run, tiny_step.poisoned(run.loader.batch(0)))[1] is None
    assert equal(statistics, dict(revision.named_buffers()))
    assert not all(map(torch.equal, weights, revision.parameters()))
    assert all(p.isfinite().all() for p in revision.parameters())


def test_the_step_after_a_natural_warm_up_may_be_left_out():
    """The revision model starts as a copy of the network, statistics included."""
    run = tiny_step.tiny_run(
        "cure_eff", model=tiny_step.Normalised(), natural_share=0.5, revision_rate=0.0
    )
    for batch in run.loader:
        next_step(run, batch)
    run.epoch, run.batch = 1, 0
    assert next_step(run, tiny_step.poisoned(run.loader.batch(0)))[1] is None
    assert equal(run.networks["revision"].state_dict(), run.model.state_dict())


@pytest.mark.parametrize("scaled", [False, True])
def test_a_score_that_is_not_finite_leaves_the_step_out(scaled, monkeypatch):
    """CURE's mask would be silently off; the gradient that updates is finite."""
    run = tiny_step.tiny_run("cure", dtype=torch.float32)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    before, add = moving(run), train_step_module.add_to

    def overflown(gradients, name, grads):
        add(gradients, name, [grad * float("inf") for grad in grads])

    monkeypatch.setattr(train_step_module, "add_to", overflown)
    assert train_step(run, run.loader.batch(0)) is not None
    assert equal(before, moving(run)) and run.skipped == 1
    assert run.scaler.get_scale() == (512.0 if scaled else 1.0)
    monkeypatch.undo()
    train_step(run, run.loader.batch(0))
    assert not equal(before, moving(run)) and run.skipped_in_row == 0


def test_a_weight_past_the_largest_number_is_no_checkpoint(tmp_path):
    run = tiny_step.tiny_run("natural")
    with torch.no_grad():
        next(run.model.parameters()).view(-1)[0] = float("inf")
    save = saving.Saver(tmp_path, run.config)
    with pytest.raises(DivergedError, match=r"weight or statistic of the model is not finite"):
        save(run, True)
    assert not list(tmp_path.iterdir())


def test_a_nan_in_an_attack_gradient_leaves_the_step_out(monkeypatch):
    """A pixel that silently stays where it is would make a weaker attack."""

    def broken(x_adv, x, grad, **settings):
        grad[0] = float("nan")
        return pgd_step_(x_adv, x, grad, **settings)

    monkeypatch.setattr("cure_fast.attacks.pgd_step_", broken)
    run = tiny_step.tiny_run("pgd_at")
    before = moving(run)
    assert train_step(run, run.loader.batch(0)) is None
    assert equal(before, moving(run)) and run.skipped == 1


class Steep(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


class SteepHead(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return Steep.apply(self.inner(x))


def test_an_infinite_gradient_under_a_finite_loss_moves_nothing():
    run = tiny_step.tiny_run("natural")
    before = moving(run)
    inner, run.model = run.model, SteepHead(run.model)
    assert train_step(run, run.loader.batch(0)) is not None
    run.model = inner
    assert equal(before, moving(run)) and run.skipped_in_row == 1


def test_weights_with_nan_end_the_run_after_the_allowed_steps():
    run = tiny_step.tiny_run("trades")
    with torch.no_grad():
        next(run.model.parameters())[0] = float("nan")
    allowed = run.config.run.max_skipped
    for _ in range(allowed):
        assert train_step(run, run.loader.batch(0)) is None
    with pytest.raises(DivergedError, match=rf"loss is not finite.*{allowed + 1} steps"):
        train_step(run, run.loader.batch(0))


def test_a_loss_scale_that_overflows_is_halved_until_it_fits():
    """The scaled run ends in the weights of one that never saw the overflowing steps."""
    dtype = torch.float32
    batch = tiny_step.tiny_batches(1, dtype=dtype)
    plain, scaled = (tiny_step.tiny_run("cure", batches=batch, dtype=dtype) for _ in range(2))
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, enabled=True)
    sources = {name: source.get_state() for name, source in scaled.generators.items()}
    steps = 0
    while not scaled.optimizer.state:
        for name, source in sources.items():
            scaled.generators[name].set_state(source)
        assert train_step(scaled, scaled.loader.batch(0)) is not None
        steps += 1
        assert steps < 100
    # Steps that only look for the scale do not count towards a divergence.
    assert 1 < steps and scaled.skipped == steps - 1 and scaled.skipped_in_row == 0
    train_step(plain, plain.loader.batch(0))
    for a, b in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_run_goes_on_after_a_bad_batch_and_says_so(tmp_path, monkeypatch, capsys):
    real, calls = eager.train_step, []

    def one_bad(run, batch):
        calls.append(run.config.method)
        bad = calls.count("cure") == 2 and calls[-1] == "cure"
        return real(run, tiny_step.poisoned(batch) if bad else batch)

    monkeypatch.setattr(eager, "train_step", one_bad)
    folder = train(tiny(tmp_path))
    rows = [r for r in read_rows(folder / "metrics.jsonl") if r["stage"] == "train"]
    assert [r["skipped"] for r in rows if r["event"] == "epoch"] == [1, 0]
    assert [r["step"] for r in rows if r["event"] == "step"] == [0, 2, 3, 4, 5]
    assert "skipped 1" in capsys.readouterr().out
    weights = read_weights(folder / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_a_run_that_diverges_exits_with_3_and_names_the_last_good_checkpoint(
    tmp_path, monkeypatch, capsys
):
    real = eager.train_step

    def bad_from_the_second_epoch(run, batch):
        late = run.config.method == "cure" and run.epoch > 0
        return real(run, tiny_step.poisoned(batch) if late else batch)

    monkeypatch.setattr(eager, "train_step", bad_from_the_second_epoch)
    monkeypatch.chdir(tmp_path)
    words = (
        "train quickstart --train-images 96 --val-images 20 --width 4 --pretrain-epochs 1 "
        "--epochs 9 --batch-size 32 --attack-steps 1 --attacks natural --limit 20 --cache cache "
        "--loader resident --no-tensorboard --device cpu --out run --max-skipped 2 --log-every 1"
    ).split()
    assert main(words) == 3
    error = capsys.readouterr().err
    assert "for 3 steps in a row" in error and "checkpoint-000000003" in error and "--lr" in error
    assert "--resume goes on from there" in error
    best = json.loads((tmp_path / "run/checkpoints/checkpoint-000000003/manifest.json").read_text())
    assert best["best"] is True
    weights = read_weights(tmp_path / "run/model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    # Nothing of the diverged epoch was stored, and a resumed run meets it again.
    assert main(["train", "run", "--resume"]) == 3
    assert not (tmp_path / "run/results.json").exists()


def test_an_epoch_without_one_finite_step_is_a_divergence(tmp_path, monkeypatch):
    real = eager.train_step
    monkeypatch.setattr(
        eager, "train_step", lambda run, batch: real(run, tiny_step.poisoned(batch))
    )
    with pytest.raises(DivergedError, match="no step of epoch 1 had a finite loss") as caught:
        train(tiny(tmp_path, "trades", pretrain={"pretrain_epochs": 0}, run={"max_skipped": 9}))
    assert not (tmp_path / "run/model.safetensors").exists()
    # There is nothing that --resume could go on from, and no half precision to turn off.
    assert str(caught.value).endswith(
        "Try a lower --lr than 0.1. No checkpoint was saved yet: start again with that in a new "
        "folder."
    )


def test_a_divergence_of_the_natural_start_names_its_own_rate(tmp_path, monkeypatch):
    real = eager.train_step
    monkeypatch.setattr(
        eager, "train_step", lambda run, batch: real(run, tiny_step.poisoned(batch))
    )
    with pytest.raises(DivergedError, match="no step of epoch 1") as caught:
        train(tiny(tmp_path, pretrain={"pretrain_epochs": 1, "pretrain_lr": 0.25}))
    assert str(caught.value).endswith(
        "Try a lower --pretrain-lr than 0.25. --resume --override takes such a change, and the "
        "natural start begins anew."
    )
    monkeypatch.undo()
    again = tiny(tmp_path, pretrain={"pretrain_epochs": 1, "pretrain_lr": 0.1})
    assert (train(again, resume=True, override=True) / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("amp", "device", "wanted"),
    [
        ("bf16", "cpu", "Try a lower --lr than 0.1, or --amp off."),
        ("off", "cpu", "Try a lower --lr than 0.1."),
        ("auto", "cpu", "Try a lower --lr than 0.1."),
        # Whatever a GPU is, auto is half precision there; fp16 needs no GPU to be looked at.
        ("fp16", "cuda", "Try a lower --lr than 0.1, or --amp off."),
        ("off", "cuda", "Try a lower --lr than 0.1."),
    ],
)
def test_half_precision_is_advised_against_where_it_is_on(amp, device, wanted):
    config = tiny_step.tiny_run("natural").config
    settings, optim = replace(config.run, amp=amp), replace(config.optim, lr=0.1)
    stage = SimpleNamespace(
        name="train",
        config=replace(config, run=settings, optim=optim),
        device=torch.device(device),
    )
    assert advice(stage) == wanted
