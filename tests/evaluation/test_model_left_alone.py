"""An evaluation measures the model that it is given, and gives it back as it was."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from cure_fast.classifier import ImageClassifier
from cure_fast.errors import CureFastError, InputError, StoppedError
from cure_fast.evaluation.evaluate import adversarial_examples, evaluate
from cure_fast.evaluation.model_state import Watch, state_hashes

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON: dict[str, Any] = {
    "eps": 0.05,
    "step_size": None,
    "batch_size": 5,
    "device": "cpu",
    "seed": 0,
}


def switches():
    backends: Any = torch.backends
    return (
        torch.get_float32_matmul_precision(),
        backends.cudnn.allow_tf32,
        backends.cuda.matmul.allow_tf32,
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
        backends.mkldnn.matmul.fp32_precision,
        backends.mkldnn.conv.fp32_precision,
    )


def snapshot(model: nn.Module):
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: p.grad for name, p in model.named_parameters()},
        state_hashes(model),
        switches(),
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        sys.gettrace(),
    )


@pytest.fixture
def allowed_tf32():
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(former)


@pytest.mark.parametrize("ends", ["finished", "stopped"])
@pytest.mark.parametrize("attack", ["natural", "fgsm", "pgd3", "cw3", "aa"])
def test_everything_is_restored(conv_net, data, allowed_tf32, attack, ends):
    model = conv_net(4)
    images, labels = data(model, 10)
    model.norm.train()
    assert model.training and not model.frozen.training
    model.head.bias.grad = torch.ones(4)
    # AutoAttack is soon through where nothing stays robust.
    common: dict[str, Any] = COMMON | {"eps": 0.3 if attack == "aa" else 0.05}
    before = snapshot(model)
    calls = []

    def stop() -> bool:
        calls.append(1)
        return ends == "stopped" and len(calls) > 4

    def run() -> None:
        evaluate(model, images, labels, num_classes=4, attacks=[attack], stop=stop, **common)

    if ends == "stopped":
        with pytest.raises(StoppedError):
            run()
    else:
        run()
    assert len(calls) > 4
    after = snapshot(model)
    assert after == before
    assert after[2]["head.bias"] is before[2]["head.bias"]


class Watching(ImageClassifier):
    """Notes in which state its forward pass ran."""

    def __init__(self) -> None:
        super().__init__(width=1)
        self.head = nn.Linear(48, 4)
        self.seen: set[tuple[object, ...]] = set()

    def logits(self, x):
        out = self.head(x.flatten(1))
        backends: Any = torch.backends
        state = (
            self.training,
            self.head.weight.requires_grad,
            out.dtype,
            torch.is_autocast_enabled("cpu"),
            backends.cuda.matmul.fp32_precision,
            backends.cudnn.conv.fp32_precision,
            backends.mkldnn.matmul.fp32_precision,
        )
        self.seen.add(state)
        return out


def test_forward_passes_are_float32_in_evaluation_mode(data, allowed_tf32):
    model = Watching()
    images, labels = data(model, 10)
    model.seen.clear()
    model.compute_dtype = torch.bfloat16
    common: dict[str, Any] = COMMON | {"eps": 0.3}
    with torch.autocast("cpu", torch.bfloat16):
        results = evaluate(
            model, images, labels, num_classes=4, attacks=["natural", "pgd3", "aa"], **common
        )
    assert model.seen == {(False, False, torch.float32, False, "ieee", "ieee", "ieee")}
    assert model.compute_dtype is torch.bfloat16 and model.training
    assert {r.precision for r in results.values()} == {"float32"}
    model.compute_dtype = None
    plain = evaluate(model, images, labels, num_classes=4, attacks=["natural", "pgd3"], **common)
    assert {n: r.correct for n, r in plain.items()} == {
        n: results[n].correct for n in ("natural", "pgd3")
    }


def test_works_inside_inference_mode(linear, data):
    model = linear()
    images, labels = data(model)
    common: dict[str, Any] = COMMON | {"num_classes": 4, "attacks": ["pgd5"]}
    with torch.inference_mode():
        inside = evaluate(model, images, labels, **common)
    outside = evaluate(model, images, labels, **common)
    assert inside["pgd5"].correct == outside["pgd5"].correct


@pytest.mark.parametrize("attack", ["natural", "pgd3", "aa"])
def test_a_model_that_writes_to_its_buffers_is_refused(data, tmp_path, attack):
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(48, 4)
            self.register_buffer("passes", torch.zeros(()), persistent=False)

        def forward(self, x):
            self.passes += 1
            return self.head(x.flatten(1))

    model = Counting()
    images, labels = data(model, 6)
    with pytest.raises(CureFastError, match="changed passes of the model"):
        evaluate(
            model, images, labels, num_classes=4, attacks=[attack], state_dir=tmp_path, **COMMON
        )
    assert not list(tmp_path.iterdir())
    with pytest.raises(CureFastError, match="changed passes"):
        adversarial_examples(
            model, images, labels, eps=0.1, step_size=0.1, steps=1, device="cpu", seed=0
        )


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("attack", ["natural", "pgd3", "aa"])
def test_a_model_that_writes_to_its_weights_is_refused(data, tmp_path, attack, stored):
    class Drifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(48, 4)

        def forward(self, x):
            with torch.no_grad():
                self.head.bias += 1e-6
            return self.head(x.flatten(1))

    model = Drifting()
    images, labels = data(model, 6)
    folder = tmp_path if stored else None
    with pytest.raises(CureFastError, match=r"changed head\.bias of the model"):
        evaluate(model, images, labels, num_classes=4, attacks=[attack], state_dir=folder, **COMMON)
    assert not list(tmp_path.iterdir())


def test_statistics_that_a_batchnorm_in_training_mode_moves_are_seen(data):
    """PyTorch does not count what is written to them; here nothing else is."""

    class Training(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(48, 4)
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, x):
            x = nn.functional.batch_norm(x, self.mean, self.var, training=True)
            return self.head(x.flatten(1))

    model = Training()
    images, labels = data(model, 6)
    with pytest.raises(CureFastError, match="changed mean, var of the model"):
        evaluate(model, images, labels, num_classes=4, attacks=["natural"], **COMMON)


def add(model: nn.Linear) -> None:
    with torch.no_grad():
        model.weight.add_(1)


def add_behind_the_count(model: nn.Linear) -> None:
    model.weight.data.add_(1)


def swap_the_values(model: nn.Linear) -> None:
    model.weight.data = model.weight.data.clone()


def swap_the_parameter(model: nn.Linear) -> None:
    model.weight = nn.Parameter(model.weight.detach())


@pytest.mark.parametrize(
    ("change", "quick"),
    [
        (add, True),
        (swap_the_values, True),
        (swap_the_parameter, True),
        (add_behind_the_count, False),
    ],
)
def test_what_a_quick_and_a_thorough_look_see(change, quick):
    for thorough in (False, True):
        model = nn.Linear(3, 2)
        watch = Watch(model, thorough=True)
        watch.check(thorough=thorough)
        change(model)
        if quick or thorough:
            with pytest.raises(CureFastError, match="changed weight of the model"):
                watch.check(thorough=thorough)
        else:
            watch.check(thorough=thorough)


def test_weights_made_in_inference_mode_are_watched():
    with torch.inference_mode():
        model = nn.Linear(3, 2)
        watch = Watch(model, thorough=False)
        watch.check()
        model.bias.add_(1)
        with pytest.raises(CureFastError, match="changed bias of the model"):
            watch.check()


@pytest.mark.parametrize("stored", [False, True])
def test_weights_are_read_only_where_results_are_kept(data, tmp_path, monkeypatch, stored):
    """Once before, and once after each attack; a validation keeps nothing."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    images, labels = data(model, 6)
    read = []

    def counted(model: nn.Module) -> dict[str, str]:
        read.append(1)
        return state_hashes(model)

    monkeypatch.setattr("cure_fast.evaluation.model_state.state_hashes", counted)
    attacks = ["natural", "pgd2"]
    folder = tmp_path if stored else None
    evaluate(model, images, labels, num_classes=4, attacks=attacks, state_dir=folder, **COMMON)
    assert len(read) == (3 if stored else 0)


