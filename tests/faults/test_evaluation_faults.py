"""An evaluation that is killed, stopped, out of memory or given what cannot be measured.

What else is refused, and what is kept of finished attacks: tests/evaluation.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cure_fast.cli.main import main
from cure_fast.errors import (
    DivergedError,
    InputError,
    MemoryExhaustedError,
    StoppedError,
    is_out_of_memory,
)
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.evaluation.evaluate import adversarial_examples, evaluate
from cure_fast.evaluation.measurement import Measurement
from cure_fast.evaluation.trust import Guard
from cure_fast.loaders import read_dataset
from cure_fast.models import build_model
from cure_fast.models.weights import save_weights
from short_attacks import shorten

GRADIENT_ATTACKS = ("natural", "fgsm", "pgd5", "cw5")
COMMON: dict[str, Any] = {
    "num_classes": 10,
    "attacks": GRADIENT_ATTACKS,
    "eps": 0.05,
    "step_size": 0.02,
    "batch_size": 16,
    "device": "cpu",
    "seed": 0,
}


class Net(nn.Module):
    """A small network that counts its passes, and may do something at one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2)
        )
        self.head = nn.Linear(6 * 16, 10)
        self.calls = 0
        self.before: Callable[[int, Tensor], None] = lambda call, x: None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.before(self.calls, x)
        return self.head(self.features(x).flatten(1))


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """The first 60 test images of the digits."""
    test = read_dataset("digits", Path("data"), "test")
    return torch.from_numpy(test.images[:60]), torch.from_numpy(test.labels[:60])


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    """Weights of a small network that is right on most digits and broken on some."""
    torch.set_num_threads(1)
    data = read_dataset("digits", Path("data"), "train")
    x = torch.from_numpy(data.images).permute(0, 3, 1, 2) / 255
    y = torch.from_numpy(data.labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(4):
            for part in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[part]), y[part]).backward()
                optimizer.step()
    return model.state_dict()


@pytest.fixture
def net(trained) -> Net:
    return net_of(trained)


def net_of(weights: dict[str, Tensor]) -> Net:
    model = Net()
    model.load_state_dict(weights)
    # Some tests wrap it out of sight of the evaluation, which switches modes.
    return model.eval()


@pytest.fixture(scope="module")
def unbroken(trained, digits) -> dict[str, AttackResult]:
    """The results of an evaluation that nothing happens to."""
    return evaluate(net_of(trained), *digits, **COMMON)


@pytest.fixture
def short_autoattack(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, iterations=10, targets=1)


def counts(results) -> dict[str, int]:
    return {name: result.correct for name, result in results.items()}


def without_time(result) -> dict[str, Any]:
    return result.to_dict() | {"seconds": None}


# --- The batch size.


def test_counts_are_those_of_any_batch_size(net, digits, unbroken):
    found = {
        size: counts(evaluate(net, *digits, **COMMON | {"batch_size": size})) for size in (1, 7)
    }
    assert found[1] == found[7] == counts(unbroken)
    assert 60 >= found[1]["natural"] > found[1]["fgsm"] >= found[1]["pgd5"] > 0


# --- Out of memory.


def limited(images: int, kind: type[Exception]) -> Callable[[int, Tensor], None]:
    """Return what makes a network raise as torch does for more than some images."""
    gpu = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB."
    cpu = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you"

    def check(call: int, x: Tensor) -> None:
        if len(x) > images:
            raise kind(cpu if kind is RuntimeError else gpu)

    return check


@pytest.mark.parametrize(
    ("images", "kind"), [(1, RuntimeError), (3, torch.OutOfMemoryError), (15, MemoryError)]
)
def test_batches_that_do_not_fit_are_halved(net, digits, unbroken, capsys, kind, images):
    assert capsys.readouterr() == ("", "")
    net.before = limited(images, kind)
    results = evaluate(net, *digits, **COMMON)
    assert {n: without_time(r) for n, r in results.items()} == {
        n: without_time(r) for n, r in unbroken.items()
    }
    told = capsys.readouterr()
    lines = told.err.splitlines()
    halved = [s for s in (16, 8, 4, 2) if s > images]
    assert len(lines) == len(halved) and told.out == ""
    for line, size in zip(lines, halved, strict=True):
        expected = f"warning: model: {size} images did not fit into memory; from here {size // 2}"
        assert line.startswith(expected)


