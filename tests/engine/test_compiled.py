"""What the fast engine gives to torch.compile: it computes the same, and may fail."""

from __future__ import annotations

import pytest
import torch

import engine_runs as runs
from cure_fast.engine import fast, prepared, recorded
from networks import Dense, Odd, Plain, Transformer, network

pytestmark = pytest.mark.usefixtures("one_thread", "sample_methods")


class Compiler:
    """Stands for torch.compile's own backend, which is slow: it traces, and generates no code."""

    def __init__(self) -> None:
        self.made: list[object] = []
        self.backend: object = "aot_eager"

    def __call__(self, function, options=None):
        self.made.append(function)
        return torch.compile(function, backend=self.backend, dynamic=False)


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """Let all be compiled on the CPU too."""
    torch.compiler.reset()
    monkeypatch.setattr(fast, "ON_GPU", ("graph",))
    found = Compiler()
    for module in (prepared, recorded):
        monkeypatch.setattr(module, "compile_static", found)
    return found


# Each calls the same compiled network.
ONE_STEP = {"attack_steps": 1}


def pair(method, kind=Plain, **options):
    options.setdefault("data", runs.batches(2, last=4))
    options["attack"] = ONE_STEP | options.get("attack", {})
    made = (runs.make_run(method, e, model=network(kind), **options) for e in ("fast", "eager"))
    return runs.Pair(*made)


# Tracing takes seconds.
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "method",
    ["cure", *(pytest.param(m, marks=SLOW) for m in ("natural", "trades", "derived", "guided"))],
)
def test_a_compiled_step_is_the_eager_one(method, compiler):
    """And the smaller last batch, which is not compiled."""
    both = pair(method)
    runs.assert_steps_equal(both, 3)
    # The attacked network, and the loss there and back.
    assert len(compiler.made) == 3
    assert both.fast.engine.description == "fast"


@SLOW
@pytest.mark.parametrize("kind", [Dense, Odd, Transformer])
def test_any_network_is_compiled(kind):
    both = pair("trades", kind, data=runs.batches(1))
    runs.assert_steps_equal(both, 2)
    assert both.fast.engine.description == "fast"


@SLOW
def test_a_compiled_step_in_half_precision_is_the_eager_one():
    both = pair("cure", dtype=runs.HALF)
    before = {name: value.clone() for name, value in runs.tensors(both.fast).items()}
    ours, theirs = both.step(*both.fast.loader.batches[0])
    runs.assert_equal_terms(ours, theirs, 2**-6)
    assert runs.half_distance(both.fast, both.eager, before) < runs.HALF_BOUND
    assert both.fast.engine.description == "fast"


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_attacked_network_is_compiled_once_for_each_use(mode, compiler):
    """With and without gradients of the images; its weights and statistics are read anew."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiler.backend = backend
    both = pair("trades", data=runs.batches(1), attack={"attack_mode": mode}, without=["stack"])
    both.fast.engine.without.add("compile-loss")
    runs.assert_steps_equal(both, 4)
    assert len(graphs) == 2
    assert all(isinstance(p, torch.nn.Parameter) for p in both.fast.model.parameters())


def test_hooks_of_a_method_are_not_passed_over():
    both = pair("hooked", data=runs.batches(1))
    runs.assert_steps_equal(both, 2)


@pytest.mark.parametrize("feature", ["compile", "compile-loss"])
def test_what_cannot_be_compiled_runs_as_it_is(feature, compiler, capsys):
    run, other = (
        runs.make_run(
            "cure", model=network(Plain), data=runs.batches(2), without=without, attack=ONE_STEP
        )
        for without in ((), [feature])
    )

    def backend(graph, inputs):
        # The graph of a part returns many tensors, the attacked network's one.
        parts = len(graph.graph.output_node().args[0]) > 1
        if parts == (feature == "compile-loss"):
            raise NotImplementedError("no code\nfor this graph")
        return graph.forward

    compiler.backend = backend
    for each in (run, other):
        runs.train(each, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: the fast engine goes on without {feature}, as torch.compile")
    assert "no code" in line
    assert run.engine.description == f"fast without {feature}"
    assert runs.differing(runs.snapshot(run), runs.snapshot(other)) == []


@SLOW
@pytest.mark.parametrize("method", ["trades", "cure"])
def test_generated_code_computes_the_eager_step(method, compiler):
    compiler.backend = "inductor"
    both = pair(method, data=runs.batches(1))
    runs.assert_steps_equal(both, 2)
    assert both.fast.engine.description == "fast"
