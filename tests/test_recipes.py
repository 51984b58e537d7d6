"""The recipe for ten minutes: that its plan holds, and that its settings train."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cure_fast.cli.listing import listing
from cure_fast.cli.main import main
from cure_fast.recipes import RECIPES, find_recipe
from cure_fast.training.schedules import lr_at

NAME = "cifar10-resnet18-fast"
TRAINING_IMAGES = 50_000


def test_the_fast_recipe_fits_into_ten_minutes_at_16_ms_a_step() -> None:
    config = find_recipe(NAME)
    assert config.name == NAME
    steps = -(-(TRAINING_IMAGES - config.data.val_images) // config.optim.batch_size)
    assert steps == 383
    cure = config.optim.epochs * steps * 0.016
    # A natural step is 3 passes of CURE's 33, of small kernels: a fifth of the time at most.
    natural = config.pretrain.pretrain_epochs * steps * 0.016 / 5
    # A pass of 10,000 images takes no second, and PGD-10 of 1,000 images is 21 of a tenth of it.
    validations = config.optim.epochs // config.eval.val_every + 2
    assert cure + natural + 60 + 3 * validations <= 600
    assert cure >= 0.7 * 600, "less than there is time for"
    about = RECIPES[NAME].about
    assert f"{cure:.0f} s of CURE" in about and "not measured yet" in about.splitlines()[0]


def test_its_rate_rises_and_falls_to_zero_over_each_stage() -> None:
    config = find_recipe(NAME)
    stage = replace(
        config.optim,
        lr=config.pretrain.pretrain_lr,
        schedule=config.pretrain.pretrain_schedule,
    )
    for optim in (config.optim, stage):
        rates = [lr_at(optim, step / 1000) for step in range(1000)]
        peak = rates.index(max(rates))
        assert rates[peak] == 0.2 and peak == 250
        assert rates[:peak] == sorted(rates[:peak]) and rates[-1] == pytest.approx(0.002)
        assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_its_revision_model_averages_over_the_papers_share_of_the_run() -> None:
    def share(name: str) -> float:
        config = find_recipe(name)
        settings = config.settings
        steps = 1 / (1 - settings.revision_decay) / settings.revision_rate
        return steps / (config.optim.epochs * 383)

    assert share(NAME) == pytest.approx(share("cifar10-resnet18"), rel=0.06)


def test_it_differs_from_the_papers_recipe_in_nothing_else() -> None:
    fast, paper = find_recipe(NAME), find_recipe("cifar10-resnet18")
    assert (fast.model, fast.attack, fast.method) == (paper.model, paper.attack, paper.method)
    assert replace(fast.settings, revision_decay=0.999) == paper.settings
    assert (fast.eval.networks, paper.eval.networks) == (("revision",), ())
    assert fast.eval.attacks == paper.eval.attacks and fast.eval.aa_limit == 1000
    assert fast.eval.eval_step_share == paper.eval.eval_step_share
    for part, name in (("eval", "val_every"), ("run", "checkpoint_every")):
        every = getattr(getattr(fast, part), name)
        assert fast.optim.epochs % every == 0 and every > 1


def test_it_is_listed_as_not_measured(capsys) -> None:
    print(listing())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if f" {NAME} " in line]
    assert line.endswith("accuracy not measured yet.")


def test_it_trains_on_small_images_with_its_own_settings(tmp_path, capsys) -> None:
    words = ["train", NAME, "--data", "digits", "--model", "resnet-small", "--width", "4"]
    words += ["--train-images", "100", "--val-images", "50", "--crop-padding", "1"]
    words += ["--batch-size", "32", "--attack-steps", "1", "--pretrain-epochs", "1"]
    words += ["--epochs", "2", "--val-every", "2", "--attacks", "natural", "--limit", "20"]
    words += ["--device", "cpu", "--engine", "fast", "--no-tensorboard"]
    words += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "engine: fast" in out and "loader: resident" in out
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "revision.safetensors").is_file()
