"""``import cure_fast``: its examples, and what it takes, refuses and leaves alone."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import cure_fast
from cure_fast.cli.main import main
from cure_fast.evaluation.model_state import state_hashes
from cure_fast.models.weights import read_weights
from cure_fast.signals import StopSignals
from tiny_command import differences, tiny_words

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    **{"train_images": 96, "val_images": 20, "width": 4, "batch_size": 32, "pretrain_epochs": 1},
    **{"epochs": 2, "attack_steps": 2, "step_size": 0.075, "val_attack_steps": 1},
    **{"attacks": ["natural", "pgd2"]},
    **{"limit": 24, "eval_step_size": 0.1, "loader": "resident", "log_every": 1, "device": "cpu"},
    **{"tensorboard": False, "cache": "cache"},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def net():
    """A network in train mode, with statistics, a gradient, and one frozen layer."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )
    model[0].eval().requires_grad_(False)
    model(torch.rand(4, 3, 8, 8)).sum().backward()
    return model


def images_of(count=12):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 8, 8, 3), np.uint8), np.arange(count) % 10


def fresh(code, **environment):
    """Return what a program prints that has imported nothing yet."""
    home = {**os.environ, "HOME": os.getcwd(), "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_imported_before_it_is_used():
    told = fresh(
        "import sys, cure_fast\n"
        "assert {'train', 'evaluate', 'load', 'attack', 'recipe'} <= set(dir(cure_fast))\n"
        "print(*(name for name in ('torch', 'numpy', 'rich', 'tyro') if name in sys.modules))\n"
        "for name in cure_fast.__all__: getattr(cure_fast, name)\n"
        "try: cure_fast.trian\n"
        "except AttributeError as error: print(error)"
    )
    assert told == "\nmodule 'cure_fast' has no attribute 'trian'\n"
    assert (ROOT / "cure_fast/py.typed").exists()


def test_the_examples_of_the_page_run_in_a_fresh_process():
    page = (ROOT / "docs/python.md").read_text()
    told = fresh("\n".join(re.findall(r"```python\n(.*?)```", page, re.S)))
    # What the page shows as printed.
    assert re.search(r"RunFolder\('runs/first': natural [\d.]+ %, pgd20 [\d.]+ %\)\n", told)
    assert "unknown flag '--epoch'. Perhaps you meant --epochs.\n" in told
    assert re.search(r"Results\(natural [\d.]+ %, pgd20 [\d.]+ %, cw20 [\d.]+ %\)", told)


def test_a_run_is_that_of_the_command_line_from_a_thread_and_a_notebook(folder):
    assert main(tiny_words(out="command")) == 0
    made = {}
    train = "run = cure_fast.train('quickstart', out=out, **TINY)"

    def in_thread():
        cell = {"cure_fast": cure_fast, "TINY": TINY, "out": "thread"}
        exec(train, cell)
        made["thread"] = cell["run"]

    async def in_notebook():
        cell = {"cure_fast": cure_fast, "TINY": TINY, "out": "notebook"}
        exec(compile(train, "<cell>", "exec"), cell)
        await asyncio.sleep(0)
        made["notebook"] = cell["run"]

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    asyncio.run(in_notebook())
    for name, run in made.items():
        assert run.path == Path(name) and not differences(Path("command"), run.path)
        assert list(run.accuracy) == ["natural", "pgd2"]
        assert repr(run).startswith(f"RunFolder('{name}': natural ")
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run = made["thread"]
    assert run.config.optim.epochs == 2
    model = cure_fast.load(run)
    weights = read_weights(folder / "thread/model.safetensors")
    assert not model.training and model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    images, labels = images_of()
    named = cure_fast.evaluate(run, images, labels, attacks=["pgd3"])
    assert named.record["attacks"]["pgd3"]["settings"]["eps"] == 0.15
    of_file = cure_fast.evaluate(run.path / "model.safetensors", images, labels, attacks=["pgd3"])
    assert of_file.accuracy == named.accuracy
    x_adv = cure_fast.attack(run, images, labels, attack="pgd3").cpu()
    by_module = cure_fast.attack(model, images, labels, attack="pgd3", eps=0.15)
    assert torch.allclose(x_adv, by_module, atol=1e-4)


def test_a_stopped_run_says_so_and_goes_on(monkeypatch):
    from cure_fast.training import stages

    build = stages.build_run

    def interrupted(*arguments):
        monkeypatch.setattr(stages, "build_run", build)
        os.kill(os.getpid(), signal.SIGINT)
        return build(*arguments)

    monkeypatch.setattr(stages, "build_run", interrupted)
    with pytest.raises(cure_fast.StoppedError, match="--resume"):
        cure_fast.train("quickstart", out="run", **TINY)
    assert "no results yet" in repr(cure_fast.RunFolder(Path("run")))
    assert cure_fast.train("run", resume=True).accuracy


def test_a_second_interrupt_does_not_end_the_process():
    former = signal.getsignal(signal.SIGINT)
    with StopSignals(leaves=False) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is former


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epz": 3}, "unknown flag '--epz'. Perhaps you meant --eps."),
        ({"epochs": "3"}, "--epochs: expected a value of type int, got '3'."),
        ({"epochs": 0}, "--epochs: expected a number at least 1"),
        ({"eps": 8}, "--eps: expected a number at least 0 and at most 1, got 8.0."),
        ({"policies": "piat"}, "--policies: expected a list, got 'piat'."),
        ({"method": "trads"}, "Perhaps you meant trades."),
        ({"schedule": "cyclic"}, "--schedule: expected one of multistep, "),
        ({"awp_gamma": 0.1}, "--awp-gamma: expected --policies awp with it"),
        ({"method": "trades", "percentile": 5}, "--percentile: expected with --method cure"),
        ({"resume": True}, "--resume: there is no run in runs/"),
        ({"override": True}, "--override: expected --resume with it, got --override alone."),
        ({"networks": ["x"], "regime": "paper"}, "--regime: expected one of recipe, published"),
    ],
)
def test_wrong_fields_are_told_in_one_line(folder, wrong, message):
    # The two that say how to begin are of train alone.
    for call in (cure_fast.recipe, cure_fast.train)[bool(wrong.keys() & {"resume", "override"}) :]:
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            call("quickstart", **wrong)
        assert isinstance(caught.value, cure_fast.InputError)
        assert "\n" not in str(caught.value)
    assert not list(folder.iterdir())


