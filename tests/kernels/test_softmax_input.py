"""What softmax_losses refuses, and how it says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cure_fast.kernels.softmax import softmax_losses

Z = torch.zeros(2, 3)
Y = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "keywords", "error", "gist"),
    [
        ((None, None, Y), {"gradients": ()}, ValueError, "at least one of them"),
        ((Z, None, Y), {}, ValueError, "adv_logits: .*gradient of adversarial_ce"),
        ((None, Z, Y), {"gradients": ("kl",)}, ValueError, "logits: .*gradient of kl"),
        ((Z, Z[:1], Y), {}, ValueError, r"adv_logits: expected shape \[2, 3\]"),
        ((Z, Z.half(), Y), {}, ValueError, "adv_logits: expected torch.float32.*autocast"),
        ((Z.double(), Z.double(), Y), {}, TypeError, "logits: .*float64.*logits.float()"),
        ((Z.long(), Z, Y), {}, TypeError, "logits: expected a floating dtype"),
        ((Z[0], Z[0], Y), {}, ValueError, r"logits: expected shape \[N, K\]"),
        ((Z[:, :0], Z[:, :0], Y), {}, ValueError, "at least one class"),
        ((Z, Z, Y.int()), {}, TypeError, "labels: expected int64.*long"),
        ((Z, Z, Y[:1]), {}, ValueError, r"labels: expected shape \[2\]"),
        ((Z, Z, Y.to("meta")), {}, ValueError, "labels: .* on meta"),
        ((Z, Z, [0, 0]), {}, TypeError, "labels: expected a tensor"),
        ((Z, Z, Y), {"teacher_logits": Z}, ValueError, "both or neither"),
        (
            (None, Z, Y),
            {"teacher_logits": Z, "teacher_adv_logits": Z, "gradients": ()},
            ValueError,
            "logits: .*teacher",
        ),
        (
            (Z, Z, Y),
            {"teacher_logits": Z, "teacher_adv_logits": Z[:1]},
            ValueError,
            "teacher_adv_logits: expected shape",
        ),
        (
            (Z, Z, Y),
            {"teacher_logits": Z.double(), "teacher_adv_logits": Z},
            TypeError,
            "teacher_logits: .*float64",
        ),
        ((Z, Z, Y), {"beta": -1}, ValueError, "beta: .*-1"),
        ((Z, Z, Y), {"gamma": float("nan")}, ValueError, "gamma: .*nan"),
        ((Z, Z, Y), {"natural_target": "frozen"}, ValueError, "natural_target: .*attached"),
        ((Z, Z, Y), {"gradients": ("mse",)}, ValueError, "gradients: .*natural_ce.*mse"),
        ((Z, Z, Y), {"gradients": "kl"}, TypeError, "gradients: .*sequence"),
    ],
)
def test_wrong_arguments_are_named(args, keywords, error, gist):
    with pytest.raises(error, match=gist):
        softmax_losses(*args, **keywords)


@pytest.mark.parametrize("choice", ["triton", "reference"])
@pytest.mark.parametrize("kind", [int, np.float32, np.float64, np.int64])
def test_weights_may_be_integers_and_numpys(kind, choice, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    logits = [torch.randn(2, 3) for _ in range(4)]
    teacher = {"teacher_logits": logits[2], "teacher_adv_logits": logits[3]}
    found = softmax_losses(*logits[:2], Y, **teacher, beta=kind(3), gamma=kind(2))
    wanted = softmax_losses(*logits[:2], Y, **teacher, beta=3.0, gamma=2.0)
    assert torch.equal(found.total, wanted.total) and found.total.dtype == torch.float32
