"""Selections whose memory and tables are kept from step to step."""

from __future__ import annotations

import weakref

import pytest
import torch

import engine_runs as runs
from cure_fast.engine.selector import Selectors
from cure_fast.kernels import rgp_select

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(8, 3, 3, 3), (8,), (10, 8)]
    natural, adversarial = (
        [torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)
    )
    return natural, adversarial


@pytest.mark.parametrize("fused", [False, True])
def test_kept_selections_are_those_of_single_calls(fused):
    selectors = Selectors(fused=fused)
    parameters = gradients(0)[0]
    settings = [
        {"percentile": 30.0, "alpha": 0.6, "score": "abs"},
        {"percentile": 70.0, "alpha": 0.6, "score": "abs"},
        {"percentile": 30.0, "alpha": 0.1, "score": "abs"},
        {"percentile": 30.0, "alpha": 0.6, "score": "signed"},
    ]
    for seed in (1, 2, 1):
        grads = gradients(seed)
        for options in settings:
            found = selectors.select(parameters, *grads, **options)
            single = rgp_select(*grads, **options)
            for ours, theirs in zip(found, single, strict=True):
                assert all(map(torch.equal, ours, theirs))
    assert len(selectors.built) == len(settings)
    selectors.select(parameters[:2], *(g[:2] for g in gradients(1)), **settings[0])
    assert len(selectors.built) == len(settings) + 1


@pytest.mark.parametrize("percentile", [0.0, 30.0])
def test_gradients_in_another_memory_order_or_spread_by_strides_are_taken(monkeypatch, percentile):
    parameters = [torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)]
    natural, adversarial = [torch.randn(8, 4, 3, 3)], [torch.randn(8, 4, 1, 1).expand(8, 4, 3, 3)]
    options = {"percentile": percentile, "alpha": 0.6, "score": "abs"}
    single = rgp_select(natural, adversarial, **options)
    monkeypatch.setenv("CURE_FAST_KERNELS", "triton")
    found = Selectors(fused=True).select(parameters, natural, adversarial, **options)
    if percentile:
        assert found.scores[0].stride() == parameters[0].stride()
        assert torch.equal(found.scores[0], single.scores[0])
    for ours, theirs in zip(found[1:], single[1:], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("engine", ["eager", "fast"])
def test_no_table_holds_a_step_s_gradients_through_the_next(engine):
    run = runs.make_run("cure", engine)
    gone, (conserve, *_) = [], run.policies
    masked = conserve.on_grads

    def noted(run):
        gone.extend(weakref.ref(grad) for grads in run.gradients.values() for grad in grads)
        masked(run)

    conserve.on_grads = noted
    runs.step(run, *run.loader.batches[0])
    gone += [weakref.ref(p.grad) for p in run.model.parameters() if p.grad is not None]
    run.optimizer.zero_grad(set_to_none=True)
    run.gradients.clear()
    assert gone and all(grad() is None for grad in gone)


def test_the_eager_engine_keeps_one_selection_until_its_tensors_are_replaced():
    run = runs.make_run("cure", "eager")
    assert not run.engine.selectors.built
    for batch in run.loader.batches[:3]:
        runs.step(run, *batch)
    (selector,) = run.engine.selectors.built.values()
    names = run.policies[0].names
    shapes = [parameter.shape for name, parameter in run.model.named_parameters() if name in names]
    assert [scores.shape for scores in selector.workspace.scores] == shapes
    run.load_state_dict(run.state_dict())
    assert not run.engine.selectors.built
