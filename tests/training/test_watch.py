"""The watchdogs: what alarms are told of, that healthy runs have none, and that nothing moves."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import tiny_step
from cure_fast.config import AttackConfig, Config
from cure_fast.methods import METHODS, select_method
from cure_fast.policies.average import EMA
from cure_fast.runs.log import read_rows
from cure_fast.training import stages, watch
from cure_fast.training.job import train
from cure_fast.training.trainer import next_step, note_best
from cure_fast.training.watch import Seen, alarms, collapsed, look, step_alarm, watch_step
from killing import equal
from tiny_job import tiny

# A network of ten classes that has learnt, under an attack that works.
HEALTHY = Seen(
    count=128,
    classes=10,
    common=18,
    predicted=25,
    right=50,
    attacked=20,
    losses=(1.6, 1.9, 2.0),
    moves=(0.2, 0.3),
)


@pytest.mark.parametrize(
    ("changes", "steps", "told"),
    [
        ({}, 200, None),
        ({"moves": (0.0001, 0.3)}, 50, "does not raise the loss of its batch: 1.6 on natural"),
        ({"losses": (1.6, 1.3, 2.0)}, 50, "1.3 on attacked ones, 2 after one step of length eps"),
        # TRADES' attack raises another loss.
        ({"losses": (1.6, 1.58, 2.0)}, 50, None),
        # Chance says nothing: 18 of 128 have the commonest label.
        ({"moves": (0.0, 0.3), "right": 28}, 50, None),
        ({"attacked": 0}, 200, "none of 128 images of the batch is classified right under the"),
        ({"attacked": 0}, 100, None),
        ({"attacked": 0, "right": 20}, 200, None),
        ({"attacked": 0, "count": 48, "common": 6}, 200, None),
        ({"right": 12}, 200, "12 of 128 natural images of the batch are classified right: no"),
        ({"right": 12}, 100, None),
        ({"right": 13}, 200, None),
        ({"right": 18, "predicted": 116}, 200, "right, nearly all as one class: no better"),
        ({"right": 18, "predicted": 114}, 200, None),
        # Most labels are of one class.
        ({"right": 120, "predicted": 118, "common": 116}, 200, None),
        # Of 64 images chance gets 6 right, and a network that has learnt a little sometimes too.
        ({"right": 5, "attacked": 4, "count": 64, "common": 9}, 200, None),
        # Of a hundred classes chance gets one image right, which says nothing.
        ({"right": 1, "classes": 100, "common": 5}, 200, None),
        ({"right": 1, "classes": 100, "common": 5, "predicted": 128}, 200, "all as one class"),
        # A natural phase.
        ({"attacked": None, "losses": (0.0, 0.0, 0.0), "moves": (0.0, 0.0)}, 200, None),
    ],
)
def test_what_is_alarming(changes, steps, told):
    found = alarms(replace(HEALTHY, **changes), steps, "--rate")
    assert len(found) == (told is not None)
    for text in found:
        assert told in text and "look at --" in text and f"after {steps} steps" in text
        assert "\n" not in text


class Able(tiny_step.Tiny):
    """Tells the largest of the first four channels, which is the label."""

    def logits(self, x):
        return 20 * x.flatten(1)[:, : tiny_step.CLASSES]


def able_run(method="pgd_at", **options):
    (x, _), *_ = tiny_step.tiny_batches(1, size=64)
    y = x.flatten(1)[:, : tiny_step.CLASSES].argmax(dim=1)
    run = tiny_step.tiny_run(method, model=Able(), batches=[(x, y)], **options)
    run.step = 200
    return run, run.loader.batch(0)


def descending(run, batch):
    return run.pgd(batch.x, lambda logits: -torch.nn.functional.cross_entropy(logits, batch.y))


def test_attacks_that_work_and_that_do_not(monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "wrong", replace(METHODS["pgd_at"], attack=descending))
    for method, attack, told in (
        ("pgd_at", {}, None),
        ("trades", {}, None),
        ("pgd_at", {"step_size": 1e-6}, "does not raise the loss"),
        ("wrong", {}, "does not raise the loss"),
        ("pgd_at", {"eps": 1.0, "step_size": 0.2}, "none of 64 images of the batch is classified"),
        ("natural", {"step_size": 1e-6}, None),
    ):
        run, batch = able_run(method)
        run.config = replace(run.config, attack=replace(run.config.attack, **attack))
        watch_step(run, batch, stage="train")
        error = capsys.readouterr().err
        assert (told in error) if told else not error, (method, attack)
        assert error.count("warning: after 200 steps") == (told is not None)


@pytest.mark.parametrize(
    ("method", "attack", "told"),
    [
        ("pgd_at", {}, None),
        ("trades", {"attack_steps": 4}, None),
        ("trades", {"attack_steps": 3}, "3 steps of 0.025 do not reach eps 0.1"),
        ("cure", {"step_size": 0.001}, "10 steps of 0.001 do not reach eps 0.1"),
        ("pgd_at", {"step_size": 0.21}, "a step of 0.21 crosses the whole ball of eps 0.1"),
        ("pgd_at", {"step_size": 0.2, "attack_steps": 1}, None),
        ("pgd_at", {"eps": 0.0}, None),
        # Their one step is a multiple of eps, and --step-size is not theirs.
        ("fgsm_rs", {"step_size": 1e-4}, None),
        ("n_fgsm", {"step_size": 1e-4}, None),
        ("natural", {"step_size": 1e-4}, None),
    ],
)
def test_steps_that_do_not_fit_the_ball_are_told_before_training(method, attack, told):
    config = select_method(Config(attack=AttackConfig(eps=0.1)), method)
    alarm = step_alarm(replace(config, attack=replace(config.attack, **attack)))
    expected = told and f"training attack: {told}; look at --step-size, --attack-steps and --eps"
    assert alarm == expected


def test_a_look_is_in_evaluation_mode():
    run = tiny_step.tiny_run("pgd_at", model=tiny_step.Normalised())
    batch = run.loader.batch(0)
    network = copy.deepcopy(run.model).eval()
    expected = torch.nn.functional.cross_entropy(network(batch.x), batch.y).item()
    assert look(run, batch).losses[0] == pytest.approx(expected, rel=1e-12)


def test_a_batch_is_looked_at_early_and_at_the_end_of_a_shorter_run(monkeypatch):
    run, batch = able_run()
    seen = []
    monkeypatch.setattr(watch, "look", lambda run, batch: seen.append(run.step) or HEALTHY)
    for run.step in range(1, 300):
        watch_step(run, batch, stage="train")
    assert seen == [50, 100, 200]
    # Of two epochs of a batch each.
    run.epoch = run.batch = 1
    for run.step in (7, 150, 201):
        watch_step(run, batch, stage="train")
    assert seen[3:] == [7, 150]


def test_an_attack_is_not_looked_for_in_a_natural_warm_up():
    run = tiny_step.tiny_run("cure_eff", natural_share=0.5)
    assert look(run, run.loader.batch(0)).attacked is None
    run.epoch = 1
    assert look(run, run.loader.batch(0)).attacked is not None


@pytest.mark.parametrize(
    ("method", "attack"),
    [("cure", {}), ("pgd_at", {"attack_mode": "train"}), ("trades", {"start": "uniform"})],
)
@pytest.mark.parametrize("engine", ["eager", "fast"])
def test_a_look_moves_nothing(method, attack, engine):
    def trained(*, watched):
        torch.manual_seed(5)
        model = tiny_step.Normalised()
        run = tiny_step.tiny_run(method, model=model, attack=attack, engine=engine)
        for batch in [*run.loader]:
            next_step(run, batch)
            if watched:
                before = copy.deepcopy(run.state_dict())
                modes = [module.training for module in run.model.modules()]
                assert look(run, batch).attacked is not None
                assert equal(before, run.state_dict())
                assert modes == [module.training for module in run.model.modules()]
                assert all(p.requires_grad for p in run.model.parameters())
            # What a later step draws from.
            torch.rand(1)
        return run.state_dict()

    assert equal(trained(watched=True), trained(watched=False))


def test_a_look_that_does_not_fit_into_memory_is_left_out(monkeypatch, capsys):
    def full(run, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run, batch = able_run()
    monkeypatch.setattr(watch, "look", full)
    watch_step(run, batch, stage="train")
    assert "no memory to look at what step 200 does" in capsys.readouterr().err
    monkeypatch.setattr(watch, "look", lambda run, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        watch_step(run, batch, stage="train")


def test_both_stages_of_a_job_are_watched_with_their_own_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watch, "LOOKS", (2,))
    monkeypatch.setattr(watch, "alarms", lambda seen, steps, rate: [f"step {steps}: {rate}"])
    train(tiny(tmp_path, "trades"))
    told = [line for line in capsys.readouterr().err.splitlines() if "step 2" in line]
    assert told == ["warning: step 2: --pretrain-lr", "warning: step 2: --lr"]


def test_a_healthy_job_has_no_alarm_and_no_single_step_to_watch(tmp_path, capsys):
    folder = train(tiny(tmp_path, attack={"step_size": 0.1}))
    assert not capsys.readouterr().err
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["event"] == "epoch"]
    assert not any("fgsm" in row["validation"] or "collapsed" in row for row in rows)


@pytest.mark.parametrize(
    ("steps", "one_step"), [(1, False), (2, True)], ids=["one step", "method says so"]
)
def test_training_against_one_step_is_validated_under_fgsm(tmp_path, monkeypatch, steps, one_step):
    monkeypatch.setitem(METHODS, "pgd_at", replace(METHODS["pgd_at"], one_step=one_step))
    attack = {"attack_steps": steps, "step_size": 0.15}
    folder = train(tiny(tmp_path, "pgd_at", pretrain={"pretrain_epochs": 0}, attack=attack))
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["event"] == "epoch"]
    assert all(0 <= row["validation"]["fgsm"] <= row["validation"]["natural"] for row in rows)


def scripted(monkeypatch, scores):
    """Let validation return (PGD, FGSM) by network and epoch."""

    def validate(run, network, stage):
        robust, fgsm = scores[network][run.epoch - 1]
        return {"natural": 90.0, "robust": robust, "attack": "pgd1", "count": 20, "fgsm": fgsm}

    monkeypatch.setattr(stages, "validate", validate)


def collapses(folder):
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["event"] == "epoch"]
    return [row["epoch"] for row in rows if row.get("collapsed")]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([(40.0, 45.0), (5.0, 85.0), (50.0, 55.0)], [2]),
        ([(40.0, 45.0), (5.0, 85.0), (19.0, 40.0)], [2, 3]),
        # A gap alone, and a fall alone, are none.
        ([(40.0, 65.0), (21.0, 85.0), (20.0, 60.0)], []),
        ([(40.0, 45.0), (5.0, 20.0), (15.0, 30.0)], []),
        # A low accuracy falls to less than half by chance.
        ([(10.7, 20.7), (2.0, 22.7), (4.7, 25.0)], []),
        # The first epoch is measured against nothing.
        ([(15.0, 85.0), (14.0, 85.0), (2.0, 85.0)], [3]),
        # Without FGSM there is nothing to tell.
        ([(40.0, None), (5.0, None)], []),
    ],
)
def test_what_is_catastrophic_overfitting(capsys, scores, expected):
    run, found = SimpleNamespace(best={}, result="model", method=METHODS["pgd_at"]), []
    for run.epoch, (robust, fgsm) in enumerate(scores, 1):
        reached = {"natural": 90.0, "robust": robust, "fgsm": fgsm, "attack": "pgd10"}
        if collapsed(run, reached):
            found.append(run.epoch)
        else:
            note_best(run, reached)
    assert found == expected
    for epoch, line in zip(expected, capsys.readouterr().err.splitlines(), strict=True):
        assert f"overfitting in epoch {epoch}, which is not" in line and "--attack-steps" in line


def test_a_collapsed_epoch_is_told_recorded_and_never_the_best(tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, {"model": [(40.0, 45.0), (5.0, 85.0), (50.0, 55.0)]})
    sections = {"pretrain": {"pretrain_epochs": 0}, "attack": {"step_size": 0.1}}
    folder = train(tiny(tmp_path, "pgd_at", epochs=3, **sections))
    assert collapses(folder) == [2]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "warning: catastrophic overfitting in epoch 2, which is not taken as the best: 85.0 % "
        "under FGSM, but 5.0 % under pgd1, after 40.0 % in epoch 1; look at --attack-steps, "
        "--step-size and --eps"
    )
    entry = json.loads((folder / "results.json").read_text())["models"]["trained"]
    assert entry["epoch"] == 3
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Catastrophic overfitting in epoch 2" in page and "2 (collapsed)" in page


def test_an_epoch_in_which_one_network_collapsed_is_the_best_of_none(tmp_path, monkeypatch, capsys):
    raw, ema = [(40.0, 45.0), (5.0, 85.0)], [(30.0, 35.0), (60.0, 65.0)]
    scripted(monkeypatch, {"model": raw, "ema": ema})
    config = tiny(tmp_path, "pgd_at", pretrain={"pretrain_epochs": 0})
    folder = train(replace(config, policies={"ema": EMA.settings}))
    assert collapses(folder) == [2]
    assert "catastrophic overfitting of the raw network in epoch 2" in capsys.readouterr().err
    models = json.loads((folder / "results.json").read_text())["models"]
    assert models["trained"]["epoch"] == 1
