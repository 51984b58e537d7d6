"""Networks and tensors besides the trained network: who moves them, and that they are resumed."""

from __future__ import annotations

import copy
from dataclasses import replace
from operator import itemgetter

import pytest
import torch
import torch.nn.functional as F

import tiny_step
from cure_fast.losses import cross_entropy
from cure_fast.step.policy import Policy, Wanted
from cure_fast.step.train_step import train_step
from cure_fast.training.trainer import next_step
from killing import equal


def guided_loss(run, batch):
    """As LBGAT's: the guide learns naturally, and both are drawn to one another."""
    logits_adv, guide = run.model(batch.x_adv), run.networks["guide"](batch.x)
    natural_ce = cross_entropy(guide, batch.y).mean()
    apart = F.mse_loss(logits_adv, guide)
    return {"total": natural_ce + 3 * apart, "natural_ce": natural_ce, "apart": apart}


def guide_of(run):
    torch.manual_seed(11)
    return {"guide": tiny_step.Normalised().to(torch.float64)}


def guided_run(changed):
    """A run with a second network that takes gradients."""
    name = changed("pgd_at", loss=guided_loss, networks=guide_of)
    torch.manual_seed(3)
    return tiny_step.tiny_run(name, model=tiny_step.Normalised())


def test_a_further_network_that_takes_gradients_is_trained(changed):
    run = guided_run(changed)
    model, guide = copy.deepcopy(run.model), copy.deepcopy(run.networks["guide"])
    optim = run.config.optim
    settings = {"momentum": optim.momentum, "weight_decay": optim.weight_decay}
    parameters = [*model.parameters(), *guide.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=optim.lr, **settings)
    for batch in run.loader:
        seen = []
        run.model.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        train_step(run, batch)
        # The loss's is the last pass of the step.
        optimizer.zero_grad()
        taught = guide(batch.x)
        loss = F.cross_entropy(taught, batch.y) + 3 * F.mse_loss(model(seen[-1].detach()), taught)
        loss.backward()
        optimizer.step()
        for network, expected in ((run.model, model), (run.networks["guide"], guide)):
            for (name, value), other in zip(
                network.state_dict().items(), expected.state_dict().values(), strict=True
            ):
                torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12, msg=name)
    assert all(p.grad is None for p in run.networks["guide"].parameters())
    assert run.trained_parameters == [*run.model.parameters(), *run.networks["guide"].parameters()]


def test_a_further_network_in_training_is_resumed_with_its_momenta(changed):
    whole, stopped = guided_run(changed), guided_run(changed)
    for batch in [*whole.loader][:2]:
        next_step(whole, batch)
        next_step(stopped, batch)
    resumed = guided_run(changed)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    for batch in [*whole.loader][2:]:
        next_step(whole, batch)
        next_step(resumed, batch)
    assert equal(whole.state_dict(), resumed.state_dict())
    assert not equal(whole.state_dict(), stopped.state_dict())


def test_a_batch_of_nan_moves_no_further_network(changed):
    run = guided_run(changed)
    next_step(run, run.loader.batch(0))
    before = copy.deepcopy([net.state_dict() for net in run.all_networks.values()])
    assert next_step(run, tiny_step.poisoned(run.loader.batch(1)))[1] is None
    assert equal(before, [net.state_dict() for net in run.all_networks.values()])


def test_a_gradient_of_a_further_network_that_is_not_finite_leaves_the_step_out(changed):
    def steep_loss(run, batch):
        terms = guided_loss(run, batch)
        # Finite, while its slope is not.
        edge = (run.networks["guide"].linear.bias[0] * 0).sqrt()
        return {**terms, "total": terms["total"] + edge}

    name = changed("pgd_at", loss=steep_loss, networks=guide_of)
    run = tiny_step.tiny_run(name, model=tiny_step.Normalised())
    before = copy.deepcopy([net.state_dict() for net in run.all_networks.values()])
    assert next_step(run, run.loader.batch(0))[1] is not None
    assert run.skipped == 1
    assert equal(before, [net.state_dict() for net in run.all_networks.values()])


class Memory(Policy):
    """Has a network and tensors of its own, by the places of images, and moves them."""

    def __init__(self, run):
        super().__init__()
        self.network = copy.deepcopy(run.model)
        self.networks = {"memory": self.network}
        self.bank = torch.zeros(run.loader.set_size, tiny_step.CLASSES, dtype=torch.float64)
        self.state = {"bank": self.bank}

    def before(self, run, batch):
        with torch.no_grad():
            self.network.linear.bias += self.bank.mean(dim=0) + 1

    def on_step(self, run, batch):
        self.bank[batch.index] += batch.notes["logits"]


