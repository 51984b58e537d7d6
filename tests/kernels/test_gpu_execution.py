"""How kernels run on a real GPU: reproducibly, in few launches, without waiting, in graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.kernel_inputs import LAYOUTS, model_tensors
from bench.kernel_providers import captured, prepared
from cure_fast import kernels
from cure_fast.kernels.augment import augment_crop_flip
from cure_fast.kernels.ema import flip_coin_ref
from cure_fast.kernels.pgd import pgd_init
from cure_fast.kernels.rgp import rgp_mask_ref, rgp_select_ref
from cure_fast.kernels.softmax import softmax_losses
from gpu_cases import (
    GPU,
    SETTINGS,
    SGD,
    Whole,
    flat,
    launched,
    no_waiting,
    on_gpu,
    pictures,
    resident_batch,
    resnet18_update,
    same_bits,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("triton_kernels")]


@pytest.fixture
def whole() -> Whole:
    return resnet18_update()


@pytest.fixture
def unpoisoned(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocate as usual: the poison is a launch of its own."""
    monkeypatch.undo()
    monkeypatch.setenv("CURE_FAST_KERNELS", "triton")


# Determinism.


def test_ten_runs_have_the_same_bits(whole: Whole):
    first = whole.state()
    results = []
    for _ in range(10):
        whole.load(first)
        whole.coin_step.zero_()
        whole.update()
        selection = whole.rgp.select(whole.nat, whole.adv)
        results.append([t.clone() for t in (selection.thresholds, selection.kept)] + whole.state())
    for again in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(again, results[0], strict=True))
    assert not torch.equal(whole.params[0], first[0])


# Launches, waiting and graphs.


@pytest.mark.usefixtures("unpoisoned")
def test_a_prepared_update_takes_at_most_six_launches(whole: Whole):
    names = launched(whole.update_alone)
    assert 4 <= len(names) <= 6, names


@pytest.mark.usefixtures("unpoisoned")
def test_exempt_tensors_take_one_launch_more():
    tensors = model_tensors(LAYOUTS["resnet18"](), GPU, torch.float32)
    # The coin, which the benchmark is given, would be the sixth.
    names = launched(prepared(tensors, update=True, ema=True))
    assert len(names) == 5, names


@pytest.mark.usefixtures("unpoisoned")
def test_a_whole_model_takes_few_launches_on_plain_lists_too(whole: Whole):
    """Tables cost a copy each, but nothing is launched per tensor."""
    nat, adv, grads = list(whole.nat), list(whole.adv), list(whole.grads)
    names = launched(lambda: kernels.rgp_mask_(grads, nat, adv, **SETTINGS))
    assert 4 <= len(names) <= 40 < len(nat), names


@pytest.mark.usefixtures("unpoisoned")
def test_one_launch_each(whole: Whole):
    images = on_gpu(pictures())
    data, placed = on_gpu(resident_batch())
    logits = torch.randn(128, 10, device=GPU)
    labels = torch.zeros(128, dtype=torch.int64, device=GPU)
    for name, step in {
        "pgd_step_": lambda: kernels.pgd_step_(*images, step_size=0.01, eps=0.03),
        "augment_crop_flip": lambda: augment_crop_flip(*data, **placed, padding=4),
        "softmax_losses": lambda: softmax_losses(logits, logits.clone(), labels),
        "ema_update_": lambda: kernels.ema_update_(whole.averages, whole.params, decay=0.9),
    }.items():
        # softmax_losses: the clone above. ema_update_: the answer of a sure coin is filled in.
        most = {"softmax_losses": 2, "ema_update_": 2}.get(name, 1)
        names = launched(step)
        assert 1 <= len(names) <= most, f"{name}: {names}"


def test_nothing_waits_for_the_device(whole: Whole):
    images = on_gpu(pictures())
    data, placed = on_gpu(resident_batch())
    logits = torch.randn(128, 10, device=GPU)
    labels = torch.zeros(128, dtype=torch.int64, device=GPU)
    lists = [list(t) for t in (whole.grads, whole.nat, whole.adv)]
    steps = {
        "prepared update": whole.update,
        "rgp.mask_": lambda: whole.rgp.mask_(whole.nat, whole.adv, whole.grads),
        "rgp_mask_": lambda: kernels.rgp_mask_(*lists, **SETTINGS),
        "rgp_threshold": lambda: kernels.rgp_threshold(*lists[1:], **SETTINGS),
        "masked_sgd_": lambda: kernels.masked_sgd_(
            list(whole.params), lists[0], list(whole.momentum), **SGD
        ),
        "ema_update_": lambda: kernels.ema_update_(
            list(whole.averages), list(whole.params), decay=0.9, rate=0.2, step=whole.coin_step
        ),
        "pgd_step_": lambda: kernels.pgd_step_(*images, step_size=0.01, eps=0.03),
        "pgd_init": lambda: pgd_init(images[1], eps=0.03, seed=0),
        "augment_crop_flip": lambda: augment_crop_flip(*data, **placed, padding=4),
        "softmax_losses": lambda: softmax_losses(logits, logits, labels),
    }
    waited = {}
    for name, step in steps.items():
        step()  # Compiling may wait.
        try:
            with no_waiting():
                step()
        except RuntimeError as error:
            waited[name] = str(error).splitlines()[0]
    assert not waited


def test_the_proof_of_not_waiting_can_fail():
    with pytest.raises(RuntimeError, match="synchronizing"), no_waiting():
        torch.ones((), device=GPU).item()


