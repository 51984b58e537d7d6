"""How much a method computes, counted by running it."""

from __future__ import annotations

import pytest
import torch

from cure_fast.methods import METHODS
from cure_fast.policies import POLICIES
from cure_fast.training.passes import Passes, counted, try_method
from tiny_step import CHANNELS, Tiny


@pytest.mark.parametrize(
    ("method", "policies", "forward", "backward", "cost"),
    [
        ("natural", (), 1, 1, 3),
        ("pgd_at", (), 11, 11, 33),
        # The natural image once more, for the attack's target and for the loss.
        ("trades", (), 13, 12, 37),
        # Revision sees both images; each of the two losses of the score has a backward pass.
        ("cure", (), 15, 14, 43),
        # The loss of PGD-AT twice, once to perturb the weights.
        ("pgd_at", ("awp",), 12, 12, 36),
        ("pgd_at", ("ema",), 11, 11, 33),
        # The revision model sees both images; TRADES has passed them through the trained one.
        ("trades", ("revision",), 15, 12, 39),
        # PGD-AT has not the natural one.
        ("pgd_at", ("revision",), 14, 12, 38),
    ],
)
def test_passes_of_a_step(method, policies, forward, backward, cost):
    trial = try_method(method, policies)
    assert trial.first == trial.last == Passes(forward, backward)
    assert trial.first.cost == cost and trial.model == "resnet-small"


def test_a_method_that_changes_with_the_epoch_has_two_counts():
    trial = try_method("cure_eff")
    assert (trial.first.cost, trial.last.cost) == (3, 43) and trial.networks == ("revision",)


# In the first and the last epoch, where they differ. LAS-AT's strategy learns in one of 20 steps.
COSTS = {
    **dict.fromkeys(("cure", "cure_paper", "cure_official"), (43, 43)),
    **{"cure_eff": (3, 43), "cure_eff_official": (3, 37), "awp_trades": (37, 43)},
    **dict.fromkeys(("pgd_at", "idbh", "seat", "cfa_at", "ap_at", "fat"), (33, 33)),
    **dict.fromkeys(("mail_at", "gairat"), (33, 33)),
    **dict.fromkeys(("trades", "te_trades", "cfa_trades", "ap_trades", "ard", "act"), (37, 37)),
    **dict.fromkeys(("fat_trades", "mail_trades"), (37, 37)),
    **dict.fromkeys(("mart", "nmse", "piat_nmse", "awp_at", "ap_mart", "fat_mart"), (36, 36)),
    **dict.fromkeys(("alp", "alp_mix"), (36, 36)),
    **{"natural": (3, 3), "fgsm_rs": (6, 6), "n_fgsm": (6, 6), "fgsm_pgi": (9, 9)},
    **{"te": (33, 34), "kd_swa": (35, 35), "iad": (37, 38), "iad2": (35, 38), "lbgat": (38, 38)},
    **{"hat": (41, 41), "rat": (41, 41), "st_at": (90, 90), "las_at": (51.65, 51.65)},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_counted(method):
    trial = try_method(method)
    assert (trial.first.cost, trial.last.cost) == pytest.approx(COSTS[method])


def test_passes_over_a_part_count_by_their_share_and_backward_passes_where_they_go():
    first, second = Tiny(), Tiny()
    x = torch.ones(8, CHANNELS, 1, 1)
    with counted(8) as passes:
        kept = first(x)
        second(x[:2])
        kept.sum().backward()
    assert passes == Passes(1.25, 1.0)
    first(x).sum().backward()
    assert passes == Passes(1.25, 1.0)


@pytest.mark.parametrize("choice", [*METHODS.values(), *POLICIES.values()], ids=lambda c: c.name)
def test_every_paper_names_its_year(choice):
    if choice.name == "natural":
        assert choice.year is None
    else:
        assert choice.year is not None and 2010 < choice.year < 2100
