"""The compiled tape against the tape, and whole steps with it against those without."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import engine_runs as runs
from cure_fast.engine import tape_compiled
from cure_fast.engine.compile import compile_static
from cure_fast.engine.fast import FastEngine
from cure_fast.engine.tape import Tape
from cure_fast.engine.tape_compiled import CompiledNetwork, CompiledTape
from cure_fast.models import ImageClassifier, block_first_convs
from cure_fast.training.trainer import next_step
from tape_cases import (
    BOUND,
    CLASSES,
    STATISTICS,
    Odd,
    assert_close_buffers,
    assert_same,
    images,
    low,
    network,
    off,
    own,
)

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = 3


class Compiler:
    """Stands for torch.compile, and counts what it is given.

    ``aot_eager`` takes a program apart and puts it together as for a real compiler (changes in
    place become outputs), then runs it as it is, in a twentieth of the time.
    """

    def __init__(self, backend: str | None) -> None:
        self.backend = backend
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, options=None):
        self.graphs.append(graph)
        return torch.compile(graph, backend=self.backend, dynamic=False) if self.backend else graph


@pytest.fixture
def traced(request, monkeypatch) -> Compiler:
    made = Compiler(getattr(request, "param", None))
    monkeypatch.setattr(tape_compiled, "compile_static", made)
    return made


def check(
    model: ImageClassifier,
    *,
    parts: int = 1,
    spans: list[range] | None = None,
    wanted: list | None = None,
    passes: int = 2,
    size: tuple[int, int] = (9, 12),
) -> CompiledTape:
    """Passes there and back, with new images and weights each time."""
    twin = copy.deepcopy(model)
    tape = CompiledTape(model, own(model), batch_size=BATCH)
    plain = Tape(twin, own(twin))
    wanted = wanted or [None, block_first_convs(model)]
    for _ in range(passes):
        x = images(parts * BATCH, *size)
        ours, theirs = tape.forward(x, parts), plain.forward(x, parts)
        assert off(ours.logits, theirs.logits) < BOUND
        assert_close_buffers(model, twin)
        rows = len(wanted) if spans is None else sum(map(len, spans)) * BATCH
        shape = (rows, len(x)) if spans is None else (rows,)
        cotangents = torch.randn(*shape, CLASSES, dtype=torch.float64)
        found = tape.backward(ours, cotangents, wanted, spans)
        expected = plain.backward(theirs, cotangents, wanted, spans)
        assert_same(found, expected, [list(some) for some in expected])
        for some, other in zip(found, expected, strict=True):
            assert {n: g.stride() for n, g in some.items()} == {
                n: g.stride() for n, g in other.items()
            }
        with torch.no_grad():
            for pair in zip(model.parameters(), twin.parameters(), strict=True):
                for parameter in pair:
                    parameter.mul_(0.9)
    return tape


@pytest.mark.parametrize(
    ("name", "traced"),
    [
        ("resnet-small", "aot_eager"),
        ("resnet-small", None),
        ("preactresnet18", None),
        ("wrn28-10", None),
    ],
    indirect=["traced"],
)
def test_a_compiled_pass_is_the_tapes(name, traced):
    check(network(name, normalize=STATISTICS))
    assert len(traced.graphs) == 2  # One there and one back, for both batches.


def test_a_network_with_pooling(traced):
    check(network("resnet18", "imagenet"), size=(20, 24), passes=1)


def test_layers_with_every_option(traced):
    model = Odd().double().to(memory_format=torch.channels_last)
    # The gradient of a bias before a BatchNorm is nothing but rounding.
    unlike = ("unused.", "aside.", "conv1.bias")
    names = [name for name in own(model) if not name.startswith(unlike)]
    check(model, wanted=[names, ["conv2.bias", "hidden.weight"]])


@pytest.mark.parametrize(
    ("frozen", "traced"),
    [("none", None), ("some", None), ("all", None), ("some", "aot_eager")],
    indirect=["traced"],
)
def test_batchnorms_in_any_mode(frozen, traced):
    model = network()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in {"none": [], "some": norms[1::3], "all": norms}[frozen]:
        module.eval()
    check(model)


def test_a_change_of_mode_is_another_program(traced):
    model = network()
    tape = check(model)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one.eval()
    x = images(BATCH)
    assert off(tape.forward(x).logits, Tape(twin, own(twin)).forward(x).logits) < BOUND
    assert_close_buffers(model, twin)
    assert len(traced.graphs) == 3


NATURAL, ADVERSARIAL, BOTH = range(1), range(1, 2), range(2)


@pytest.mark.parametrize("traced", [None, "aot_eager"], indirect=True)
def test_a_joint_pass_is_the_tapes(traced):
    model = network()
    wanted = [None, block_first_convs(model), ["linear.bias"], ["conv1.weight"]]
    check(model, parts=2, spans=[BOTH, NATURAL, ADVERSARIAL, ADVERSARIAL], wanted=wanted)


def test_gradients_of_few_parameters(traced):
    """The way back ends where nothing below is wanted, also inside a BatchNorm."""
    model = network()
    for wanted in (["linear.weight"], ["bn1.weight", "bn1.bias"], ["layer3.0.bn2.bias"], []):
        check(model, wanted=[wanted, ["layer2.0.conv1.weight"]], passes=1)


def test_bf16_weights(traced):
    # As for the tape in test_tape.py; sums and products that the formulas keep in float32 are
    # rounded once instead of after each operation.
    model = network(normalize=STATISTICS)
    weights = low(model, torch.bfloat16)
    twin = copy.deepcopy(model)
    tape, plain = CompiledTape(model, weights, batch_size=BATCH), Tape(twin, weights)
    x = images(BATCH).float()
    ours, theirs = tape.forward(x), plain.forward(x)
    assert ours.logits.dtype == torch.float32 and ours.dtype == torch.bfloat16
    assert off(ours.logits, theirs.logits) < 2**-6
    assert_close_buffers(model, twin, 2**-7)
    cotangents = torch.randn(2, BATCH, CLASSES)
    found = tape.backward(ours, cotangents, [None, None])
    assert_same(found, plain.backward(theirs, cotangents, [None, None]), [None, None], 2**-5)
    for gradients in found:
        assert {n: (g.dtype, g.stride()) for n, g in gradients.items()} == {
            n: (w.dtype, w.stride()) for n, w in weights.items()
        }


def test_batches_of_another_size_are_not_compiled(traced):
    model = network()
    twin = copy.deepcopy(model)
    tape, plain = CompiledTape(model, own(model), batch_size=BATCH), Tape(twin, own(twin))
    x = images(BATCH + 2)
    ours, theirs = tape.forward(x), plain.forward(x)
    assert torch.equal(ours.logits, theirs.logits)
    cotangents = torch.randn(1, len(x), CLASSES, dtype=torch.float64)
    found = tape.backward(ours, cotangents, [None])
    expected = plain.backward(theirs, cotangents, [None])
    assert all(torch.equal(found[0][name], expected[0][name]) for name in expected[0])
    assert not traced.graphs


def test_tracing_moves_nothing_and_holds_no_activations(traced):
    model = network()
    before = copy.deepcopy(model.state_dict())
    tape = CompiledTape(model, own(model), batch_size=BATCH)
    images_ = tape._prepared(images(BATCH))
    once = tape.forward(images(BATCH))
    moved = [key for key, value in model.state_dict().items() if not value.equal(before[key])]
    assert len(moved) == 3 * 9 and images_.dtype == torch.float64
    assert all(int(m.num_batches_tracked) == 1 for m in model.modules() if is_norm(m))
    tape.backward(once, torch.ones(1, BATCH, CLASSES, dtype=torch.float64), [None])
    for program in tape._programs.values():
        assert not [leaf for leaf in program._leaves if isinstance(leaf, Tensor)]


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d)


def test_a_further_network_is_computed_by_its_layers_where_a_gradient_is_asked_for(traced):
    model = network()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    twin = copy.deepcopy(model)
    tape = CompiledTape(model, own(model), batch_size=BATCH)
    computed = CompiledNetwork(model, tape)
    x = images(BATCH)
    assert off(computed(x), twin(x)) < BOUND and len(traced.graphs) == 1
    assert_close_buffers(model, twin)
    leaf = x.clone().requires_grad_()
    assert computed(leaf).grad_fn is not None
    twin(leaf)
    other = images(BATCH + 1)
    assert torch.equal(computed(other), twin(other)) and len(traced.graphs) == 1


@pytest.fixture
def compiling(monkeypatch):
    """Let the engine take the CPU for a device that compiles the passes of the loss."""
    monkeypatch.setattr(
        FastEngine,
        "has",
        lambda self, feature: feature not in {*self.without, "graph", "compile"},
    )


@pytest.mark.parametrize("method", ["natural", "trades", "cure", "cure_paper"])
def test_a_compiled_step_is_the_eager_one(method, compiling, traced):
    """Two steps of whole batches and one of a smaller; the revision network is compiled too."""
    both = runs.pair(method, data=runs.batches(2, last=4))
    for place in range(2):
        for run in (both.fast, both.eager):
            runs.reach(run, place)
        both.align()
        before = runs.snapshot(both.fast)
        ours, theirs = both.step(both.fast.loader.batches[both.fast.batch])
        runs.assert_equal_terms(ours, theirs)
        runs.assert_equal_step(both, before)
    further = both.fast.engine.prepared.further
    assert [type(computed) for *_, computed in further] == [CompiledNetwork] * len(further)
    assert len(further) == method.startswith("cure")
    # CURE's total and its scores want other gradients of the two passes.
    assert len(traced.graphs) == {"natural": 2, "trades": 2, "cure": 3, "cure_paper": 3}[method]


def failing_backend(graph, options=None):
    return torch.compile(graph, backend=lambda graph, inputs: 1 / 0)


def failing_launch(graph, options=None):
    def launch(*tensors):
        raise RuntimeError("Triton Error [CUDA]: invalid argument")

    return launch


def failing_layout(graph, options=None):
    """What Inductor's code says where a library's output lies otherwise than was foreseen."""

    def check(*tensors):
        graph(*tensors)  # Statistics have moved.
        raise AssertionError("expected size 8==8, stride 1==9 at dim=1")

    return check


def failing_trace(function, **options):
    raise NotImplementedError("no fake implementation")


@pytest.mark.parametrize(
    ("place", "failure", "gist"),
    [
        ("compile_static", failing_backend, "ZeroDivisionError"),
        ("compile_static", failing_launch, "Triton Error"),
        ("compile_static", failing_layout, "expected size"),
        ("make_fx", failing_trace, "no fake implementation"),
    ],
)
def test_a_compiler_that_fails_is_done_without(
    place, failure, gist, compiling, monkeypatch, capsys
):
    monkeypatch.setattr(tape_compiled, place, failure)
    make = partial(runs.make_run, "cure", data=runs.batches(3))
    ours, theirs = make("fast"), make("fast", without=["compile-loss"])
    for place in range(2):
        for run in (ours, theirs):
            next_step(run, *run.loader.batches[place])
    assert runs.differing(runs.snapshot(ours), runs.snapshot(theirs)) == []
    warnings = [line for line in capsys.readouterr().err.splitlines() if "torch.compile" in line]
    assert len(warnings) == 1 and gist in warnings[0]
    assert "without compile-loss" in warnings[0] and ours.engine.name == "fast"
    assert ours.engine.without == {"compile-loss"}


def test_memory_that_runs_out_in_a_compiler_is_the_eager_engines_to_save(
    compiling, monkeypatch, capsys
):
    def full(graph, options=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tape_compiled, "compile_static", full)
    run = runs.make_run("cure", "fast", data=runs.batches(1))
    next_step(run, *run.loader.batches[0])
    assert run.engine.name == "eager" and "did not fit into memory" in capsys.readouterr().err


def test_an_error_of_a_program_that_has_run_is_not_the_compilers(compiling, monkeypatch):
    def fails_later(graph, options=None):
        calls = []

        def call(*tensors):
            calls.append(None)
            if len(calls) > 1:
                raise RuntimeError("device-side assert")
            return graph(*tensors)

        return call

    monkeypatch.setattr(tape_compiled, "compile_static", fails_later)
    run = runs.make_run("natural", "fast", data=runs.batches(2))
    next_step(run, *run.loader.batches[0])
    with pytest.raises(RuntimeError, match="device-side assert"):
        next_step(run, *run.loader.batches[1])


class Small(ImageClassifier):
    """The least with a BatchNorm and a ReLU: each kernel takes a compiler of C++ seconds."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(y.mean(dim=(2, 3)))


def test_torch_compile_itself(monkeypatch):
    made = []

    def noting(graph, options):
        made.append(compile_static(graph, options))
        return made[-1]

    monkeypatch.setattr(tape_compiled, "compile_static", noting)
    model = Small().double().to(memory_format=torch.channels_last)
    check(model, wanted=[None, ["conv1.weight"]])
    assert len(made) == 2
