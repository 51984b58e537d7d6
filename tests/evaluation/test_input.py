"""What cannot be measured is refused with the reason; names and results survive a round trip."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cure_fast.config.attack_names import ATTACKS, parse_attack
from cure_fast.errors import CureFastError, DivergedError, InputError
from cure_fast.evaluation.attack_result import AttackResult, nrr
from cure_fast.evaluation.evaluate import adversarial_examples, evaluate
from cure_fast.evaluation.trust import check_perturbation

pytestmark = pytest.mark.usefixtures("one_thread")

# What 10,000 images can give.
accuracies = st.integers(0, 10_000).map(lambda correct: correct / 100)
COMMON: dict[str, Any] = {
    "eps": 0.1,
    "step_size": None,
    "batch_size": 7,
    "device": "cpu",
    "seed": 0,
}


@given(family=st.sampled_from(["pgd", "cw"]), steps=st.integers(1, 1000))
def test_steps_are_read_from_the_name(family, steps):
    spec = parse_attack(f"{family}{steps}")
    assert (spec.name, spec.family, spec.steps) == (f"{family}{steps}", family, steps)


def test_names_without_steps():
    assert [parse_attack(n).steps for n in ("natural", "fgsm", "aa")] == [0, 1, 0]
    assert set(ATTACKS) == {"natural", "fgsm", "pgdK", "pgdK-t", "cwK", "aa"}


@pytest.mark.parametrize(
    "text",
    [
        *("", "pgd", "pgd0", "pgd1001", "pgd007", "pgd-1", "pgd2.5", "PGD20", "cw", "aa2", "pgdK"),
        *("cw20-t", "pgd-t", "pgd0-t", "pgd20-T"),
    ],
)
def test_unknown_names_list_the_valid_ones(text):
    told = "natural, fgsm, pgdK, pgdK-t, cwK, aa with K from 1 to 1000"
    with pytest.raises(InputError, match=told):
        parse_attack(text)


@given(natural=accuracies, robust=accuracies)
def test_nrr_is_the_harmonic_mean(natural, robust):
    value = nrr(natural, robust)
    assert min(natural, robust) * (1 - 1e-12) <= value <= max(natural, robust) * (1 + 1e-12)
    assert value == nrr(robust, natural)


def test_nrr_of_the_papers_row():
    # CURE, Table 1, WideResNet-34-10, row AT: 85.17 and 52.91 give 65.27.
    assert nrr(85.17, 52.91) == pytest.approx(65.27, abs=0.005)
    assert nrr(0.0, 0.0) == 0.0


@given(
    correct=st.integers(0, 50),
    warnings=st.lists(st.text(max_size=5), max_size=2).map(tuple),
    seconds=st.floats(0, 1e6),
)
def test_results_survive_json(correct, warnings, seconds):
    result = AttackResult(
        attack="pgd20",
        correct=correct,
        count=50,
        seconds=seconds,
        settings={"eps": 8 / 255, "robust_after": {"square": 3}},
        warnings=warnings,
        reliable=not warnings,
    )
    stored = json.loads(json.dumps(result.to_dict()))
    assert AttackResult.from_dict(stored) == result
    assert stored["accuracy"] == 2 * correct and stored["precision"] == "float32"


def changed(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


BAD_DATA = {
    "label of image 3: expected a class in \\[0, 3\\], got 4": lambda x, y: (x, changed(y, 3, 4)),
    "label of image 0: .* got -1": lambda x, y: (x, changed(y, 0, -1)),
    "labels: expected int64 \\[24\\]": lambda x, y: (x, y.int()),
    "labels: .*\\(23,\\)": lambda x, y: (x, y[1:]),
    "images: .*\\(24, 4, 4\\)": lambda x, y: (x[..., 0], y),
    "images: .* torch.int32": lambda x, y: (x.int(), y),
    "images: .*\\(0, 4, 4, 3\\)": lambda x, y: (x[:0], y[:0]),
    "image 0: expected values in \\[0, 1\\], got .* to 255": lambda x, y: (
        changed(x, (0, 0, 0, 0), 255).float(),
        y,
    ),
    "image 5: .* got -0.1 to ": lambda x, y: (changed(x / 255, (5, 0, 0, 0), -0.1), y),
    "image 6: .* got nan": lambda x, y: (changed(x / 255, (6, 0, 0, 0), torch.nan), y),
}


@pytest.mark.parametrize("message", BAD_DATA)
def test_bad_data_is_named(linear, data, message):
    model = linear()
    images, labels = BAD_DATA[message](*data(model))
    with pytest.raises(InputError, match=message):
        evaluate(model, images, labels, num_classes=4, attacks=["natural"], **COMMON)
    with pytest.raises(InputError, match=message):
        adversarial_examples(
            model, images, labels, eps=0.1, step_size=0.1, steps=1, device="cpu", seed=0
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": -0.1}, "eps"),
        ({"eps": 1.5}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": -1.0}, "step_size"),
        ({"step_size": float("nan")}, "step_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"aa_limit": 0}, "aa_limit"),
        ({"seed": -1}, "seed"),
        ({"attacks": []}, "attacks: expected at least one"),
        ({"attacks": ["natural", "deepfool"]}, "got 'deepfool'"),
        ({"num_classes": 1}, "num_classes"),
        ({"num_classes": 5}, r"logits of shape \(7, 5\), got \(7, 4\)"),
    ],
)
def test_bad_settings_are_named(linear, data, settings, message):
    model = linear()
    images, labels = data(model)
    common: dict[str, Any] = COMMON | {"num_classes": 4, "attacks": ["pgd2"]} | settings
    with pytest.raises(InputError, match=message):
        evaluate(model, images, labels, **common)


def test_outputs_that_are_no_tensor_are_refused(linear, data):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    images, labels = data(linear())
    with pytest.raises(InputError, match="got tuple"):
        evaluate(Pair(), images, labels, num_classes=4, attacks=["natural"], **COMMON)


class Poisoned(nn.Module):
    """Linear, but NaN where a pixel is brighter than the limit."""

    def __init__(self, base: nn.Module, limit: float, value: float) -> None:
        super().__init__()
        self.base, self.limit, self.value = base, limit, value

    def forward(self, x):
        bright = (x.flatten(1) > self.limit).any(dim=1, keepdim=True)
        return self.base(x).masked_fill(bright, self.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_logits_that_are_not_finite_are_an_error(linear, data, batch_size, value):
    base = linear()
    images, labels = data(base)
    images = changed(images // 2, (9, 1, 1, 0), 200)
    common: dict[str, Any] = COMMON | {"batch_size": batch_size, "attacks": ["natural"]}
    with pytest.raises(DivergedError, match=r"^image 9: the model's logits are not finite"):
        evaluate(Poisoned(base, 0.7, value), images, labels, num_classes=4, **common)


@pytest.mark.parametrize("attack", ["fgsm", "pgd10", "cw10", "aa"])
def test_logits_that_an_attack_makes_nan_are_an_error(linear, data, attack):
    base = linear()
    images, _ = data(base)
    images = changed(images // 2, (9, 1, 1, 0), 200)
    # Half of the attacks darken the bright pixel; this weight makes all of them brighten it.
    with torch.no_grad():
        base.weight[:, 5] = 0
        labels = base(images.permute(0, 3, 1, 2) / 255).argmax(dim=1)
        base.weight[labels[9], 5] = -0.5
        base.bias[labels[9]] += 0.5
    common: dict[str, Any] = COMMON | {
        "eps": 0.15,
        "step_size": 0.05,
        "attacks": ["natural", attack],
    }
    poisoned = Poisoned(base, 0.85, float("nan"))
    part = {"aa": "apgd-ce"}.get(attack, attack)
    with pytest.raises(DivergedError, match=rf"^image 9: .* logits are not finite under {part} \("):
        evaluate(poisoned, images, labels, num_classes=4, **common)


@pytest.mark.parametrize("attack", ["fgsm", "pgd3", "cw3", "aa"])
def test_a_gradient_that_is_not_finite_is_an_error(linear, data, attack):
    base = linear()
    images, labels = data(base)

    class Rooted(nn.Module):
        # Adds 0, whose gradient is infinity times zero.
        def forward(self, x):
            return base(x) + (0 * x[:, 0, 0, :1]).sqrt()

    common: dict[str, Any] = COMMON | {"num_classes": 4}
    natural = evaluate(Rooted(), images, labels, attacks=["natural"], **common)
    assert natural["natural"].correct == len(images)
    part = {"aa": "apgd-ce"}.get(attack, attack)
    with pytest.raises(
        DivergedError, match=rf"^image 0: the gradient in the image is not finite, so {part} cannot"
    ):
        evaluate(Rooted(), images, labels, attacks=[attack], **common)


def test_images_that_leave_the_l2_ball_are_an_error():
    x = torch.full((2, 3, 2, 2), 0.5)
    moved = x.clone()
    moved[1] += 0.1  # By 0.1 * sqrt(12) = 0.346.
    check_perturbation(moved, x, torch.tensor([4, 5]), 0.35, "pgd1", "l2")
    with pytest.raises(CureFastError, match=r"image 5 lies 0\.34641 from .* \(eps 0\.3\)"):
        check_perturbation(moved, x, torch.tensor([4, 5]), 0.3, "pgd1", "l2")


def test_images_that_leave_the_ball_are_an_error():
    x = torch.full((3, 3, 2, 2), 0.95)
    indices = torch.tensor([4, 5, 6])
    check_perturbation((x + 0.04).clamp(0, 1), x, indices, 0.04, "pgd1")
    for x_adv, eps in (((x + 0.05).clamp(0, 1), 0.04), (x + 0.06, 0.1)):
        with pytest.raises(CureFastError, match="pgd1: the adversarial image 4 lies"):
            check_perturbation(x_adv, x, indices, eps, "pgd1")
    for value in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(DivergedError, match="pgd1: the adversarial image 5 has values that"):
            check_perturbation(changed(x, (1, 0, 0, 0), value), x, indices, 0.1, "pgd1")