def test_a_replay_is_the_prepared_update(whole: Whole):
    first = whole.state()
    whole.update()
    wanted = whole.state()
    replay = captured(whole.update)
    whole.load(first)
    replay()
    assert all(same_bits(a, b) for a, b in zip(whole.state(), wanted, strict=True))


def test_replays_read_the_gradients_of_the_moment(whole: Whole):
    replay = captured(whole.update)
    for tensors in (whole.nat, whole.adv):
        for tensor in tensors:
            tensor.normal_(0, 1e-4)
    replay()
    found = whole.rgp.select(whole.nat, whole.adv).thresholds.clone()
    nat, adv = ([t.cpu() for t in tensors] for tensors in (whole.nat, whole.adv))
    wanted = rgp_select_ref(nat, adv, **SETTINGS).thresholds
    assert same_bits(found[: len(nat)], wanted)


@pytest.mark.parametrize("warmed_up_on", ["captured", "other"])
def test_plain_lists_captured_through_rgp_and_other_calls_read_their_own(warmed_up_on: str):
    shapes = [(33, 16, 3, 3), (1000,), (64, 10)]
    rgp = kernels.RGP(
        [(str(s), torch.zeros(s, device=GPU)) for s in shapes], percentile=30, alpha=0.1
    )
    generator = torch.Generator().manual_seed(3)
    cases, wanted = {}, {}
    for name in ("captured", "other"):
        nat, adv, grads = (
            [torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)
        )
        cases[name] = on_gpu([nat, adv, grads])
        rgp_mask_ref(grads, nat, adv, **SETTINGS)
        wanted[name] = grads
    fresh = {name: on_gpu(case[2]) for name, case in cases.items()}

    def check(name: str, call: Callable[[], object]) -> None:
        for grad, old in zip(cases[name][2], fresh[name], strict=True):
            grad.copy_(old)
        call()
        assert all(same_bits(a, b) for a, b in zip(cases[name][2], wanted[name], strict=True))

    check(warmed_up_on, lambda: rgp.mask_(*cases[warmed_up_on]))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = rgp.mask_(*cases["captured"])
    for name in ("captured", "replay", "other", "replay", "other", "other", "replay", "captured"):
        if name == "replay":
            kept.zero_()
            check("captured", graph.replay)
            assert bool((kept > 0.6).all() and (kept < 0.8).all())
        else:
            check(name, lambda name=name: rgp.mask_(*cases[name]))


def test_one_list_serves_many_graphs(whole: Whole):
    grads = [list(t) for t in (whole.nat, whole.adv)]
    thresholds = whole.rgp.select(*grads).thresholds  # of every call, the graphs' too
    wanted = thresholds.clone()
    graphs = []
    for _ in range(5):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            whole.rgp.select(*grads)
    for graph in graphs:
        whole.rgp.select(grads[1], grads[1])
        assert not same_bits(thresholds, wanted)
        graph.replay()
        assert same_bits(thresholds, wanted) and not whole.rgp.nonfinite.any()


def test_replays_draw_fresh_coins(whole: Whole):
    def step() -> None:
        whole.update()
        whole.coin_step.add_(1)

    replay = captured(step)
    whole.coin_step.zero_()
    coins = []
    for _ in range(40):
        before = whole.averages[0].clone()
        replay()
        coins.append(bool(whole.moved))
        assert coins[-1] != torch.equal(whole.averages[0], before)
    wanted = [bool(flip_coin_ref(0.5, seed=3, step=s)) for s in range(40)]
    assert coins == wanted and len(set(coins)) == 2


def test_other_operations_replay_as_they_run(whole: Whole):
    images = on_gpu(pictures())
    data, placed = on_gpu(resident_batch())
    logits = [torch.randn(128, 10, device=GPU) for _ in range(2)]
    labels = torch.zeros(128, dtype=torch.int64, device=GPU)
    start = images[0].clone()

    def step() -> list[Tensor]:
        moved = pgd_init(images[1], eps=0.03, seed=1)
        images[0].copy_(start)
        kernels.pgd_step_(*images, step_size=0.01, eps=0.03)
        losses = softmax_losses(*logits, labels)
        pixels = augment_crop_flip(*data, **placed, padding=4)
        return [moved, images[0], *flat(losses), pixels]

    wanted = [t.clone() for t in step()]
    replay = captured(step)
    for tensor in replay():
        tensor.zero_()
    outputs = replay()
    assert all(same_bits(a, b) for a, b in zip(outputs, wanted, strict=True))


def test_tables_cannot_be_built_during_a_capture():
    grads = [torch.randn(100, device=GPU) for _ in range(3)]
    kernels.rgp_mask_(grads, grads, grads, **SETTINGS)
    with (
        pytest.raises(RuntimeError, match="cannot be built while a CUDA graph is captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        kernels.rgp_mask_(grads, grads, grads, **SETTINGS)
    torch.cuda.synchronize()


def test_work_runs_on_the_current_stream():
    """The kernels of another stream wait for what that stream does before."""
    grads = [torch.ones(1_000_000, device=GPU)]
    nat = [torch.zeros(1_000_000, device=GPU)]
    kernels.rgp_mask_([grads[0].clone()], nat, nat, **SETTINGS)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        nat[0].copy_(torch.linspace(0, 1, 1_000_000, device=GPU))
        kept = kernels.rgp_mask_(grads, nat, nat, **SETTINGS)
    stream.synchronize()
    # Zeros alone would be ties, which are all kept.
    assert abs(float(kept) - 0.7) < 1e-5 and abs(float(grads[0].mean()) - 0.7) < 1e-5
