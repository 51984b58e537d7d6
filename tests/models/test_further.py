"""Networks that are built like another: what they share with it, and what they do not."""

from __future__ import annotations

import pytest
import torch

import tiny_step
from cure_fast.models.building import build_for_data, build_like

WORDS = {"data": "cifar10", "num_classes": 4, "width": 3, "stem": "cifar", "normalize": "dataset"}


def described(seed=0, **changes):
    torch.manual_seed(seed)
    return build_for_data("resnet-small", **{**WORDS, **changes})


def own(seed=0):
    torch.manual_seed(seed)
    network = tiny_step.Normalised().double()
    network.norm.running_mean += 1
    return network


def shapes(network):
    return {name: (tensor.shape, tensor.dtype) for name, tensor in network.state_dict().items()}


def drawn(network):
    """The weights that are drawn at random, as those of convolutions and linear layers are."""
    return [weight for weight in network.parameters() if weight.ndim > 1]


@pytest.mark.parametrize("make", [described, own])
def test_it_has_the_same_architecture_and_weights_of_its_own(make):
    network = make()
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in network.state_dict().items()}
    first, again, other = (build_like(network, seed=seed) for seed in (0, 0, 1))
    # What draws after it draws the same as without it, and the network is as it was.
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert shapes(first) == shapes(network) and first.description == network.description
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    # Nor are they those that a run of another seed begins with.
    for different in (other, *(make(seed) for seed in range(5))):
        assert not any(map(torch.equal, drawn(first), drawn(different)))
    shared = {tensor.data_ptr() for tensor in network.state_dict().values()}
    assert shared.isdisjoint(tensor.data_ptr() for tensor in first.state_dict().values())
    assert first.training and all(p.requires_grad for p in first.parameters())


@pytest.mark.parametrize("make", [described, own])
def test_it_may_have_other_logits_and_shares_the_precision(make):
    network = make()
    network.compute_dtype = torch.bfloat16
    further = build_like(network, seed=0, num_classes=9)
    assert further.compute_dtype is torch.bfloat16
    linear = further.get_submodule(further.classifier_name)
    assert linear.out_features == 9 and linear.weight.dtype is drawn(network)[0].dtype


def test_it_draws_the_same_weights_in_every_precision():
    single, double = build_like(own().float(), seed=0), build_like(own(), seed=0)
    for a, b in zip(single.parameters(), double.parameters(), strict=True):
        assert torch.equal(a.double(), b) and (a.dtype, b.dtype) == (torch.float32, torch.float64)


def test_a_network_of_ones_own_begins_with_fresh_statistics():
    assert not build_like(own(), seed=0).norm.running_mean.any()


def test_another_architecture_has_its_published_width_and_the_same_data():
    network = described(normalize="dataset")
    further = build_like(network, seed=0, model="resnet18")
    assert further.width == 64 and further.description == {
        **network.description,
        "model": "resnet18",
        "width": "",
    }
    assert torch.equal(further.normalize.mean, network.normalize.mean)
