"""What the mask's policy tells of an epoch, against sets that are counted by hand."""

from __future__ import annotations

import pytest
import torch

import tiny_step
from cure_fast.kernels import Selection
from cure_fast.policies.conserve import Conserve, ConserveSettings
from cure_fast.training.trainer import next_step

LAYERS = ("conv1.weight", "layer1.0.conv1.weight")
LIMIT = 0.5


def policy():
    return Conserve(tiny_step.Tiny(), ConserveSettings(), active=lambda run: True)


def masked_by(conserve, generator, run):
    """An epoch whose last mask has random scores: its row, and the masked weights and energies."""
    scores = [torch.rand(p.shape, generator=generator) for p in conserve.parameters]
    limits = torch.full((len(scores),), LIMIT)
    none = torch.zeros(len(scores), dtype=torch.int32)
    conserve.selection = Selection(scores, limits, limits, none)
    flat = {n: s.flatten().tolist() for n, s in zip(conserve.names, scores, strict=True)}
    masked = {(n, k) for n, values in flat.items() for k, v in enumerate(values) if v < LIMIT}
    energy = {(n, k): v * v for n, values in flat.items() for k, v in enumerate(values)}
    return conserve.epoch_metrics(run), masked, energy


def part(found, name):
    return {place for place in found if place[0] == name}


def test_masks_of_epochs_are_compared_by_layer_and_all_together():
    conserve, generator = policy(), torch.Generator().manual_seed(3)
    rows, masks, energies = zip(
        *(masked_by(conserve, generator, run=None) for _ in range(3)), strict=True
    )
    assert "mask_overlap" not in rows[0] and "overlap" not in rows[0]["mask"]
    everything = {*energies[0]}
    for k, (row, mask, energy) in enumerate(zip(rows, masks, energies, strict=True)):
        assert row["masked_energy"].keys() == {*LAYERS}
        for name in LAYERS:
            taken = sum(energy[p] for p in part(mask, name))
            whole = sum(energy[p] for p in part(everything, name))
            assert row["masked_energy"][name] == pytest.approx(taken / whole)
        whole = sum(energy.values())
        assert row["mask"]["energy"] == pytest.approx(sum(energy[p] for p in mask) / whole)
        never = set.intersection(*masks[: k + 1])
        assert row["mask"]["never_updated"] == pytest.approx(len(never) / len(everything))
        if k:
            both, either = mask & masks[k - 1], mask | masks[k - 1]
            assert row["mask"]["overlap"] == pytest.approx(len(both) / len(either))
            for name in LAYERS:
                expected = len(part(both, name)) / len(part(either, name))
                assert row["mask_overlap"][name] == pytest.approx(expected)
    assert 0 < rows[2]["mask"]["never_updated"] < rows[1]["mask"]["never_updated"]


def test_masks_of_scores_that_are_none_are_not_told():
    conserve, generator = policy(), torch.Generator().manual_seed(3)
    masked_by(conserve, generator, run=None)
    assert conserve.selection is not None
    conserve.selection.nonfinite[1] = 1
    assert conserve.epoch_metrics(None) == {} and conserve.epochs == 1


def test_where_the_threshold_is_nan_all_but_nan_is_masked():
    conserve = policy()
    scores = [torch.zeros_like(p) for p in conserve.parameters]
    for values in scores:
        values.view(-1)[0] = torch.nan
    limits = torch.full((len(scores),), torch.nan)
    counts = torch.ones(len(scores), dtype=torch.int32)
    conserve.selection = Selection(scores, limits, limits, counts)
    found = conserve.masks(None)
    for parameter in conserve.parameters:
        mask = found[id(parameter)].flatten()
        assert not mask[0] and mask[1:].all()


def test_movement_is_that_of_the_epoch(small_run):
    run = small_run("cure")
    conserve = run.policy(Conserve)
    for epoch in range(2):
        before = [p.detach().clone() for p in conserve.parameters]
        for batch in run.loader:
            next_step(run, batch)
        row = conserve.epoch_metrics(run)
        for name, new, old in zip(conserve.names, conserve.parameters, before, strict=True):
            if new.ndim > 1:
                expected = float((new.detach() - old).norm() / old.norm())
                assert row["movement"].pop(name) == pytest.approx(expected) and expected > 0
        assert not row["movement"]
        run.epoch, run.batch = epoch + 1, 0
