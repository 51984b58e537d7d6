"""``overfitting`` against curves whose best epoch is known."""

from __future__ import annotations

import pytest

import cure_fast
from cure_fast.cli.main import main
from made_up import epoch_row, made_up_run

# The best robust accuracy is the third; of the equal ones the more natural one counts.
NATURAL, ROBUST = (50.0, 60.0, 62.0, 70.0, 71.0), (30.0, 41.0, 41.0, 38.5, 36.0)
RIGHT, LAST = {"natural": 8000, "aa": 4900}, {"natural": 8250, "aa": 4400}


def rows(**more):
    terms = {"natural_accuracy": 55.0, "adversarial_accuracy": 45.0}
    pairs = zip(NATURAL, ROBUST, strict=True)
    found = [
        epoch_row(k, natural=n, robust=r, terms=terms, **more)
        for k, (n, r) in enumerate(pairs, start=1)
    ]
    # An epoch between two validations, and a stage that is none of it.
    return [epoch_row(9, natural=99.0, stage="pretrain"), *found, epoch_row(6, terms=terms)]


def test_best_last_and_their_difference(folder):
    recipe = "trades-cifar10-resnet18"
    made_up_run(folder / "a", recipe, right=RIGHT, last=LAST, rows=rows())
    made_up_run(folder / "b", "cifar10-resnet18", right=RIGHT, rows=rows())
    result = cure_fast.analysis.overfitting(["a", "b"])
    first, second = result.rows
    assert (first["best_epoch"], first["last_epoch"]) == (3, 5)
    expected = {"natural": (62.0, 71.0, 9.0), "robust": (41.0, 36.0, -5.0)}
    expected |= {"test_natural": (80.0, 82.5, 2.5), "test_aa": (49.0, 44.0, -5.0)}
    for name, values in expected.items():
        found = [first[f"{name}_{word}"] for word in ("best", "last", "delta")]
        assert found == pytest.approx(values)
    assert second["robust_delta"] == -5.0 and "test_aa_best" not in second
    epochs = [row for row in result.numbers["epochs"] if row["model"] == first["model"]]
    assert [row["robust"] for row in epochs] == [*ROBUST, None]
    assert {row["training_robust"] for row in epochs} == {45.0}
    assert len(result.figure().axes) == 2


def test_runs_of_different_images_are_refused(folder, capsys):
    made_up_run(folder / "a", "trades-cifar10-resnet18", right=RIGHT, rows=rows())
    made_up_run(folder / "b", "svhn-resnet18", right=RIGHT, rows=rows())
    before = sorted(folder.rglob("*"))
    assert main(["analyze", "overfitting", "a", "b"]) == 2
    error = capsys.readouterr().err
    assert "runs of the same images, got a cifar10, b svhn" in error and error.count("\n") == 1
    assert [p for p in sorted(folder.rglob("*")) if p.name != "run.lock"] == before


def test_an_epoch_that_collapsed_is_not_the_best(folder):
    made = rows()
    made[3]["collapsed"] = True
    made_up_run(folder / "a", "trades-cifar10-resnet18", right=RIGHT, rows=made)
    (row,) = cure_fast.analysis.overfitting("a").rows
    assert row["best_epoch"] == 2 and row["robust_delta"] == -5.0


def test_a_run_without_validation_is_refused(folder, capsys):
    made_up_run(folder / "a", "trades-cifar10-resnet18", right=RIGHT, rows=[epoch_row(1)])
    before = sorted(folder.rglob("*"))
    assert main(["analyze", "overfitting", "a"]) == 2
    error = capsys.readouterr().err
    assert "a: expected epochs with a validation" in error and error.count("\n") == 1
    assert [p for p in sorted(folder.rglob("*")) if p.name != "run.lock"] == before