def memory_run(changed):
    def loss(run, batch):
        batch.notes["logits"] = logits = run.model(batch.x_adv)
        drawn = F.mse_loss(logits, run.networks["memory"](batch.x))
        return {"total": cross_entropy(logits, batch.y).mean() + drawn, "drawn": drawn}

    name = changed("pgd_at", loss=loss, policies=lambda run: (Memory(run),))
    torch.manual_seed(3)
    return tiny_step.tiny_run(name, model=tiny_step.Normalised())


def test_a_policys_network_and_state_are_resumed(changed):
    whole, stopped = memory_run(changed), memory_run(changed)
    for batch in [*whole.loader][:2]:
        next_step(whole, batch)
        next_step(stopped, batch)
    state = copy.deepcopy(stopped.state_dict())
    assert state["networks"].keys() == {"memory"} and state["policies"][0].keys() == {"bank"}
    bank = state["policies"][0]["bank"]
    # The places of two batches of twelve, of four.
    assert bank[:24].abs().sum(dim=1).min() > 0 and not bank[24:].any()
    resumed = memory_run(changed)
    resumed.load_state_dict(state)
    for batch in [*whole.loader][2:]:
        next_step(whole, batch)
        next_step(resumed, batch)
    assert equal(whole.state_dict(), resumed.state_dict())


class Critic(Policy):
    """Trains a network of its own before each step, by an optimiser of its own."""

    def __init__(self, run):
        super().__init__()
        self.networks = {"critic": copy.deepcopy(run.model)}
        parameters = self.networks["critic"].parameters()
        self.optimizers = {"critic": torch.optim.SGD(parameters, lr=0.1, momentum=0.9)}

    def before(self, run, batch):
        (optimizer,) = self.optimizers.values()
        optimizer.zero_grad()
        cross_entropy(self.networks["critic"](batch.x), batch.y).mean().backward()
        optimizer.step()


def test_a_policys_optimiser_is_resumed(changed, engine):
    def new_run():
        name = changed("pgd_at", policies=lambda run: (Critic(run),))
        torch.manual_seed(3)
        return tiny_step.tiny_run(name, engine=engine)

    whole, stopped, resumed = new_run(), new_run(), new_run()
    start = copy.deepcopy(whole.networks["critic"].state_dict())
    for batch in [*whole.loader][:2]:
        next_step(whole, batch)
        next_step(stopped, batch)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    for batch in [*whole.loader][2:]:
        next_step(whole, batch)
        next_step(resumed, batch)
    assert equal(whole.state_dict(), resumed.state_dict())
    assert not equal(start, whole.networks["critic"].state_dict())


def test_a_policys_network_is_not_trained_by_the_optimiser(changed):
    run = memory_run(changed)
    weights = [p.detach().clone() for p in run.networks["memory"].conv1.parameters()]
    next_step(run, run.loader.batch(0))
    assert run.trained_parameters == list(run.model.parameters())
    assert all(map(torch.equal, weights, run.networks["memory"].conv1.parameters()))


class Wanting(Policy):
    """Wants the gradients of a term, for parameters of its choice, and keeps them."""

    def __init__(self, term, parameters):
        super().__init__()
        self.term, self.parameters = term, parameters

    def wants(self, run):
        return {self.term: Wanted(itemgetter(self.term), self.parameters)}

    def on_grads(self, run):
        self.found = [grad.clone() for grad in run.gradients[self.term]]


def wanting_run(changed, *terms):
    def policies(run):
        chosen = [list(run.model.parameters())[place:] for place in range(len(terms))]
        return tuple(Wanting(*pair) for pair in zip(terms, chosen, strict=True))

    return tiny_step.tiny_run(changed("trades", policies=policies), attack={"start": "uniform"})


@pytest.mark.parametrize("pieces", [1, 3])
def test_two_policies_get_the_gradients_that_each_wants(changed, pieces):
    run = wanting_run(changed, "kl", "natural_ce")
    run.micro_batch_size = 12 // pieces
    model, batch, seen = copy.deepcopy(run.model), run.loader.batch(0), []
    attack = run.method.attack

    def watched(run, batch):
        seen.append(attack(run, batch))
        return seen[-1]

    run.method = replace(run.method, attack=watched)
    train_step(run, batch)
    logits, logits_adv = model(batch.x), model(torch.cat(seen))
    kl = F.kl_div(logits_adv.log_softmax(1), logits.softmax(1), reduction="batchmean")
    for policy, place, term in zip(
        run.policies, (0, 1), (kl, F.cross_entropy(logits, batch.y)), strict=True
    ):
        expected = torch.autograd.grad(term, list(model.parameters())[place:], retain_graph=True)
        for found, grad in zip(policy.found, expected, strict=True):
            torch.testing.assert_close(found, grad, rtol=1e-9, atol=1e-13)
    assert not run.gradients


def test_two_policies_that_want_the_same_term_are_refused(changed):
    run = wanting_run(changed, "kl", "kl")
    with pytest.raises(AssertionError, match="two policies want gradients that they call kl"):
        train_step(run, run.loader.batch(0))
