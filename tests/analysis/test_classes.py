"""``classes`` against counts one by one, and against ``evaluate``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cure_fast
from cure_fast.analysis.classes import as_shares, confusion, rows_of
from cure_fast.evaluation.evaluate import adversarial_images
from small import Linear


def test_a_confusion_counts_answers_of_each_class():
    draw = np.random.default_rng(0)
    labels, answers = draw.integers(0, 4, (2, 200))
    expected = np.zeros((5, 5), int)
    for label, answer in zip(labels, answers, strict=True):
        expected[label, answer] += 1
    found = confusion(torch.from_numpy(labels), torch.from_numpy(answers), 5)
    assert found == expected.tolist()
    assert as_shares([3, 0, 1]) == [75, 0, 25] and as_shares([0, 0]) == [None, None]


def test_rows_are_percentages_of_each_class():
    counts = {"natural_confusion": [[3, 1, 0], [2, 0, 0], [0, 0, 0]], "robust": [1, 0, 0]}
    found = rows_of("a", counts, ["cat", "dog", "bird"])
    assert [(row["class"], row["images"]) for row in found] == [("cat", 4), ("dog", 2), ("bird", 0)]
    assert [row["natural"] for row in found] == [75, 0, None]
    assert [row["robust"] for row in found] == [25, 0, None]
    # Names of another number of classes are none.
    assert [row["class"] for row in rows_of("a", counts, ["cat"])] == ["0", "1", "2"]


def test_accuracies_are_those_of_evaluate(linear, images, labels):
    labels = np.where(np.arange(len(labels)) % 4, labels, (labels + 1) % 3)
    models = {"linear": linear, "other": Linear(seed=11).eval()}
    result = cure_fast.analysis.classes(models, images, labels, eps=0.1)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    for name, model in models.items():
        own = cure_fast.evaluate(model, images, labels, eps=0.1).record["attacks"]
        rows = [row for row in result.rows if row["model"] == name]
        assert [row["natural"] for row in rows] == own["natural"]["by_class"]
        assert [row["robust"] for row in rows] == own["pgd20"]["by_class"]
        attacked = adversarial_images(
            model,
            torch.from_numpy(images),
            torch.from_numpy(labels).long(),
            attack="pgd20",
            eps=0.1,
            step_size=None,
            batch_size=256,
            device="cpu",
            seed=0,
        )
        for kind, x in (("natural", pixels), ("attacked", attacked)):
            answers = model(x).argmax(1).numpy()
            table = [
                [int(((labels == i) & (answers == j)).sum()) for j in range(3)] for i in range(3)
            ]
            assert result.numbers[f"{kind}_confusion"][name] == table
        for kind in ("natural", "robust"):
            least = min(row[kind] for row in rows if row[kind] is not None)
            worst = result.numbers["worst"][name][kind]
            assert worst == [row["class"] for row in rows if row[kind] == least]
    assert len(result.figure().axes) == 6


def test_many_classes_have_a_scale_instead_of_names(images):
    model = Linear(classes=20).eval()
    result = cure_fast.analysis.classes(model, images, np.arange(24) % 20, attack="fgsm")
    figure = result.figure()
    assert len(figure.axes) == 5 and figure.axes[0].get_xlabel() == "20 classes"
    assert not any(axes.texts for axes in figure.axes)
    assert len(result.rows) == 20 and result.rows[0]["images"] == pytest.approx(2)
