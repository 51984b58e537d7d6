"""A network of the user's own, named by the function that makes it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from cure_fast.cli.main import main
from cure_fast.errors import InputError
from cure_fast.loaders import read_dataset
from cure_fast.models import build_model
from cure_fast.models.building import check_logits, load_model
from cure_fast.models.weights import load_into, read_metadata, save_weights
from cure_fast.policies.conserve import maskable_parameters
from networks import Dense
from tiny_command import differences, tiny_words

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = """
import torch
from torch import nn

CALLS = []

def small(num_classes):
    CALLS.append(num_classes)
    # Real numbers, also where a model is only looked at.
    scale = float(torch.ones(()))
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, num_classes),
        nn.Softplus(beta=scale),
    )

def ten(num_classes):
    assert num_classes == 10, f"{num_classes} classes"
    return small(num_classes)

def seven(num_classes):
    return small(7)

def single(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))

def other_size(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes))

def two_answers(num_classes):
    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x), x
    return nn.Sequential(nn.Flatten(), Two(192, num_classes))

def cut_off(num_classes):
    class Cut(nn.Flatten):
        def forward(self, x):
            return super().forward(x.round().detach())
    return nn.Sequential(Cut(), nn.Linear(192, num_classes))

def one_way(num_classes):
    class Backward(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x + 0)
        backward = staticmethod(lambda ctx, g: g.no_such_thing)
    class OneWay(nn.Flatten):
        def forward(self, x):
            return Backward.apply(super().forward(x))
    return nn.Sequential(OneWay(), nn.Linear(192, num_classes))

def text(num_classes):
    return "no network"

def failing(num_classes):
    raise RuntimeError("out of\\nluck")

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module with factories, in a working folder of its own."""
    name = f"own_{abs(hash(str(tmp_path)))}"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / f"{name}.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.chdir(tmp_path)
    return name


def words_of(name, *more, out="run"):
    words = tiny_words("--model", name, *more, out=out)
    place = words.index("--width")
    return words[:place] + words[place + 2 :]


def test_what_a_factory_makes_is_wrapped(module):
    model = build_model(f"{module}:small", num_classes=4, normalize=((0.5,) * 3, (0.25,) * 3))
    assert (model.stem_names, model.classifier_name) == (("net.0",), "net.3")
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(model.eval()(images), model.net((images - 0.5) / 0.25))
    masked = maskable_parameters(model, "all_but_classifier", mask_stem=False)
    assert masked.keys() == {"net.1.weight", "net.1.bias"}
    # Its own names, without the wrapper's.
    weights = {name: t + 1 for name, t in model.net.state_dict().items()}
    load_into(model, model.adapted(weights), source="file")
    assert torch.equal(model.net[3].weight, weights["3.weight"])


def test_a_classifier_is_taken_as_it_is():
    assert isinstance(build_model("networks:dense", num_classes=10), Dense)


def test_it_is_trained_resumed_evaluated_and_exported(module, capsys, monkeypatch):
    name = f"{module}:small"
    for out, epochs in (("whole", "3"), ("broken", "2")):
        assert main(words_of(name, "--schedule", "constant", "--epochs", epochs, out=out)) == 0
    assert main(["train", "broken", "--resume", "--override", "--epochs", "3"]) == 0
    assert not differences(Path("whole"), Path("broken"))
    assert main(["eval", "whole", "--attacks", "pgd3", "--limit", "8"]) == 0
    assert main(["export", "whole"]) == 0
    for path in (Path("whole/model.safetensors"), Path("whole/export/model.safetensors")):
        assert read_metadata(path)["model"] == name
        loaded = load_model(path, trusted=name)
        assert isinstance(loaded.get_submodule("net"), nn.Sequential)


def test_no_file_decides_which_code_is_run(module, capsys, tmp_path):
    name = f"{module}:small"
    model = build_model(name, num_classes=10)
    told = {"model": name, "num_classes": "10", "data": "digits"}
    save_weights(model, tmp_path / "net.safetensors", told)
    calls = sys.modules[module].CALLS
    calls.clear()
    words = ["eval", "net.safetensors", "--attacks", "natural", "--limit", "8"]
    for refused in (words, ["export", "net.safetensors"]):
        assert main(refused) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and f"--model {name}" in told
    assert calls == []
    assert main([*words, "--model", name]) == 0
    assert calls == [10]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{module}:missing", "cannot be imported (AttributeError"),
        ("no_such_module_here:small", "cannot be imported (ModuleNotFoundError"),
        (":small", "cannot be imported (ValueError"),
        ("{module}:", "cannot be imported (AttributeError"),
        ("{module}:text", "to return a torch.nn.Module, got str"),
        ("{module}:number", "failed (TypeError"),
        ("{module}:failing", "failed (RuntimeError: out of)"),
        ("{module}:seven", "expected logits [2, 10] of images [2, 3, 8, 8]"),
        ("{module}:cut_off", "a gradient reaches the images through"),
        ("{module}:one_way", "failed (AttributeError"),
        ("{module}:two_answers", "failed (AttributeError"),
        ("{module}:single", "only layer is its classifier; use --mask-layers all"),
        ("{module}:other_size", "a pass of images [2, 3, 8, 8] failed (RuntimeError"),
    ],
)
def test_what_makes_no_network(module, capsys, tmp_path, name, message):
    assert main(words_of(name.format(module=module))) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and message in told
    assert [path.name for path in tmp_path.iterdir()] == ["code"]


def test_it_is_made_for_the_classes_of_the_data_alone(module, tmp_path, monkeypatch, capsys):
    name = f"{module}:ten"
    assert main(words_of(name, "--method", "pgd_at", "--pretrain-epochs", "0")) == 0
    # Those of data of one's own are known when they have been read.
    monkeypatch.setitem(sys.modules, "own_digits", ModuleType("own_digits"))
    images = torch.randint(0, 256, (120, 8, 8, 3), dtype=torch.uint8).numpy()
    labels = torch.arange(120).numpy() % 10
    sys.modules["own_digits"].read = lambda split: (images, labels)
    words = ["--method", "pgd_at", "--pretrain-epochs", "0", "--data", "own_digits:read"]
    assert main(words_of(name, *words, out="other")) == 0, capsys.readouterr().err
    assert set(sys.modules[module].CALLS) == {10}


def test_the_trial_pass_leaves_the_network_as_it_was(module):
    model = build_model(f"{module}:small", num_classes=10)
    model.net[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    check_logits(model, read_dataset("digits", Path()), "small")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes


def test_flags_that_a_function_does_not_take(module):
    for flag, message in (({"width": 4}, "--width"), ({"stem": "imagenet"}, "--stem")):
        with pytest.raises(InputError, match=message):
            build_model(f"{module}:small", num_classes=4, **flag)