# With --slow, also at others of the same kinds.
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(c, marks=pytest.mark.slow if n % 3 else ())
        for n, c in enumerate(range(2, 44, 3))
    ],
)
def test_memory_that_runs_out_at_any_pass_changes_nothing(net, digits, unbroken, call):
    """In the forward pass of the probes, in an attack's gradient, and between them."""

    def once(number: int, x: Tensor) -> None:
        if number == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    net.before = once
    assert counts(evaluate(net, *digits, **COMMON)) == counts(unbroken)
    assert net.calls > call


def test_memory_that_runs_out_in_the_backward_pass(net, digits, unbroken):
    failed = []

    class Heavy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad and len(x) > 4:
                x = x.view_as(x)
                x.register_hook(self.fail)
            return net(x)

        def fail(self, grad: Tensor) -> None:
            failed.append(len(grad))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    assert counts(evaluate(Heavy(), *digits, **COMMON)) == counts(unbroken)
    assert failed == [16, 8]


def test_one_image_that_does_not_fit_is_an_error_with_advice(net, digits):
    net.before = limited(0, torch.OutOfMemoryError)
    with pytest.raises(MemoryExhaustedError, match=r"one image takes more memory .*--device cpu"):
        evaluate(net, *digits, **COMMON)


def test_autoattacks_batch_is_never_halved(net, digits, short_autoattack):
    images, labels = digits
    common: dict[str, Any] = COMMON | {"attacks": ["natural", "aa"], "batch_size": 12}
    net.before = limited(5, torch.OutOfMemoryError)
    with pytest.raises(MemoryExhaustedError, match=r"aa: .*with 12 images.*--eval-batch-size 6"):
        evaluate(net, images[:12], labels[:12], **common)
    net.before = limited(0, torch.OutOfMemoryError)
    with pytest.raises(MemoryExhaustedError, match="one image takes more memory"):
        evaluate(net, images[:12], labels[:12], **common)


def test_pictures_do_not_fit_either(net, digits):
    settings: dict[str, Any] = {"eps": 0.05, "step_size": 0.02, "steps": 3, "seed": 0}
    few = tuple(part[:7] for part in digits)
    whole = adversarial_examples(net, *few, device="cpu", **settings)
    net.before = limited(2, torch.OutOfMemoryError)
    parts = adversarial_examples(net, *few, device="cpu", **settings)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert parts[name].shape == value.shape and parts[name].dtype == value.dtype
        assert abs(parts[name] - value).max() < 1e-6


def test_how_libraries_say_that_memory_ran_out():
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        assert is_out_of_memory(error)
    for error in (RuntimeError("size mismatch"), ValueError("out of memory"), KeyboardInterrupt()):
        assert not is_out_of_memory(error)


# --- Values that are not finite.


def test_a_gradient_that_is_nan_for_one_image_names_attack_and_image(net, digits):
    images, labels = digits

    class Rooted(nn.Module):
        """Its gradient is infinite times zero where the first pixel is brightest."""

        def forward(self, x: Tensor) -> Tensor:
            return net(x) + 0 * (1 - x[:, 0, 0, :1]).clamp(min=0).sqrt()

    images = images.clone()
    images[:, 0, 0, 0] = 100
    images[33, 0, 0, 0] = 255
    for attack in ("fgsm", "pgd3", "cw3"):
        with pytest.raises(DivergedError, match=rf"^image 33: the gradient .* so {attack} cannot"):
            evaluate(Rooted(), images, labels, **COMMON | {"attacks": [attack], "eps": 0.0})


def test_an_attack_that_slips_past_the_guard_is_caught_by_its_images(net, digits, monkeypatch):
    """Without the guard's own check the step carries the NaN into the image, which is looked at."""

    def spoiled(x: Tensor) -> None:
        if x.requires_grad:
            x.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), torch.nan))

    # Neither the gradient nor the passes over NaN that follow it may be what is refused.
    monkeypatch.setattr(Guard, "_require_finite", lambda self, x, refusal, values: None)
    net.before = lambda call, x: spoiled(x)
    with pytest.raises(DivergedError, match=r"^fgsm: the adversarial image 1 has values that are"):
        evaluate(net, *digits, **COMMON | {"attacks": ["fgsm"]})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_have_no_accuracy(tmp_path, capsys, value):
    model = build_model("resnet18", num_classes=10, width=2)
    with torch.no_grad():
        next(model.parameters())[0, 0, 0, 0] = value
    path = tmp_path / "broken.safetensors"
    save_weights(model, path, {"model": "resnet18", "width": "2", "data": "digits"})
    words = f"eval {path} --limit 20 --attacks natural,pgd2 --out {tmp_path / 'out'}"
    code = main(words.split())
    told = capsys.readouterr()
    assert code in (2, 3) and len(told.err.strip().splitlines()) == 1
    assert "not finite" in told.err and "robust" not in told.out
    assert not (tmp_path / "out" / "results.json").exists()


