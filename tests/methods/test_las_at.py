"""LAS-AT against its official attack, loss and reward, and the lessons of its strategy."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import engine_runs as runs
import tiny_step
from cure_fast.classifier import attack_mode
from cure_fast.errors import InputError
from cure_fast.methods import las_at, publish, select_method
from cure_fast.methods.las_at import LasSettings, Strategist
from cure_fast.recipes import find_recipe
from cure_fast.step.train_step import train_step
from cure_fast.training.schedules import lr_at
from cure_fast.training.trainer import next_step
from killing import equal

EPS = 0.1  # of tiny runs
UNIT = EPS / 8


def las_run(*, model=None, **settings):
    torch.manual_seed(3)
    return tiny_step.tiny_run("las_at", model=model or tiny_step.Normalised(), **settings)


def planned(run, number=0):
    """A batch with the plan of the step that comes next."""
    batch = run.loader.batch(number)
    with torch.no_grad():
        policy = run.policy(Strategist)
        policy.plan(run, batch, policy.strategy(batch.x))
    return batch


def attacked(run, batch):
    """Return the first iterate of the attack and its images."""
    seen = []
    # Copies, as steps are taken in place.
    hook = run.model.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach().clone()))
    with attack_mode(run.model, "eval"):
        x_adv = run.method.attack(run, batch)
    hook.remove()
    return seen[0], x_adv


# The attack.


def official_attack(model, x, y, start, eps, steps, step_size):
    """LAS_PGD_AT's Attack_policy_batch, from the start on: one number per image of each kind."""
    delta, left = start - x, steps.clone().view(-1, 1, 1, 1)
    eps, step_size = eps.double().view(-1, 1, 1, 1), step_size.double().view(-1, 1, 1, 1)
    for _ in range(int(left.max())):
        delta.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x + delta), y), delta)
        moved = delta.detach() + left.ge(1) * step_size * grad.sign()
        delta = torch.max(torch.min(moved, eps), -eps)
        delta = torch.max(torch.min(delta, 1 - x), -x)
        left = left - 1
    return x + delta


def test_each_image_is_attacked_by_its_own_plan():
    run = las_run()
    batch = planned(run)
    notes = batch.notes
    before = {name: note.clone() for name, note in notes.items()}
    start, x_adv = attacked(run, batch)
    assert equal(before, notes)
    reference = copy.deepcopy(run.model).eval()
    expected = official_attack(
        reference, batch.x, batch.y, start, notes["eps"], notes["steps"], notes["step_size"]
    )
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)
    # The start fills the ball of --eps whatever radius an image has.
    off = (start - batch.x).abs().flatten(1).amax(dim=1)
    assert off.max() <= EPS + 1e-12 and (off > notes["eps"] + 1e-3).any()
    # The images fill their own, which may be larger.
    off = (x_adv - batch.x).abs().flatten(1).amax(dim=1)
    assert (off <= notes["eps"] + 1e-7).all() and off.max() > EPS
    assert x_adv.min() >= 0 and x_adv.max() <= 1


@pytest.mark.parametrize(("steps", "length"), [(3, 1), (3, 2), (5, 1)])
def test_no_image_moves_further_than_its_steps_lead(steps, length):
    run = las_run(strategy_eps=(1000,), strategy_steps=(3, 5), strategy_step_sizes=(length,))
    # Grey images, that no box stops.
    batch = run.loader.batch(0)
    batch = tiny_step.batch_of(torch.full_like(batch.x, 0.5), batch.y)
    with torch.no_grad():
        policy = run.policy(Strategist)
        policy.plan(run, batch, policy.strategy(batch.x))
    start, x_adv = attacked(run, batch)
    rows = batch.notes["steps"] == steps
    moved = (x_adv - start).abs().flatten(1).amax(dim=1)[rows]
    assert len(moved) and (moved <= steps * length * UNIT + 1e-7).all()
    assert moved.max() > (steps - 0.5) * length * UNIT


# The plan.


