"""The policy ``blocks``: what trains, what stays in every bit, and what is drawn anew."""

from __future__ import annotations

import copy

import pytest
import torch

import tiny_step
from cure_fast.errors import InputError
from cure_fast.models import build_model
from cure_fast.policies.average import EmaSettings
from cure_fast.policies.awp import AwpSettings
from cure_fast.policies.blocks import BlocksSettings, chosen_parts, stages_of
from cure_fast.training.trainer import next_step

BATCHES = [
    (torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(6) % 4)
    for seed in (0, 1)
]


def run_of(*, others=(), **settings):
    """A run of TRADES on a ResNet of three stages with the policy, after others."""
    torch.manual_seed(0)
    model = build_model("resnet-small", num_classes=4, width=4)
    own = BlocksSettings(**{f"blocks_{name}": value for name, value in settings.items()})
    policies = {**dict(others), "blocks": own}
    return tiny_step.tiny_run(
        "trades", model=model, batches=BATCHES, dtype=torch.float32, policies=policies
    )


def moved(run, steps=2):
    """Parts of the network, parameters and buffers apart, that are others after some steps."""
    before = copy.deepcopy(run.model.state_dict())
    for place in range(steps):
        _, terms = next_step(run, run.loader.batch(place))
        assert terms is not None
    after = run.model.state_dict()
    buffers = {name for name, _ in run.model.named_buffers()}
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    parts = [{n.split(".")[0] for n in some} for some in (changed - buffers, changed & buffers)]
    return parts[0], parts[1]


@pytest.mark.parametrize(
    ("settings", "weights", "statistics"),
    [
        ({"train": (2,)}, {"layer2"}, {"layer2"}),
        ({"train": (1, 3)}, {"layer1", "layer3"}, {"layer1", "layer3"}),
        ({"train": (), "classifier": "trained"}, {"linear"}, set()),
        ({"train": (3,), "stem": "trained"}, {"conv1", "bn1", "layer3"}, {"bn1", "layer3"}),
        (
            {"train": (1,), "statistics": "train"},
            {"layer1"},
            {"bn1", "layer1", "layer2", "layer3"},
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_chosen_moves_and_nothing_else(settings, weights, statistics):
    assert moved(run_of(**settings)) == (weights, statistics)


@pytest.mark.parametrize("others", [{"awp": AwpSettings(awp_gamma=0.3)}, {"ema": EmaSettings()}])
def test_what_is_frozen_stays_beside_policies_that_move_weights(others):
    run = run_of(others=others, train=(2,))
    average = run.networks.get("ema")
    start = copy.deepcopy(run.model.state_dict())
    assert moved(run)[0] == {"layer2"}
    if average is not None:
        own = dict(average.named_parameters())
        assert torch.equal(own["layer1.0.conv1.weight"], start["layer1.0.conv1.weight"])
        assert not torch.equal(own["layer2.0.conv1.weight"], start["layer2.0.conv1.weight"])


def test_the_chosen_convolutions_are_drawn_anew_and_nothing_else():
    plain, drawn = (run_of(train=(2,), reinit=on).model.state_dict() for on in (False, True))
    again = run_of(train=(2,), reinit=True).model.state_dict()
    for name, value in drawn.items():
        convolution = name.startswith("layer2.") and value.ndim == 4
        assert torch.equal(value, plain[name]) != convolution
        assert torch.equal(value, again[name])
        if convolution:
            # Uniform within gain * sqrt(3 / fan out), where the gain of a ReLU is sqrt(2).
            bound = (6 / (value.shape[0] * value.shape[2] * value.shape[3])) ** 0.5
            assert 0.85 * bound < value.abs().max() <= bound


def test_stages_that_there_are_not_are_refused():
    model = build_model("resnet-small", num_classes=4, width=4)
    assert stages_of(model) == ["layer1", "layer2", "layer3"]
    assert chosen_parts(model, BlocksSettings(blocks_train=(3, 2))) == ["layer2", "layer3"]
    for settings, told in (
        ({"blocks_train": (1, 4)}, "stages from 1 to 3"),
        ({"blocks_train": ()}, "at least one part"),
    ):
        with pytest.raises(InputError, match=told):
            chosen_parts(model, BlocksSettings(**settings))
    network = build_model("densenet121", num_classes=4, width=2)
    with pytest.raises(InputError, match="a ResNet"):
        chosen_parts(network, BlocksSettings())
