"""RGP for other people's loops: scope, results, tables that follow the gradients."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cure_fast.kernels import RGP, TensorList, rgp_mask_

ROOT = Path(__file__).resolve().parents[2]


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2), nn.BatchNorm1d(2)
    )


def gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) for p in parameters]


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        ("all", [f"{i}.{kind}" for i in (0, 1, 3, 4) for kind in ("weight", "bias")]),
        ("conv", ["0.weight"]),
        ("conv+bn", ["0.weight", "1.weight", "1.bias", "4.weight", "4.bias"]),
        ([r"0\..*", "3.weight"], ["0.weight", "0.bias", "3.weight"]),
    ],
)
def test_a_scope_chooses_the_tensors(scope, names):
    rgp = RGP(model().named_parameters(), percentile=30, alpha=0.1, scope=scope)
    assert list(rgp.names) == names and len(rgp.parameters) == len(names)


@pytest.mark.parametrize("choice", ["triton", "reference"])
def test_masks_are_those_of_the_operation_step_after_step(choice, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    net = model()
    rgp = RGP(net.named_parameters(), percentile=40, alpha=0.2, scope="conv+bn")
    for step in range(3):
        nat, adv = gradients(rgp.parameters, step), gradients(rgp.parameters, step + 9)
        for parameter, grad in zip(
            rgp.parameters, gradients(rgp.parameters, step + 20), strict=True
        ):
            parameter.grad = grad
        expected = [p.grad.clone() for p in rgp.parameters]
        kept_expected = rgp_mask_(expected, nat, adv, percentile=40, alpha=0.2)
        kept = rgp.mask_(nat, adv)
        assert torch.equal(kept, kept_expected) and kept.min() < 1
        assert all(torch.equal(p.grad, e) for p, e in zip(rgp.parameters, expected, strict=True))
        assert net[3].weight.grad is None


def test_a_call_builds_nothing_where_addresses_stay_and_follows_where_they_change(triton_kernels):
    rgp = RGP(model().named_parameters(), percentile=40, alpha=0.2)
    nat, adv, grads = (gradients(rgp.parameters, seed) for seed in (1, 2, 3))
    first = rgp.mask_(nat, adv, grads).clone()
    tables = dict(rgp._tables)
    for tensor in nat:
        tensor.mul_(-3)
    rgp.mask_(nat, adv, grads)
    moved = [tensor.clone() for tensor in gradients(rgp.parameters, 1)]
    again = rgp.mask_(moved, adv, grads)
    assert all(rgp._tables[name] is table for name, table in tables.items())
    assert torch.equal(again, first)


def test_gradients_of_another_kind_get_tables_of_their_own(triton_kernels):
    rgp = RGP(model().named_parameters(), percentile=40, alpha=0.2)
    nat, adv = gradients(rgp.parameters, 1), gradients(rgp.parameters, 2)
    expected = rgp.select(nat, adv).thresholds.clone()
    half = [tensor.half() for tensor in nat]
    assert not torch.equal(rgp.select(half, adv).thresholds, expected)
    assert torch.equal(rgp.select(nat, adv).thresholds, expected)


@pytest.mark.parametrize("choice", ["triton", "reference"])
def test_non_finite_scores_are_counted(choice, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    rgp = RGP(model().named_parameters(), percentile=40, alpha=0.2, scope="conv")
    nat, adv = gradients(rgp.parameters, 1), gradients(rgp.parameters, 2)
    nat[0].view(-1)[:3] = torch.tensor([float("nan"), float("inf"), 1.0])
    assert rgp.select(nat, adv).nonfinite.tolist() == [2]
    assert rgp.select(gradients(rgp.parameters, 1), adv).nonfinite.tolist() == [0]


def test_gradients_in_another_memory_order_are_refused_by_name():
    net = model().to(memory_format=torch.channels_last)
    rgp = RGP(net.named_parameters(), percentile=30, alpha=0.1, scope="conv")
    nchw = [torch.randn(4, 3, 3, 3)]
    last = [nchw[0].to(memory_format=torch.channels_last)]
    with pytest.raises(ValueError, match=r"adv_grads of 0.weight: expected strides"):
        rgp.select(last, nchw)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"percentile": 101}, "percentile: "),
        ({"alpha": -0.1}, "alpha: "),
        ({"scope": "none"}, "scope: expected one of all, conv"),
        ({"scope": ["nothing"]}, "scope: expected one that matches"),
        ({"score": "sum"}, "score: expected one of"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RGP(model().named_parameters(), **({"percentile": 30, "alpha": 0.1} | arguments))


def test_a_missing_gradient_is_named():
    rgp = RGP(model().named_parameters(), percentile=30, alpha=0.1)
    grads = gradients(rgp.parameters, 0)
    with pytest.raises(ValueError, match=r"0.weight: expected a gradient, got None"):
        rgp.mask_(grads, grads)


def test_a_list_refuses_tensors_with_gaps_and_names_that_do_not_fit():
    with pytest.raises(ValueError, match="w: expected a tensor whose elements fill"):
        TensorList([torch.zeros(4, 4)[:, :2]], names=["w"])
    with pytest.raises(ValueError, match="names: expected 1"):
        TensorList([torch.zeros(4)], names=[])


def test_a_list_takes_other_tensors_only_of_the_same_kind():
    first, second = torch.zeros(3), torch.ones(3)
    tensors = TensorList([first])
    assert tensors.point_to([second]) and tensors[0] is second
    assert tensors.addresses.tolist() == [second.data_ptr()]
    for other in (torch.zeros(4), torch.zeros(3).half(), torch.zeros(6)[::2]):
        assert not tensors.point_to([other]) and tensors[0] is second


def test_the_example_trains(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "rgp_in_your_own_loop.py")],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[3]) for line in done.stdout.splitlines() if "loss" in line]
    assert len(losses) == 5 and losses[-1] < losses[0] / 2, done.stdout