def test_plans_are_drawn_by_their_probabilities():
    run = las_run()
    count, batch = 20000, run.loader.batch(0)
    scores = []
    for size in (13, 12, 5):
        logits = torch.randn(size, dtype=torch.float64)
        logits[2] = -torch.inf
        scores.append(logits.log_softmax(0).expand(count, size))
    log_p = run.policy(Strategist).plan(run, batch, scores)
    notes = batch.notes
    drawn = (notes["eps"] / UNIT - 3, notes["steps"] - 3, notes["step_size"] / UNIT - 1)
    total = 0.0
    for score, places in zip(scores, drawn, strict=True):
        places = places.round().long()
        p = score[0].exp()
        shares = torch.bincount(places, minlength=len(p)) / count
        # Five deviations of a binomial.
        assert ((shares - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()
        assert shares[2] == 0
        total += float(score[0][places].mean())
    assert float(log_p) == pytest.approx(total)


def test_choices_are_those_of_the_paper_and_draws_differ_from_step_to_step():
    run = las_run()
    plans = [planned(run).notes for _ in range(60)]
    for name, values in (
        ("eps", range(3, 16)),
        ("steps", range(3, 15)),
        ("step_size", range(1, 6)),
    ):
        unit = 1 if name == "steps" else UNIT
        found = torch.cat([notes[name] for notes in plans]) / unit
        assert found.round().unique().tolist() == list(values)
    assert not torch.equal(plans[0]["eps"], plans[1]["eps"])
    assert equal(planned(las_run()).notes, plans[0])


def test_the_strategy_of_a_step_computes_in_evaluation_mode():
    run = las_run()
    strategy, modes = run.networks["strategy"], []
    strategy.register_forward_hook(lambda *_: modes.append(strategy.network.norm.training))
    before = copy.deepcopy(strategy.state_dict())
    next_step(run, run.loader.batch(0))
    assert modes == [False] and equal(before, strategy.state_dict())


@pytest.mark.parametrize("choices", [(), (0, 3), (4, 3), (3, 3), (3, 1001)])
@pytest.mark.parametrize("name", ["strategy_eps", "strategy_steps", "strategy_step_sizes"])
def test_wrong_choices_are_refused(name, choices):
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')}: expected one or more"):
        LasSettings(**{name: choices})


# The loss.


@pytest.mark.parametrize("share", [0.7, 1.0, 0.5])
def test_loss_and_gradient_are_the_official_ones(share):
    """Labels of a true class with 0.7, and nine others with 0.3 / 9 each."""
    logits = (2 * torch.randn(32, 10, dtype=torch.float64)).requires_grad_()
    y = torch.randint(10, (32,))
    total = tiny_step.terms_of("las_at", logits, y=y, true_share=share)["total"]
    labels = torch.full((32, 10), (1 - share) / 9, dtype=torch.float64)
    labels[torch.arange(32), y] = share
    expected = (-labels * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    grads = (torch.autograd.grad(value, logits)[0] for value in (total, expected))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-15)


# The reward, and what it teaches.


def official_reward(model, batch, lr, weight_decay, generator, *, steps, step_size, share=0.7):
    """LAS_PGD_AT's Get_reward for images x' that are there, and the images of its own attack."""
    x, y, classes = batch.x, batch.y, tiny_step.CLASSES
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        first = torch.clamp(F.cross_entropy(model(batch.x_adv), y), 0, 10)
    student = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(
        student.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay
    )
    labels = torch.full((len(y), classes), (1 - share) / (classes - 1), dtype=x.dtype)
    labels[torch.arange(len(y)), y] = share
    (-labels * F.log_softmax(student(batch.x_adv), dim=-1)).sum(dim=-1).mean().backward()
    optimizer.step()
    taught = copy.deepcopy(dict(student.named_parameters()))
    highest, found = torch.zeros(len(y), dtype=x.dtype), torch.zeros_like(x)
    for _ in range(2):
        delta = torch.empty_like(x).uniform_(-EPS, EPS, generator=generator)
        delta = torch.max(torch.min(delta, 1 - x), -x)
        for _ in range(steps):
            delta.requires_grad_()
            logits = student(x + delta)
            (grad,) = torch.autograd.grad(F.cross_entropy(logits, y), delta)
            delta = delta.detach()
            (right,) = torch.where(logits.argmax(dim=1) == y)
            d = (delta[right] + step_size * grad[right].sign()).clamp(-EPS, EPS)
            delta[right] = torch.max(torch.min(d, 1 - x[right]), -x[right])
        each = F.cross_entropy(student(x + delta), y, reduction="none").detach()
        found[each >= highest] = delta[each >= highest]
        highest = torch.max(highest, each)
    student.eval()
    with torch.no_grad():
        robust = (student(x + found).argmax(dim=1) == y).sum() / len(y)
        natural = (student(x).argmax(dim=1) == y).sum() / len(y)
    return first, robust, natural, taught, x + found


def trial_of(run, number):
    batch = planned(run, number)
    return batch.attacked(attacked(run, batch)[1])


@pytest.mark.parametrize("seed", range(4))
def test_the_reward_is_the_official_one(seed, monkeypatch):
    torch.manual_seed(seed)
    # Half-trained, so that some images are classified rightly and some are not.
    run = las_run(model=tiny_step.Normalised(), true_share=0.8)
    for _ in range(10 * seed):
        train_step(run, planned(run, 0))
    run.lr, attack = 0.05, run.config.attack
    # So much decay that it tells.
    run.config = replace(run.config, optim=replace(run.config.optim, weight_decay=0.5))
    students, real = [], las_at.strongest

    def kept(run, batch, student):
        students.append(copy.deepcopy(dict(student.named_parameters())))
        return real(run, batch, student)

    monkeypatch.setattr(las_at, "strongest", kept)
    trial = trial_of(run, 0)
    before = copy.deepcopy([run.model.state_dict(), run.optimizer.state_dict()])
    generator = run.generators["attack"].clone_state()
    fooled, robust, natural, taught, _ = official_reward(
        run.model,
        trial,
        0.05,
        0.5,
        generator,
        steps=attack.attack_steps,
        step_size=attack.step_length,
        share=0.8,
    )
    found = las_at.reward_of(run, trial)
    assert found.ndim == 0
    for name, weight in taught.items():
        torch.testing.assert_close(students[0][name], weight, rtol=1e-10, atol=1e-13, msg=name)
    assert float(found) == pytest.approx(float(fooled + 4 * robust + 2 * natural), rel=1e-6)
    assert equal(before, [run.model.state_dict(), run.optimizer.state_dict()])
    assert run.model.training and all(p.grad is None for p in run.model.parameters())


def test_the_attack_of_the_reward_is_the_official_one():
    run = las_run()
    run.lr, attack, trial = 0.0, run.config.attack, trial_of(run, 0)
    generator = run.generators["attack"].clone_state()
    # In float32, as lengths per image are.
    step_size = float(torch.tensor(attack.step_length))
    *_, expected = official_reward(
        run.model, trial, 0.0, 0.0, generator, steps=attack.attack_steps, step_size=step_size
    )
    student = copy.deepcopy(run.model)
    # The step on x' has passed it once.
    student(trial.x_adv)
    found = las_at.strongest(run, trial, student)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert student.training and int(student.norm.num_batches_tracked) == 1 + 2 * 6
    assert (found - trial.x).abs().max() <= EPS + 1e-12


def test_the_loss_that_the_images_raise_counts_up_to_ten():
    run = las_run()
    with torch.no_grad():
        run.model.linear.weight.mul_(1e4)
    reward = las_at.reward_of(run, trial_of(run, 0))
    assert 10 <= float(reward) <= 16


def test_a_lesson_is_the_official_step_of_reinforce(monkeypatch):
    run = las_run(strategy_lr=0.5)
    policy, batch = run.policy(Strategist), run.loader.batch(0)
    reference = copy.deepcopy(policy.strategy).train()
    plans, rewards, real = [], [], las_at.reward_of

    def kept(run, trial):
        plans.append(trial.notes)
        rewards.append(real(run, trial))
        return rewards[-1]

    monkeypatch.setattr(las_at, "reward_of", kept)
    model = copy.deepcopy([run.model.state_dict(), run.optimizer.state_dict()])
    policy.teach(run, batch)
    (notes,), (reward,) = plans, rewards
    drawn = (notes["eps"] / UNIT - 3, notes["steps"] - 3, notes["step_size"] / UNIT - 1)
    policy_loss = torch.zeros(())
    for score, places in zip(reference(batch.x), drawn, strict=True):
        log_prob = torch.distributions.Categorical(logits=score).log_prob(places.round())
        policy_loss = policy_loss + (-log_prob * reward).mean()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5)
    policy_loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    assert norm > 1, "the gradient is cut"
    optimizer.step()
    for (name, ours), theirs in zip(
        policy.strategy.state_dict().items(), reference.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=name)
    # Nothing else has moved, and nothing is left for the step: neither a plan nor gradients.
    assert equal(model, [run.model.state_dict(), run.optimizer.state_dict()])
    assert not batch.notes and not policy.strategy.training and run.model.training
    weights = [*run.model.parameters(), *policy.strategy.parameters()]
    assert all(weight.grad is None and weight.requires_grad for weight in weights)
    assert policy.epoch_metrics(run) == {"reward": pytest.approx(float(reward))}


def test_plans_of_high_reward_become_likelier(monkeypatch):
    """Where each lesson rewards the mean radius that it has planned."""
    run = las_run(strategy_lr=0.3)
    policy, batch = run.policy(Strategist), run.loader.batch(0)
    monkeypatch.setattr(las_at, "attack", lambda run, batch: batch.x)
    monkeypatch.setattr(
        las_at, "reward_of", lambda run, trial: trial.notes["eps"].mean() / UNIT - 9
    )

    def mean_radius():
        with torch.no_grad():
            p = policy.strategy(batch.x)[0].exp()
        return float((p * torch.arange(3, 16)).sum(dim=1).mean())

    before = mean_radius()
    for _ in range(300):
        policy.teach(run, batch)
    assert mean_radius() > before + 0.5


def strategies(run):
    return copy.deepcopy(run.networks["strategy"].state_dict())


@pytest.mark.parametrize("every", [1, 3])
def test_a_lesson_comes_in_the_last_of_so_many_steps(every):
    run = las_run(strategy_every=every)
    changed = []
    for number in range(4):
        before = strategies(run)
        next_step(run, run.loader.batch(number))
        changed.append(not equal(before, strategies(run)))
    assert changed == [True] * 4 if every == 1 else changed == [False, False, True, False]


@pytest.mark.parametrize("engine", ["eager", "fast"])
def test_what_is_not_finite_teaches_nothing(engine):
    run = las_run(strategy_every=1, engine=engine, dtype=torch.float32)
    next_step(run, run.loader.batch(0))
    policy = run.policy(Strategist)
    before = copy.deepcopy([strategies(run), run.model.state_dict(), policy.reward])
    assert next_step(run, tiny_step.poisoned(run.loader.batch(1)))[1] is None
    assert equal(before, [strategies(run), run.model.state_dict(), policy.reward])
    assert not policy.strategy.training
    next_step(run, run.loader.batch(1))
    assert not equal(before[0], strategies(run))
    assert all(value.isfinite().all() for value in strategies(run).values())


@pytest.mark.parametrize("engine", ["eager", "fast"])
def test_a_stopped_run_goes_on_with_the_same_plans_and_lessons(engine):
    whole, stopped, resumed = (
        las_run(strategy_every=2, engine=engine, dtype=torch.float32) for _ in range(3)
    )
    start = strategies(whole)
    for number in range(3):
        for run in (whole, stopped):
            next_step(run, run.loader.batch(number))
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    assert float(resumed.policy(Strategist).reward) > 0
    next_step(whole, whole.loader.batch(3))
    next_step(resumed, resumed.loader.batch(3))
    assert whole.engine.name == engine
    assert equal(whole.state_dict(), resumed.state_dict())
    assert not equal(start, strategies(whole))


def test_the_fast_engine_is_taught_and_attacked_as_the_eager_one():
    both = runs.pair("las_at", data=runs.batches(4), strategy_every=2, strategy_lr=0.1)
    before = strategies(both.fast)
    runs.assert_steps_equal(both, 4)
    assert not equal(before, strategies(both.fast))


def test_the_published_set_up():
    config = publish(select_method(find_recipe("cifar10-resnet18"), "las_at"))
    rates = {0: 0.1, 98: 0.1, 99: 0.01, 103: 0.01, 104: 1e-3, 109: 1e-3}
    assert {e: lr_at(config.optim, e / config.optim.epochs) for e in rates} == pytest.approx(rates)
    attack, settings = config.attack, config.settings
    assert (attack.eps, attack.step_length, attack.attack_steps) == (8 / 255, 2 / 255, 10)
    assert settings.strategy_every == 20 and math.isclose(settings.strategy_lr, 1e-4)
