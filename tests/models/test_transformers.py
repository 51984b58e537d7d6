"""Vision transformers: fitted weights of other patches, images and classes; what is refused."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch
import torch.nn.functional as F

import engine_runs as runs
from cure_fast.cli.main import main
from cure_fast.engine import fast
from cure_fast.errors import InputError
from cure_fast.models import build_model
from cure_fast.models.building import load_model
from cure_fast.models.weights import load_into, save_weights
from tiny_command import tiny_words

pytestmark = pytest.mark.usefixtures("one_thread")
PATCHES = "net.patch_embed.proj.weight"


def transformer(name="vit-tiny", *, size=8, width=16, num_classes=10):
    return build_model(name, num_classes=num_classes, width=width, image_size=size).eval()


def of_imagenet(model, *, side, classes=1000):
    """Weights as timm publishes them: patches of 16x16, side x side of them, without prefix."""
    weights = {name.removeprefix("net."): t.clone() for name, t in model.state_dict().items()}
    width = model.width
    tokens = weights["pos_embed"].shape[1] - (model.image_size // 4) ** 2
    weights["patch_embed.proj.weight"] = torch.randn(width, 3, 16, 16)
    weights["pos_embed"] = torch.randn(1, tokens + side**2, width)
    weights["head.weight"], weights["head.bias"] = torch.randn(classes, width), torch.ones(classes)
    return weights


@pytest.mark.parametrize("name", ["vit-tiny", "convit-base"])
def test_weights_of_large_patches_are_fitted(name, caplog):
    model = transformer(name)
    given, own = of_imagenet(model, side=4), model.get_parameter("net.head.weight").clone()
    with caplog.at_level(logging.WARNING):
        load_into(model, model.adapted(given), source="file")
    assert "of 1000 classes, taken anew for 10" in caplog.text
    # What the large patches see in enlarged pixels, the small ones see in the pixels themselves.
    images = torch.rand(2, 3, 8, 8)
    enlarged = F.interpolate(images, scale_factor=4, mode="nearest")
    torch.testing.assert_close(
        F.conv2d(images, model.get_parameter(PATCHES), stride=4),
        F.conv2d(enlarged, given["patch_embed.proj.weight"], stride=16),
        rtol=1e-4,
        atol=1e-4,
    )
    # At half the size, bilinear places lie between four former ones.
    positions, former = model.get_parameter("net.pos_embed"), given["pos_embed"]
    tokens = 1 if name == "vit-tiny" else 0
    blocks = former[0, tokens:].view(2, 2, 2, 2, -1).mean((1, 3)).view(4, -1)
    torch.testing.assert_close(positions[0, tokens:], blocks)
    assert torch.equal(positions[0, :tokens], former[0, :tokens])
    assert torch.equal(model.get_parameter("net.head.weight"), own)
    assert torch.equal(model.get_parameter("net.norm.weight"), given["norm.weight"])


def test_weights_that_fit_are_loaded_as_they_are():
    given = transformer().state_dict()
    for weights in (given, {name.removeprefix("net."): t for name, t in given.items()}):
        fitted = transformer().adapted(weights)
        assert fitted.keys() == given.keys()
        assert all(torch.equal(fitted[name], given[name]) for name in given)


def test_weights_of_another_width_are_refused():
    with pytest.raises(InputError, match="tensors of another shape"):
        model = transformer()
        load_into(model, model.adapted(of_imagenet(transformer(width=32), side=4)), source="file")


def test_buffers_stay_the_tensors_that_they_are():
    model = transformer("convit-base", size=32)
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    model(torch.rand(1, 3, 32, 32))
    assert len(before) == 10
    for name, (buffer, values) in before.items():
        assert model.get_buffer(name) is buffer and torch.equal(buffer, values)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("vit-tiny", "cure"),
        *(
            pytest.param(n, "trades", marks=pytest.mark.slow)
            for n in ("vit-tiny", "convit-base", "densenet121")
        ),
    ],
)
def test_the_fast_engine_records_losses(monkeypatch, name, method):
    monkeypatch.setattr(fast, "ON_GPU", ("graph", *fast.COMPILED))
    made = []
    for engine in ("fast", "eager"):
        torch.manual_seed(1)
        width = 4 if name == "densenet121" else 16
        model = build_model(name, num_classes=runs.CLASSES, width=width, image_size=8)
        made.append(
            runs.make_run(
                method, engine, model=model, data=runs.batches(1), attack={"attack_steps": 1}
            )
        )
    both = runs.Pair(*made)
    runs.assert_steps_equal(both, 1, signs=0.2)
    assert both.fast.engine.name == "fast" and both.fast.engine.prepared.loss.recorded


def test_a_width_that_heads_do_not_share():
    with pytest.raises(InputError, match="--width: expected a multiple of 4 heads, got 18"):
        transformer(width=18)


def test_without_timm_the_command_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "timm" else found(name)
    )
    assert main(tiny_words("--model", "vit-tiny")) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "pip install 'timm" in told
    assert list(tmp_path.iterdir()) == []


def images_of(folder, size):
    """An image folder of two classes."""
    from PIL import Image

    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for number in range(6):
                shade = (40 * number, 200 if name == "cat" else 0, 9)
                Image.new("RGB", (size, size), shade).save(folder / split / name / f"{number}.png")
    return f"folder:{folder}"


def test_images_that_patches_do_not_divide(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    words = tiny_words("--model", "vit-tiny", "--data", images_of(tmp_path / "photos", 10))
    words += ["--train-images", "8", "--val-images", "2", "--pretrain-epochs", "0"]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "patches of 4x4" in told and "got 10x10" in told
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_file_is_evaluated_on_images_of_its_size_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = transformer(size=16)
    told = {"model": "vit-tiny", "num_classes": "10", "width": "16", "image_size": "16"}
    save_weights(model, tmp_path / "net.safetensors", told)
    words = ["eval", "net.safetensors", "--attacks", "natural", "--limit", "8", "--data", "digits"]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "images of 16x16 pixels, and these have 8x8" in told


def test_a_run_is_trained_evaluated_and_exported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = tiny_words("--model", "vit-tiny", "--width", "8", "--percentile", "50")
    # Few images, as each passes through twelve blocks.
    words += ["--train-images", "40", "--epochs", "1", "--attacks", "natural", "--limit", "8"]
    assert main(words) == 0
    assert main(["eval", "run", "--attacks", "pgd3", "--limit", "8"]) == 0
    assert main(["export", "run"]) == 0
    images = torch.rand(3, 3, 8, 8)
    logits = [
        load_model(tmp_path / "run" / path).eval()(images)
        for path in ("model.safetensors", "export/model.safetensors")
    ]
    assert torch.equal(*logits)
    # Another start, of the same kind.
    init = ["--init-from", "run", "--pretrain-epochs", "0", "--out", "second"]
    assert main([*words, *init]) == 0
    assert "weights of run" in capsys.readouterr().out
