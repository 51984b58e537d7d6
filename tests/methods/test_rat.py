"""RAT against its formulas, in double precision, and the noise of the copy that it attacks."""

from __future__ import annotations

import copy

import pytest
import torch

import tiny_step
from cure_fast.errors import InputError
from cure_fast.methods.rat import Noisy, soft_targets
from cure_fast.step.train_step import train_step
from cure_fast.training.trainer import next_step


@pytest.mark.parametrize("share", [None, 0.8, 0.0, 1.0])
@pytest.mark.parametrize("classes", [2, 4, 10, 100])
def test_soft_targets_follow_the_gap(classes, share):
    gap = torch.randn(classes, dtype=torch.float64)
    table = soft_targets(gap, torch.arange(classes), share)
    c = {2: 0.0, 4: 0.5, 10: 0.8, 100: 0.98}[classes] if share is None else share
    torch.testing.assert_close(table.sum(1), torch.ones(classes).double())
    torch.testing.assert_close(table.diagonal(), torch.full((classes,), 1 - c).double())
    v = gap - gap.min()
    for j in {0, 1, classes // 2, classes - 1}:
        others = [k for k in range(classes) if k != j]
        if v[others].sum() == 0:
            continue  # 0/0 in the formula
        expected = torch.stack([c * v[k] / v[others].sum() for k in others])
        torch.testing.assert_close(table[j, others], expected, rtol=1e-8, atol=1e-10)
    y = torch.tensor([1, 0, 1])
    assert torch.equal(soft_targets(gap, y, share), table[y])


@pytest.mark.parametrize(
    "gap", [torch.zeros(4), torch.full((4,), -3.0), torch.tensor([0, 0, 1e-30, 0])]
)
def test_classes_without_a_gap_share_alike(gap):
    table = soft_targets(gap.float(), torch.arange(4), 0.6)
    torch.testing.assert_close(table.sum(1), torch.ones(4))
    torch.testing.assert_close(table[2], torch.tensor([0.2, 0.2, 0.4, 0.2]))


def gap_matrix(v, c):
    v = v - v.min()
    v = v / v.sum()
    rows = []
    for j in range(len(v)):
        rest = sum(v[m] for m in range(len(v)) if m != j)
        rows.append(
            torch.stack([1 - c + 0 * v[k] if k == j else c * v[k] / rest for k in range(4)])
        )
    return torch.stack(rows)


def formula(model, x, x_adv, y, *, fix, second, alpha=0.2, beta=6.0, c=0.5):
    """The loss as the official code computes it, with two passes."""
    logits, logits_adv = model(x), model(x_adv)
    log_p, log_p_adv = logits.log_softmax(1), logits_adv.log_softmax(1)
    rows = torch.arange(len(y))
    summed = []
    for each in (log_p, log_p_adv):
        ce = -each[rows, y].mean()
        (grad,) = torch.autograd.grad(ce, model.linear.weight, retain_graph=True)
        summed.append(grad.sum(1))
    a, a_adv = (g.abs() for g in summed)
    b, b_adv = (g**2 for g in summed)

    def kl(target, log_q):
        return (target * (target.log() - log_q)).nan_to_num().sum(1).mean()

    first = kl(gap_matrix(a - a_adv, c)[y], log_p_adv) + kl(gap_matrix(a_adv - a, c)[y], log_p)
    given = b - b_adv if fix else b_adv - b
    other = kl(gap_matrix(given, c)[y], log_p_adv) + kl(gap_matrix(b_adv - b, c)[y], log_p)
    trades = (log_p.exp() * (log_p - log_p_adv)).sum(1).mean()
    ce = -log_p[rows, y].mean()
    return (1 - alpha) * ce + alpha * (first / 2 + second * other / 2) + beta * trades


@pytest.mark.parametrize("second", [0.5, 0.2])
@pytest.mark.parametrize("fix", [False, True])
def test_loss_and_gradients_follow_the_formula(fix, second):
    run = tiny_step.tiny_run("rat", rat_fix_second=fix, rat_second=second)
    batch = run.loader.batch(0)
    batch = batch.attacked((batch.x + 0.1 * torch.cos(17 * batch.x)).clamp(0, 1))
    weights = list(run.model.parameters())
    passes = []
    handle = run.model.register_forward_hook(lambda *_: passes.append(1))
    found = run.method.loss(run, batch)["total"]
    handle.remove()
    assert len(passes) == 2 and all(weight.grad is None for weight in weights)
    args = (run.model, batch.x, batch.x_adv, batch.y)
    expected = formula(*args, fix=fix, second=second)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    for a, b in zip(
        torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    # Which gap the second order takes makes a difference.
    assert abs(found - formula(*args, fix=not fix, second=second)) > 1e-4


def test_no_soft_target_leaves_trades():
    run, trades = tiny_step.tiny_run("rat", rat_alpha=0.0), tiny_step.tiny_run("trades")
    batch = run.loader.batch(0).attacked(0.9 * run.loader.batch(0).x)
    total, expected = (r.method.loss(r, batch)["total"] for r in (run, trades))
    torch.testing.assert_close(total, expected)


def noise_of(run):
    """What the copy has beside the trained weights."""
    own = dict(run.model.named_parameters())
    return {
        name: noisy.detach() - own[name].detach()
        for name, noisy in run.policy(Noisy).network.named_parameters()
    }


def test_the_copy_s_convolutions_have_noise_of_each_step():
    run, again = (
        tiny_step.tiny_run("rat", model=tiny_step.Normalised(), rat_noise=1e-2) for _ in range(2)
    )
    drawn = []
    for number in range(2):
        before = copy.deepcopy(run.model.state_dict())
        batch = run.loader.batch(number)
        run.policies[0].before(run, batch)
        assert all(torch.equal(before[n], v) for n, v in run.model.state_dict().items())
        noise = noise_of(run)
        flat = torch.cat([v.flatten() for n, v in noise.items() if "conv" in n])
        assert 0.008 < flat.std() < 0.012 and abs(flat.mean()) < 0.003
        assert not any(v.any() for n, v in noise.items() if "conv" not in n)
        for a, b in zip(run.policies[0].network.buffers(), run.model.buffers(), strict=True):
            assert torch.equal(a, b)
        drawn.append(flat)
        next_step(run, batch)
    assert not torch.equal(*drawn)
    # A resumed run draws the same, as the noise is of the step's number alone.
    again.step = 1
    again.policies[0].before(again, again.loader.batch(0))
    flat = torch.cat([v.flatten() for n, v in noise_of(again).items() if "conv" in n])
    torch.testing.assert_close(flat, drawn[1])
    assert not run.networks and not run.policies[0].state_dict()


def test_the_attack_is_of_the_copy():
    noisy, plain = (tiny_step.tiny_run("rat", rat_noise=scale) for scale in (0.5, 0.0))
    trades = tiny_step.tiny_run("trades")
    made = []
    for run in (noisy, plain):
        run.policies[0].before(run, run.loader.batch(0))
        made.append(run.method.attack(run, run.loader.batch(0)))
    assert torch.equal(made[1], trades.method.attack(trades, trades.loader.batch(0)))
    assert not torch.equal(*made)


def test_a_batch_of_nan_is_left_out_and_the_next_step_goes_on():
    run = tiny_step.tiny_run("rat")
    before = copy.deepcopy(run.model.state_dict())
    assert train_step(run, tiny_step.poisoned(run.loader.batch(0))) is None
    assert all(torch.equal(before[n], v) for n, v in run.model.state_dict().items())
    assert next_step(run, run.loader.batch(0))[1] is not None


def test_a_network_without_a_linear_layer_is_refused():
    class Odd(tiny_step.Tiny):
        classifier_name = ""

    with pytest.raises(InputError, match=r"--model: expected a network with an nn\.Linear"):
        tiny_step.tiny_run("rat", model=Odd())
