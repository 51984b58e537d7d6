"""TRADES with the natural images passed twice, as its public code does."""

from __future__ import annotations

import copy

import pytest
import torch

import engine_runs as runs


@pytest.mark.parametrize("engine", ["eager", "fast"])
def test_a_second_natural_pass_moves_statistics_alone(engine):
    x, _ = runs.batches(1)[0]
    once, twice = (
        runs.make_run("trades", engine, natural_twice=natural_twice)
        for natural_twice in (False, True)
    )
    twin = copy.deepcopy(twice.model).train()
    images = runs.Images()
    images.of(twice)
    terms = [runs.train(run, 1)[0] for run in (once, twice)]
    assert twice.engine.name == engine
    for name, term in terms[0].items():
        torch.testing.assert_close(terms[1][name], term, rtol=1e-6, atol=1e-7)
    for a, b in zip(once.model.parameters(), twice.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        _ = [twin(batch) for batch in (x, images.kept[x.shape], x)]
    counts = {n: b for n, b in twin.named_buffers() if n.endswith("num_batches_tracked")}
    assert set(map(int, counts.values())) == {3}
    for (name, found), expected in zip(twice.model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)
    assert int(once.model.get_buffer("bn1.num_batches_tracked")) == 2
