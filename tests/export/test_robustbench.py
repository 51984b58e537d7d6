"""The exported weights load strictly into RobustBench's own classes and compute the same there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cure_fast.cli.main import main
from cure_fast.config.values import to_dict
from cure_fast.errors import InputError
from cure_fast.export import to_robustbench
from cure_fast.export.source import read_source
from cure_fast.export.to_robustbench import (
    ARCHITECTURES,
    TESTED,
    export_robustbench,
    find_package,
    model_info,
)
from cure_fast.export.verify import trial_images
from cure_fast.files import write_json
from cure_fast.models import MODELS, build_model
from cure_fast.models.weights import load_into, read_weights
from cure_fast.recipes import find_recipe

ROOT = Path(__file__).resolve().parents[2]
needs_robustbench = pytest.mark.skipif(
    find_package() is None, reason="RobustBench is not installed (setup/install.sh does)"
)


def images(count: int = 3) -> torch.Tensor:
    return torch.rand((count, 3, 32, 32), generator=torch.Generator().manual_seed(1))


@needs_robustbench
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_the_keys_and_shapes_of_its_class(name: str) -> None:
    with torch.device("meta"):
        own = build_model(name, num_classes=100)
        theirs = ARCHITECTURES[name].build(100, own.width)
    shapes = {key: tensor.shape for key, tensor in own.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items()}


# Each class and block; the deeper networks are longer lists of the same.
@needs_robustbench
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("resnet18", 122),
        ("resnet50", 320),
        ("preactresnet18", 107),
        ("wrn32-10", 191),
        ("wrn28-10", 155),
    ],
)
def test_every_class_computes_the_same(make_source, tmp_path: Path, name: str, keys: int) -> None:
    narrow = {"width": 2} if name.startswith("wrn") else {}
    source = make_source(name, **narrow)
    out = tmp_path / "net.pt"
    difference, _ = export_robustbench(source, images(), out, layout="plain")
    assert 0 <= difference < 1e-3
    state = torch.load(out, weights_only=True)
    assert list(state) == list(source.model.state_dict()) and len(state) == keys
    fresh = ARCHITECTURES[name].build(10, source.model.width)
    assert not any(fresh.load_state_dict(state, strict=True))
    assert all(type(tensor) is torch.Tensor and tensor.is_contiguous() for tensor in state.values())


@needs_robustbench
def test_both_layouts_of_wrn_34_10(make_source, tmp_path: Path) -> None:
    source = make_source("wrn34-10", width=2)
    for layout, expected in (("plain", (191, 46_160_474)), ("sub_block1", (252, 48_262_586))):
        # A narrow network has the same tensors; those of the published one are counted alone.
        with torch.device("meta"):
            theirs = ARCHITECTURES["wrn34-10"].build(10, 10, unused=layout == "sub_block1")
        counted = sum(parameter.numel() for parameter in theirs.parameters())
        assert (len(theirs.state_dict()), counted) == expected
        out = tmp_path / f"{layout}.pt"
        # In the class itself, which loads strictly: a key too many or too few is an error.
        difference, _ = export_robustbench(source, images(1), out, layout=layout)
        assert difference < 1e-3
        state = torch.load(out, weights_only=True, mmap=True)
        assert state.keys() == theirs.state_dict().keys()
    # And back: the group that no forward pass calls is left out.
    load_into(source.model, read_weights(out), source=str(out))


@needs_robustbench
def test_the_layouts_do_not_load_into_each_other(
    make_source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source("wrn28-10", width=1)
    load = to_robustbench._load_strictly
    monkeypatch.setattr(
        to_robustbench,
        "_load_strictly",
        lambda known, source, file, unused: load(known, source, file, not unused),
    )
    for layout in ("plain", "sub_block1"):
        with pytest.raises(InputError, match="does not take the weights"):
            export_robustbench(source, images(), tmp_path / "net.pt", layout=layout)
    assert not (tmp_path / "net.pt").exists() and not (tmp_path / "net.json").exists()


@needs_robustbench
def test_another_function_in_the_class_is_an_error(make_source, tmp_path: Path) -> None:
    source = make_source("preactresnet18")
    source.model.bn.eps = 1.0
    with pytest.raises(InputError, match="does not compute what the model does"):
        export_robustbench(source, images(), tmp_path / "net.pt", layout="plain")
    assert not (tmp_path / "net.pt").exists()


@needs_robustbench
def test_the_command_on_a_run(
    make_source, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A thousand of them take seconds.
    monkeypatch.setitem(trial_images.__kwdefaults__, "count", 20)
    made = make_source("wrn28-10", width=1)
    write_json(tmp_path / "config.json", to_dict(find_recipe("cifar10-resnet18")))
    write_json(tmp_path / "results.json", record(made.sha256))
    assert read_source(tmp_path).results == record(made.sha256)
    words = ["export", str(tmp_path), "--format", "robustbench", "--data-root", str(tmp_path)]
    assert main([*words, "--layout", "sub_block1"]) == 0
    text = capsys.readouterr().out
    assert "equal predictions on 20 random images of 32x32 pixels, as cifar10 is not in" in text
    assert "fill in link, name, authors, venue" in text and "left out" not in text
    assert len(torch.load(tmp_path / "export" / "model.pt", weights_only=True)) == 155 + 47
    assert json.loads((tmp_path / "export" / "model.json").read_text()) == {
        "link": "",
        "name": "CURE",
        "authors": "",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "venue": "Unpublished",
        "architecture": "WideResNet-28-1",
        "eps": "8/255",
        "clean_acc": "87.05",
        "reported": "52.10",
        "autoattack_acc": "52.10",
        "unreliable": False,
    }


def record(weights: str, *, count: int = 10_000, reliable: bool = True, **attack) -> dict:
    """What results.json holds of a run on 10,000 test images, as far as it matters here."""

    def result(attack: str, correct: int, **more) -> dict:
        return {
            "attack": attack,
            "correct": correct,
            "count": 10_000,
            "seconds": 1.0,
            "settings": {},
            "accuracy": correct / 100,
            "reliable": True,
            "warnings": [],
            "precision": "float32",
            **more,
        }

    warnings = [] if reliable else ["gradients are zero"]
    robust = result("aa", 5210, count=count, reliable=reliable, warnings=warnings, **attack)
    attacks = {"natural": result("natural", 8705), "aa": robust}
    entry = {"weights": weights, "attacks": attacks}
    return {"eps": 8 / 255, "test_images": 10_000, "models": {"trained": entry}}


@needs_robustbench
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"count": 1000}, "aa was run on 1,000 of 10,000 test images"),
        ({"reliable": False}, "the result of aa is unreliable (gradients are zero)"),
        ({"precision": "bfloat16"}, "aa was run in bfloat16"),
    ],
)
def test_an_accuracy_that_is_not_whole_is_left_out(
    make_source, tmp_path: Path, changes: dict, reason: str
) -> None:
    source = make_source("wrn28-10", width=1)
    object.__setattr__(source, "results", record(source.sha256, **changes))
    _, notes = export_robustbench(source, images(), tmp_path / "net.pt", layout="plain")
    info = json.loads((tmp_path / "net.json").read_text())
    assert not {"autoattack_acc", "reported", "unreliable"} & info.keys()
    assert info["clean_acc"] == "87.05"
    assert any(reason in note for note in notes)


@needs_robustbench
@pytest.mark.parametrize("results", [None, record("of other weights")])
def test_no_accuracy_of_other_weights(make_source, tmp_path: Path, results) -> None:
    source = make_source("wrn28-10", width=1, results=results)
    _, notes = export_robustbench(source, images(), tmp_path / "net.pt", layout="plain")
    info = json.loads((tmp_path / "net.json").read_text())
    assert not {"autoattack_acc", "reported", "clean_acc", "unreliable"} & info.keys()
    assert sum("left out" in note for note in notes) == 2
    assert info["additional_data"] is None


@needs_robustbench
def test_damaged_results_are_an_error(make_source, tmp_path: Path) -> None:
    source = make_source("wrn28-10", width=1, results={"models": {"trained": 3}})
    with pytest.raises(InputError, match="damaged"):
        export_robustbench(source, images(), tmp_path / "net.pt", layout="plain")


@pytest.mark.parametrize(
    ("options", "size", "layout", "message"),
    [
        ({"name": "resnet-small"}, 32, "plain", "resnet18, .* wrn28-10.*, got resnet-small"),
        ({"name": "resnet18", "width": 8}, 32, "plain", "has width 64, this model 8"),
        ({"name": "resnet18", "stem": "imagenet"}, 32, "plain", "cifar stem, this model"),
        ({"name": "resnet18"}, 64, "plain", "32x32 pixels, those of cifar10 have 64x64"),
        ({"name": "resnet18"}, 32, "sub_block1", "for wide ResNets, resnet18 is none"),
        (
            {"name": "resnet18", "normalize": ((0.5,) * 3, (0.5,) * 3)},
            32,
            "plain",
            "takes a mean and a deviation out first.*--normalize none",
        ),
    ],
)
def test_what_no_class_can_be_is_refused(
    make_source, tmp_path: Path, options: dict, size: int, layout: str, message: str
) -> None:
    source = make_source(**options)
    with pytest.raises(InputError, match=message) as caught:
        export_robustbench(source, torch.rand(2, 3, size, size), tmp_path / "net.pt", layout=layout)
    assert "\n" not in str(caught.value) and not (tmp_path / "net.pt").exists()


def test_without_robustbench_the_command_is_named(
    make_source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    source = make_source("wrn28-10", width=1)
    monkeypatch.setattr(to_robustbench, "find_package", lambda: None)
    assert main(["export", str(source.path), "--format", "robustbench"]) == 2
    text = capsys.readouterr().err
    assert "pip install --no-deps --target" in text and text.count("\n") == 1
    assert not (tmp_path / "export").exists()


def test_every_model_has_a_class_or_is_known_to_have_none() -> None:
    others = {"resnet-small", "densenet121", "mobilenetv2"}
    transformers = {"vit-base", "deit-small", "convit-base", "vit-tiny"}
    assert set(MODELS) - set(ARCHITECTURES) == others | transformers


def test_the_set_up_installs_the_version_that_messages_name() -> None:
    assert f"\nrobustbench=={TESTED}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_the_entry_names_the_policies_too(make_source) -> None:
    info, _ = model_info(make_source("resnet18", told={"method": "trades", "policies": "ema"}), "x")
    assert info["name"] == "TRADES + EMA"