def test_half_precision_weights_are_refused(linear, data):
    model = linear()
    images, labels = data(model)
    with pytest.raises(InputError, match=r"float32 weights, but weight is torch\.bfloat16"):
        evaluate(model.bfloat16(), images, labels, num_classes=4, attacks=["natural"], **COMMON)


def test_float64_weights_are_measured_in_float64(linear, data, short_square):
    model = linear()
    images, labels = data(model, 12)
    result = evaluate(
        model.double(), images, labels, num_classes=4, attacks=["pgd20", "aa"], **COMMON
    )
    assert {r.precision for r in result.values()} == {"float64"}
    assert result["aa"].correct == int(model.robust(images, labels, 0.05).sum())


def test_model_on_another_device_is_refused(linear, data):
    model = linear()
    images, labels = data(model)
    common: dict[str, Any] = COMMON | {"device": "cuda"}
    with pytest.raises(InputError, match="expected it on cuda, but weight is on cpu"):
        evaluate(model, images, labels, num_classes=4, attacks=["natural"], **common)


def test_prints_nothing_where_stderr_is_no_terminal(linear, data, capfd):
    model = linear()
    images, labels = data(model, 6)
    seen = []
    common: dict[str, Any] = COMMON | {"eps": 0.3}
    results = evaluate(
        model,
        images,
        labels,
        num_classes=4,
        attacks=["pgd2", "natural", "aa", "pgd2"],
        on_result=seen.append,
        **common,
    )
    assert list(results) == ["pgd2", "natural", "aa"] and seen == list(results.values())
    assert capfd.readouterr() == ("", "")