def test_overrides_are_what_flags_are():
    own = cure_fast.recipe("cifar10-resnet18", method="trades", policies=["piat"], eps=4 / 255)
    assert (own.method, *own.policies, own.attack.eps) == ("trades", "piat", 4 / 255)
    other = cure_fast.recipe(own, policies=[], beta=2, out=Path("x"), milestones=[0.5], name="n")
    assert not other.policies and other.settings.beta == 2.0 and other.optim.milestones == (0.5,)
    assert (other.run.out, other.name, other.attack) == ("x", "n", own.attack)
    published = cure_fast.recipe("cifar10-resnet18", method="trades", regime="published")
    assert published.attack.eps == 0.031


def test_the_kinds_of_images_are_measured_alike_and_the_model_is_left_alone(net):
    pixels, labels = images_of()
    planes = pixels.transpose(0, 3, 1, 2) / 255
    before = state_hashes(net)
    grads = {name: p.grad for name, p in net.named_parameters()}
    modes = [m.training for m in net.modules()]
    found = [
        cure_fast.evaluate(net, images, named, attacks="natural,fgsm,pgd3,cw3", batch_size=5)
        for images, named in (
            (pixels, labels),
            (planes, labels.tolist()),
            (torch.tensor(planes, dtype=torch.float32, requires_grad=True), torch.tensor(labels)),
        )
    ]
    assert found[0].accuracy == found[1].accuracy == found[2].accuracy
    assert list(found[0].accuracy) == ["natural", "fgsm", "pgd3", "cw3"]
    assert found[0].record["attacks"]["pgd3"]["settings"]["eps"] == 8 / 255
    assert state_hashes(net) == before and [m.training for m in net.modules()] == modes
    assert all(p.grad is grads[name] for name, p in net.named_parameters())
    assert [p.requires_grad for p in net[0].parameters()] == [False, False]


