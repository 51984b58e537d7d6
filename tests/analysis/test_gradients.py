"""``gradients`` against rows whose means over epochs are counted by hand."""

from __future__ import annotations

import pytest

import cure_fast
from cure_fast.errors import InputError
from made_up import epoch_row, made_up_run

LAYERS = ("layer1.0.conv2.weight", "layer2.0.conv2.weight")
OTHER = "layer1.0.conv1.weight"
EPOCHS = 10


def numbers(epoch, layer):
    """Numbers that differ in each epoch and layer."""
    value = epoch + 100 * LAYERS.index(layer)
    return {"mean": -value, "abs_mean": 2.0 * value, "norm": 3.0 * value, "nonzero": value / 1000}


def rows(*, gradients=True, share="prominent"):
    made = []
    for epoch in range(1, EPOCHS + 1):
        own = {"gradients": {layer: numbers(epoch, layer) for layer in LAYERS}} if gradients else {}
        if share:
            own[share] = {layer: epoch / 20 for layer in (OTHER, *LAYERS)}
            own["mask"] = {"overlap": 0.5, "energy": 0.01, "never_updated": 0.3 / epoch}
        made.append(epoch_row(epoch, **own))
    return made


def run(folder, name, **more):
    made_up_run(folder / name, "trades-cifar10-resnet18", right={"natural": 1}, rows=rows(**more))
    return name


def test_rows_are_what_was_recorded_and_phases_their_means(folder):
    result = cure_fast.analysis.gradients(run(folder, "a"), window=0.2)
    assert len(result.rows) == EPOCHS * len(LAYERS)
    for row in result.rows:
        expected = numbers(row["epoch"], row["layer"])
        assert {k: row[k] for k in expected} == expected
        assert row["prominent"] == row["epoch"] / 20
    # Two of ten epochs each: 1 and 2, 5 and 6, 9 and 10.
    phases = {(row["phase"], row["layer"]): row for row in result.numbers["phases"]}
    for phase, middle in (("early", 1.5), ("middle", 5.5), ("late", 9.5)):
        found = phases[phase, LAYERS[1]]
        assert found["nonzero"] == pytest.approx((middle + 100) / 1000)
        assert found["prominent"] == pytest.approx(middle / 20)
    assert [row["never_updated"] for row in result.numbers["masks"]] == [
        0.3 / epoch for epoch in range(1, EPOCHS + 1)
    ]
    assert len(result.figure().axes) == 6


def test_a_common_mask_keeps_what_lies_above_the_common_percentile(folder):
    result = cure_fast.analysis.gradients(run(folder, "a", share="updated"))
    assert [row["prominent"] for row in result.rows if row["layer"] == LAYERS[0]] == [
        epoch / 20 for epoch in range(1, EPOCHS + 1)
    ]


def test_runs_without_a_mask_or_of_earlier_versions_are_shown_too(folder):
    names = [run(folder, "a", share=""), run(folder, "b", gradients=False)]
    result = cure_fast.analysis.gradients(names)
    assert {row["prominent"] for row in result.rows if row["model"] == "TRADES (a)"} == {None}
    old = [row for row in result.rows if row["model"] == "TRADES (b)"]
    assert {row["norm"] for row in old} == {None} and {row["layer"] for row in old} == {*LAYERS}
    assert result.figure()


def test_layers_are_chosen_by_patterns(folder):
    name = run(folder, "a")
    result = cure_fast.analysis.gradients(name, layers=["*conv1*", "layer2.*"])
    assert list(dict.fromkeys(row["layer"] for row in result.rows)) == [OTHER, LAYERS[1]]
    with pytest.raises(InputError, match=r"--layers: expected layers that .*, got 'layer9.\*'"):
        cure_fast.analysis.gradients(name, layers=["layer9.*"])
    with pytest.raises(InputError, match="window"):
        cure_fast.analysis.gradients(name, window=0.5)
    bare = run(folder, "bare", gradients=False, share="")
    with pytest.raises(InputError, match="bare: expected epochs that recorded gradients"):
        cure_fast.analysis.gradients(bare)