# --- Stopping.


def test_every_pass_asks_first_whether_to_stop(net, digits, short_autoattack):
    images, labels = digits
    order: list[str] = []
    net.before = lambda call, x: order.append(f"pass over {len(x)}")

    def stop() -> bool:
        order.append("asked")
        return False

    evaluate(
        net,
        images[:12],
        labels[:12],
        stop=stop,
        **COMMON | {"attacks": [*GRADIENT_ATTACKS, "aa"], "batch_size": 6},
    )
    passes = [i for i, what in enumerate(order) if what != "asked"]
    assert len(passes) > 100
    assert all(order[i - 1] == "asked" for i in passes)
    # Square and FAB may stack targets, never more than one batch.
    assert max(int(order[i].rpartition(" ")[2]) for i in passes) <= 6
    order.clear()
    with pytest.raises(StoppedError):
        adversarial_examples(
            net,
            images[:4],
            labels[:4],
            eps=0.1,
            step_size=0.1,
            steps=9,
            device="cpu",
            seed=0,
            stop=lambda: len(order) == 5,
        )
    assert len(order) == 5


# --- AutoAttack is killed.


def autoattack(net: Net, digits: tuple[Tensor, Tensor], folder: Path | None) -> Any:
    images, labels = digits
    common = COMMON | {"attacks": ["natural", "aa"], "batch_size": 5}
    return evaluate(net, images[:10], labels[:10], state_dir=folder, **common)["aa"]


def killed(net: Net, digits: tuple[Tensor, Tensor], folder: Path, at: int) -> int | None:
    """Evaluate in a process that kills itself at a pass; return its exit code."""

    def work() -> None:
        torch.set_num_threads(1)
        net.calls = 0
        net.before = lambda call, x: os.kill(os.getpid(), signal.SIGKILL) if call == at else None
        autoattack(net, digits, folder)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(240)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def test_autoattack_killed_anywhere_ends_with_the_same_images(
    net, digits, tmp_path, short_autoattack, monkeypatch
):
    flags: dict[str, list[str]] = {}
    attack = Measurement.under_autoattack

    def watched(self: Measurement, correct: Tensor, *rest: Any) -> Any:
        outcome = attack(self, correct, *rest)
        flags[str(self.state_dir)] = outcome.robust.tolist()
        return outcome

    monkeypatch.setattr(Measurement, "under_autoattack", watched)
    unbroken = autoattack(net, digits, None)
    passes, net.calls = net.calls, 0
    assert 0 < unbroken.correct < 10
    # Inside of apgd-ce, apgd-t, fab-t and square, and one kill after the other in one folder.
    for number, shares in enumerate(([0.02], [0.3], [0.6, 0.2, 0.1], [0.99])):
        folder = tmp_path / str(number)
        for share in shares:
            assert killed(net, digits, folder, int(passes * share)) == -signal.SIGKILL
        begun = json.loads((folder / "aa.json").read_text()) if shares[0] > 0.2 else None
        assert begun is None or begun["progress"]["after"] or begun["progress"]["batches"]
        continued = autoattack(net, digits, folder)
        assert without_time(continued) == without_time(unbroken)
        assert flags[str(folder)] == flags["None"]


def test_a_killed_state_of_another_model_set_or_radius_is_refused(
    net, digits, tmp_path, short_autoattack
):
    images, labels = digits
    common: dict[str, Any] = COMMON | {"attacks": ["aa"], "batch_size": 5, "state_dir": tmp_path}

    def stop() -> bool:
        return (tmp_path / "aa.json").exists()

    with pytest.raises(StoppedError):
        evaluate(net, images[:10], labels[:10], stop=stop, **common)
    stored = (tmp_path / "aa.json").read_text()
    assert "progress" in json.loads(stored)
    other = images.clone()
    other[9, 0, 0, 0] ^= 1
    with pytest.raises(InputError, match=r"stored with other eps \(0\.05 there, 0\.06 here\)"):
        evaluate(net, images[:10], labels[:10], **common | {"eps": 0.06})
    with pytest.raises(InputError, match=r"stored with other images \("):
        evaluate(net, other[:10], labels[:10], **common)
    with torch.no_grad():
        net.head.bias[0] += 1e-6
    with pytest.raises(InputError, match=r"stored with other weights \("):
        evaluate(net, images[:10], labels[:10], **common)
    assert (tmp_path / "aa.json").read_text() == stored
