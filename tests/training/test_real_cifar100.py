"""The real CIFAR-100 as a folder of images: a hundred classes, read, trained on and attacked."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from cure_fast.cli.main import main
from cure_fast.loaders import make_loader, read_dataset
from cure_fast.loaders.ffcv_reader import ffcv_problem
from tiny_job import same_weights

TRAIN, TEST = 6, 2  # images of each class
WORDS = [
    *("--model", "resnet-small", "--width", "4", "--method", "trades", "--attack-steps", "1"),
    *("--val-images", "100", "--epochs", "1", "--batch-size", "125", "--device", "cpu"),
    *("--pretrain-epochs", "0", "--attacks", "natural,pgd2", "--val-attack-steps", "1"),
    *("--no-tensorboard", "--eps", "8/255"),
]
pytestmark = pytest.mark.real_data(data="cifar100")


@pytest.fixture
def photos(cifar100_root, tmp_path):
    """A tree with the first images of each class, as links."""
    for split, count in (("train", TRAIN), ("test", TEST)):
        for own in (cifar100_root / split).iterdir():
            place = tmp_path / "photos" / split / own.name
            place.mkdir(parents=True)
            for image in sorted(own.iterdir())[:count]:
                (place / image.name).symlink_to(image)
    return f"folder:{tmp_path / 'photos'}"


def test_a_run_on_it_is_the_same_from_two_loaders(photos, tmp_path, capsys):
    kinds = ["torch", "resident" if ffcv_problem() else "ffcv"]
    options = ["--data", photos, "--cache", str(tmp_path / "cache"), "--workers", "1"]
    for kind in kinds:
        words = ["train", "quickstart", *WORDS, *options, "--loader", kind]
        assert main([*words, "--out", str(tmp_path / kind)]) == 0
        assert same_weights(tmp_path / "torch", tmp_path / kind)
    assert (
        "500 training, 100 validation and 200 test images, 100 classes" in capsys.readouterr().out
    )
    assert main(["eval", str(tmp_path / "torch"), "--attacks", "natural,pgd3"]) == 0
    attacks = json.loads((tmp_path / "torch" / "results.json").read_text())["models"]["trained"]
    assert attacks["attacks"]["pgd3"]["count"] == 200


def test_its_images_are_the_published_ones(photos, tmp_path):
    """Names in the official order, which is that of the alphabet, and means as published."""
    train = read_dataset(photos, tmp_path)
    assert (len(train), train.image_size, len(train.classes)) == (100 * TRAIN, 32, 100)
    assert train.classes[:3] == ("apple", "aquarium_fish", "baby")
    means = train.images.mean(axis=(0, 1, 2)) / 255
    assert np.abs(means - (0.5071, 0.4865, 0.4409)).max() < 0.03
    loader = make_loader(
        "resident",
        train,
        batch_size=100,
        device=torch.device("cpu"),
        seed=0,
        crop_padding=4,
        flip=True,
        workers=None,
        cache=tmp_path,
    )
    with loader.epoch(0) as batches:
        assert {int(label) for batch in batches for label in batch.y} == set(range(100))
