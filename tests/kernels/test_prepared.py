"""RGP for other people's loops: scope, results, tables that follow the gradients."""

from __future__ import annotations

import runpy
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from cure_fast.kernels import RGP, TensorList, masked_sgd_, rgp_mask_

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
    first = rgp.mask_(nat, adv, grads)
    tables = {name: list(several.tables) for name, several in rgp._tables.items()}
    for tensor in nat:
        tensor.mul_(-3)
    rgp.mask_(nat, adv, grads)
    moved = [tensor.clone() for tensor in gradients(rgp.parameters, 1)]
    again = rgp.mask_(moved, adv, grads)
    assert tables.keys() == {"nat_grads", "adv_grads", "grads"}
    assert {name: several.tables for name, several in rgp._tables.items()} == tables
    assert torch.equal(again, first)


def test_gradients_are_let_go_between_steps(triton_kernels):
    """What holds them would keep their memory, and move the next step's elsewhere."""
    net = model()
    rgp = RGP(net.named_parameters(), percentile=40, alpha=0.2)
    gone = []
    for step in range(2):
        nat, adv = gradients(rgp.parameters, step), gradients(rgp.parameters, step + 9)
        for parameter, grad in zip(rgp.parameters, gradients(rgp.parameters, 5), strict=True):
            parameter.grad = grad
        gone += [weakref.ref(grad) for grad in (*nat, *adv, *(p.grad for p in rgp.parameters))]
        rgp.mask_(nat, adv)
        net.zero_grad(set_to_none=True)
        del nat, adv, grad
    assert len(gone) == 48 and all(grad() is None for grad in gone)


def test_gradients_are_let_go_after_an_error(triton_kernels):
    rgp = RGP(model().named_parameters(), percentile=40, alpha=0.2)
    nat, grads = gradients(rgp.parameters, 1), gradients(rgp.parameters, 2)
    gone = [weakref.ref(grad) for grad in (*nat, *grads)]
    for wrong, error in (([None] * len(nat), TypeError), (nat[:-1], ValueError)):
        with pytest.raises(error):
            rgp.mask_(nat, wrong, grads)
    del nat, grads, wrong
    assert all(grad() is None for grad in gone)


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
        ({"scope": "fc.*"}, r"scope: expected one of all, conv.*pass \['fc\.\*'\]"),
        ({"scope": ["0.*", "("]}, r"scope\[1\]: expected a regular expression, got '\('"),
        ({"scope": ["nothing"]}, "scope: expected one that matches"),
        ({"score": "sum"}, "score: expected one of"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RGP(model().named_parameters(), **({"percentile": 30, "alpha": 0.1} | arguments))


@pytest.mark.parametrize("scope", [None, 5, ["0.*", 3]])
def test_a_scope_of_another_type_is_refused(scope):
    with pytest.raises(TypeError, match=r"^scope(\[1\])?: expected"):
        RGP(model().named_parameters(), percentile=30, alpha=0.1, scope=scope)


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        (lambda net: net.parameters(), TypeError, "got an item of type Parameter. Pass model.nam"),
        (lambda net: net, TypeError, r"got Sequential\. Pass model\.named_parameters\(\)"),
        (lambda net: None, TypeError, "got NoneType"),
        (lambda net: ["ab"], TypeError, "got an item of type str"),
        (lambda net: [("a", 3)], TypeError, "got an item of type tuple"),
        (lambda net: [], ValueError, r"got none\. Pass model\.named_parameters\(\)"),
        (lambda net: [("a", torch.ones(3))] * 2, ValueError, "each name once, got 'a' twice"),
        (lambda net: [("a", torch.ones(4, 4)[:, :2])], ValueError, "^a: expected a tensor whose"),
    ],
)
def test_what_are_no_named_parameters_is_refused_with_advice(named, error, message):
    with pytest.raises(error, match=message):
        RGP(named(model()), percentile=30, alpha=0.1)


def test_a_dictionary_of_parameters_is_taken():
    assert RGP(dict(model().named_parameters()), percentile=30, alpha=0.1).names[0] == "0.weight"


@pytest.mark.parametrize("choice", ["triton", "reference"])
def test_fractions_of_one_call_outlive_the_next(choice, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    rgp = RGP([("w", torch.zeros(40))], percentile=30, alpha=0.1)
    first = rgp.mask_([torch.rand(40)], [torch.rand(40)], [torch.ones(40)])
    before = first.clone()
    ties = rgp.mask_([torch.ones(40)], [torch.ones(40)], [torch.ones(40)])
    assert torch.equal(first, before) and ties.item() == 1 != first.item()


@pytest.mark.parametrize("choice", ["triton", "reference"])
def test_the_count_of_the_last_call_lets_a_trainer_skip(choice, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    rgp = RGP([("w", torch.zeros(5)), ("v", torch.zeros(2))], percentile=30, alpha=0.1)
    bad, good = torch.tensor([1.0, float("nan"), 2.0, float("inf"), 0.0]), torch.ones(5)
    for grad, counts in ((bad, [2, 0]), (good, [0, 0])):
        rgp.mask_([grad, torch.ones(2)], [good, torch.ones(2)], [torch.ones(5), torch.ones(2)])
        assert rgp.nonfinite.tolist() == counts and rgp.nonfinite.dtype == torch.int32
        weight = torch.ones(5)
        masked_sgd_([weight], [torch.ones(5)], None, lr=0.5, skip=rgp.nonfinite.any())
        assert weight.tolist() == [1.0 if any(counts) else 0.5] * 5


@pytest.mark.parametrize("choice", ["triton", "reference"])
def test_percentile_0_keeps_everything(choice, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    rgp = RGP([("w", torch.zeros(5))], percentile=0, alpha=0.1)
    grad = torch.rand(5)
    wanted = grad.clone()
    assert rgp.mask_([torch.rand(5)], [torch.rand(5)], [grad]).tolist() == [1]
    assert torch.equal(grad, wanted)


def test_a_matrix_in_another_memory_order_comes_with_advice_that_helps():
    weight = torch.zeros(4, 3)
    rgp = RGP([("fc.weight", weight)], percentile=30, alpha=0.1)
    grads = [torch.rand(3, 4).t()]
    advice = r"adv_grads of fc.weight: expected strides .*empty_like\(parameter\).copy_\(gradient"
    with pytest.raises(ValueError, match=advice):
        rgp.select([torch.rand(4, 3)], grads)
    grads = [torch.empty_like(weight).copy_(grads[0])]
    assert rgp.select(grads, grads).kept.item() < 1


def test_gradients_that_are_no_list_are_refused(triton_kernels):
    rgp = RGP([("w", torch.zeros(5))], percentile=30, alpha=0.1)
    good = [torch.rand(5)]
    rgp.select(good, good)
    for bad, message in (
        (iter(good), r"nat_grads: .*list\("),
        (good[0], r"nat_grads: .*\[tensor\]"),
        ([None], r"nat_grads\[0\]: expected a tensor, got NoneType"),
        (TensorList([None]), r"nat_grads\[0\]: expected a tensor, got NoneType"),
    ):
        with pytest.raises(TypeError, match=message):
            rgp.select(bad, good)


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


def test_the_example_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "rgp_in_your_own_loop.py"), run_name="__main__")
    told = capsys.readouterr().out
    losses = [float(line.split()[3]) for line in told.splitlines() if "loss" in line]
    assert len(losses) == 5 and losses[-1] < losses[0] / 2, told
