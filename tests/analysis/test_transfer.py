"""``transfer`` against what ``evaluate`` and pyautoattack find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack

import cure_fast
from cure_fast.errors import InputError
from cure_fast.evaluation.evaluate import adversarial_images
from small import Linear

EPS = 0.1


@pytest.fixture
def models(linear):
    return {"linear": linear, "other": Linear(seed=11).eval()}


def table(result):
    return {(row["source"], row["model"]): row["accuracy"] for row in result.rows}


def right(model, x, labels):
    with torch.no_grad():
        return model(x).argmax(1).numpy() == labels


def test_the_diagonal_is_the_white_box_accuracy(models, images, labels):
    # Some are wrong from the start.
    labels = np.where(np.arange(len(labels)) % 5, labels, (labels + 1) % 3)
    found = table(
        cure_fast.analysis.transfer(models, images, labels, eps=EPS, square_queries=0, seed=2)
    )
    assert len(found) == 6
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    common = {"eps": EPS, "seed": 2}
    assert 0 < found["linear", "linear"] < found["no attack", "linear"]
    for name, model in models.items():
        own = cure_fast.evaluate(
            model, images, labels, attacks=["natural", "pgd20"], **common
        ).accuracy
        assert found[name, name] == own["pgd20"]
        assert found["no attack", name] == own["natural"]
        attacked = adversarial_images(
            model,
            torch.from_numpy(images),
            torch.from_numpy(labels).long(),
            attack="pgd20",
            step_size=None,
            batch_size=7,
            device="cpu",
            **common,
        )
        for target, other in models.items():
            both = right(other, pixels, labels) & right(other, attacked, labels)
            assert found[name, target] == pytest.approx(100 * both.mean())


def test_square_is_pyautoattacks_batch_by_batch(models, images, labels):
    result = cure_fast.analysis.transfer(
        models,
        images,
        labels,
        attack="fgsm",
        eps=EPS,
        square_queries=60,
        batch_size=16,
        seed=4,
    )
    found, x = table(result), torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    y = torch.from_numpy(labels).long()
    for name in models:
        held = 0
        for part, own in zip(x.split(16), y.split(16), strict=True):
            part, own = (
                each[torch.from_numpy(right(models[name], part, own.numpy()))]
                for each in (part, own)
            )
            if not len(part):
                continue
            adversary = AutoAttack(
                models[name],
                norm="Linf",
                eps=EPS,
                seed=4,
                version="custom",
                attacks=["square"],
                device="cpu",
            )
            adversary.square.n_queries = 60
            adversary.square.n_restarts = 1
            attacked, _ = adversary.run_standard_evaluation(
                part.contiguous(), own, batch_size=len(part)
            )
            held += right(models[name], attacked, own.numpy()).sum()
        assert found["Square (black box)", name] == pytest.approx(100 * held / len(x))
    assert 0 < found["Square (black box)", "other"] < found["no attack", "other"]
    labels_seen = [text.get_text() for text in result.figure().axes[0].get_yticklabels()]
    assert labels_seen == ["no attack", "linear", "other", "Square, 60 queries"]


def test_attacks_without_one_image_as_their_result_are_refused(linear, images, labels):
    for attack in ("natural", "aa", "pgd20-t", "pgd"):
        with pytest.raises(InputError, match="attack"):
            cure_fast.analysis.transfer(linear, images, labels, attack=attack)
    with pytest.raises(InputError, match="square"):
        cure_fast.analysis.transfer(linear, images, labels, square_queries=-1)