def test_attacks_are_those_that_are_measured(net):
    pixels, labels = images_of(40)
    net.eval()
    settings = {"eps": 0.1, "step_size": 0.05, "seed": 3}
    for name in ("fgsm", "pgd3", "cw3"):
        x_adv = cure_fast.attack(net, pixels, labels, attack=name, batch_size=7, **settings)
        natural = torch.tensor(pixels.transpose(0, 3, 1, 2) / 255)
        assert x_adv.shape == natural.shape and x_adv.min() >= 0 and x_adv.max() <= 1
        assert 0.09 < (x_adv - natural).abs().max() < 0.1001
        right = (net(x_adv).argmax(1) == torch.tensor(labels)) & (
            net(natural.float()).argmax(1) == torch.tensor(labels)
        )
        told = cure_fast.evaluate(net, pixels, labels, attacks=[name], **settings)
        assert told.accuracy[name] == pytest.approx(100 * right.float().mean().item())
    with pytest.raises(ValueError, match="expected fgsm, pgdK or cwK, got 'aa'"):
        cure_fast.attack(net, pixels, labels, attack="aa")


PIXELS, LABELS = images_of()
PLANES = PIXELS.transpose(0, 3, 1, 2) / 255


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (PIXELS.transpose(0, 3, 1, 2), LABELS, r"C 1 or 3, got uint8 \[12, 3, 8, 8\]"),
        (PIXELS / 255, LABELS, r"C 1 or 3, got float64 \[12, 8, 8, 3\]"),
        (PLANES * 255, LABELS, "image 0: expected values in .*; divide by 255"),
        (PIXELS.astype(int), LABELS, "got int64"),
        (PIXELS[0], LABELS, r"got uint8 \[8, 8, 3\]"),
        (PIXELS.astype(object), LABELS, "got object"),
        (PIXELS.tolist(), LABELS, "images: expected an array or tensor .*, got list"),
        (PLANES, LABELS[:5], r"labels: expected int64 \[12\], one per image"),
        (PLANES, LABELS / 1, "labels: expected whole numbers .*float64"),
        (PLANES, ["cat"] * 12, "labels: expected whole numbers"),
        (PLANES, LABELS + 1, r"label of image 9: expected a class in \[0, 9\], got 10"),
        (PLANES * np.nan, LABELS, "image 0: expected values in"),
    ],
)
def test_images_and_labels_of_other_kinds_are_refused(net, images, labels, message):
    for call in (cure_fast.evaluate, cure_fast.attack):
        with pytest.raises(ValueError, match=message):
            call(net, images, labels)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Flatten(2), "expected logits of shape"),
        (nn.Conv2d(3, 4, 3, dtype=torch.float16), "expected float32 weights"),
        ("no/such/run", "cannot be opened"),
    ],
)
def test_what_is_no_classifier_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        cure_fast.evaluate(model, PLANES, LABELS)


def test_what_is_of_another_type_is_refused_as_input(net):
    for call in (cure_fast.evaluate, cure_fast.attack):
        with pytest.raises(cure_fast.InputError, match="model: expected a module, a run or"):
            call(None, PLANES, LABELS)
        with pytest.raises(cure_fast.InputError, match="eps: expected a number such as"):
            call(net, PLANES, LABELS, eps="8 / 25 5")
    with pytest.raises(cure_fast.InputError, match="to start from, got 3"):
        cure_fast.recipe(3)
    with pytest.raises(cure_fast.InputError, match="model: expected a module"):
        cure_fast.load(3)


def test_a_radius_may_be_written_as_a_fraction(net):
    assert cure_fast.recipe("quickstart", eps="8/255").attack.eps == 8 / 255
    images = [cure_fast.attack(net.eval(), PLANES, LABELS, eps=e) for e in ("8/255", 8 / 255)]
    assert torch.equal(*images)
    told = cure_fast.evaluate(net, PLANES, LABELS, attacks=["fgsm"], eps="8/255")
    assert told.record["attacks"]["fgsm"]["settings"]["eps"] == 8 / 255
