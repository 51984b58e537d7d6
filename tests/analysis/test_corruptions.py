"""``corruptions``: whose images, which of them, and what is refused."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from cure_fast.analysis import corruptions as analysis
from cure_fast.analysis.corrupting import KINDS, corrupt
from cure_fast.errors import InputError
from small import Linear

pytest.importorskip("scipy")
SOURCE = importlib.import_module("cure_fast.analysis.corruptions")


def accuracy(model, images, labels):
    with torch.no_grad():
        logits = model(torch.from_numpy(images.transpose(0, 3, 1, 2) / np.float32(255)))
    return 100 * np.mean(logits.argmax(1).numpy() == labels)


@pytest.fixture
def stored(tmp_path, labels):
    """A folder like CIFAR-10-C's, of 30 images of which the first 24 have the labels."""
    draw = np.random.default_rng(5)
    place = tmp_path / "stored"
    place.mkdir()
    every = np.tile(np.append(labels, [0] * 6), 5)
    np.save(place / "labels.npy", every.astype(np.uint8))
    for name, kind in KINDS.items():
        if kind.group != "extra":
            np.save(place / f"{name}.npy", draw.integers(0, 256, (150, 4, 4, 3), np.uint8))
    return place


def test_images_made_anew_are_those_of_the_corruption(linear, images, labels, monkeypatch):
    made = []

    def counted(*words, **more):
        made.append(words[1:])
        return corrupt(*words, **more)

    monkeypatch.setattr(SOURCE, "corrupt", counted)
    models = {"first": linear, "second": Linear(seed=3).eval()}
    result = analysis(
        models, images, labels, seed=7, severities=[5, 2], corruptions=["noise", "snow"]
    )
    # Once for all networks.
    names = ["gaussian_noise", "impulse_noise", "speckle_noise", "shot_noise", "snow"]
    assert made == [(name, severity) for name in names for severity in (2, 5)]
    for row in result.rows:
        x = images
        if row["severity"]:
            x = corrupt(images, row["corruption"], row["severity"], seed=7)
            assert row["group"] == ("weather" if row["corruption"] == "snow" else "noise")
        assert row["accuracy"] == pytest.approx(accuracy(models[row["model"]], x, labels))
    assert len(result.rows) == 2 * (1 + 5 * 2)
    assert result.numbers["regenerated"] and set(result.numbers["made_by"]) >= {"scipy", "pillow"}
    titles = [axes.get_title() for axes in result.figure().axes]
    assert all("regenerated without frost" in title for title in titles) and len(titles) == 3


def test_stored_images_are_the_first_of_each_severity(linear, images, labels, stored):
    result = analysis(linear, images, labels, corrupted=str(stored))
    rows = result.rows
    assert {row["corruption"] for row in rows} >= {"frost"} and len(rows) == 1 + 17 * 5
    for row in rows[1:]:
        start = 30 * (row["severity"] - 1)
        part = np.load(stored / f"{row['corruption']}.npy")[start : start + 24]
        assert row["accuracy"] == pytest.approx(accuracy(linear, part, labels))
    assert not result.numbers["regenerated"]


def test_floats_are_corrupted_as_the_bytes_that_they_are(linear, images, labels):
    floats = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    found = [analysis(linear, x, labels, corruptions=["fog"]).rows for x in (images, floats)]
    assert found[0] == found[1]


def test_what_does_not_fit_is_refused_before_anything_is_made(
    linear, images, labels, stored, monkeypatch
):
    def refused(told, **settings):
        with pytest.raises(InputError, match=told):
            analysis(linear, images, labels, **settings)

    refused("severities 1 to 5", severities=[0])
    refused("severities: expected at least one", severities=[])
    refused("corruptions: expected at least one", corruptions=[])
    refused("Perhaps you meant weather", corruptions=["wether"])
    refused("--corruptions frost: expected one that can be made", corruptions=["frost"])
    folder = str(stored)
    refused("--corrupted: expected a folder of CIFAR-10-C's arrays", corrupted=f"{folder}/none")
    refused("saturate.npy: expected an array", corrupted=folder, corruptions=["saturate"])
    np.save(stored / "fog.npy", np.zeros((150, 5, 5, 3), np.uint8))
    refused(r"fog.npy: expected uint8 \[150, 4, 4, 3\], got", corrupted=folder)
    np.save(stored / "labels.npy", np.load(stored / "labels.npy")[:149])
    refused(r"labels.npy: expected \[5 N\]", corrupted=folder)
    np.save(stored / "labels.npy", np.zeros(50, np.uint8))
    refused("labels.npy: expected of 24 images or more", corrupted=folder)
    np.save(stored / "labels.npy", np.full(150, 9))
    refused("labels of the first 24 test images", corrupted=folder)
    (stored / "labels.npy").write_text("no array")
    refused("labels.npy: expected an array", corrupted=folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("python -m pip install scipy")
