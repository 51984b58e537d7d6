"""What the fast engine's loss costs, counted in the code that Inductor generates for it; no GPU.

    python -m bench.lowered --model resnet18 --method cure --kernels

A step's loss and all its gradients are computed with fake tensors for a pretended H200
(:mod:`bench.fake_cuda`): bf16, 128 images of 32x32, channels_last. What the engine gives to
torch.compile is lowered as on a GPU, up to the code of its kernels, and counted there; operations
that the engine launches itself are counted one by one. Not counted: the attack, the update, and
what judges whether a step is finite.

Bytes are those of Inductor's own estimate: each tensor that a kernel reads or writes, once. The
library's convolutions and matrix products are counted apart, as what they need besides their
operands is theirs. Nothing here is a time.

Beside another commit's engine, of which it may cost :data:`LIMIT` times as much:

    git worktree add ../other 75439dc
    python -m bench.lowered --checkout ../other --out other.json
    python -m bench.lowered --against other.json
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from bench.fake_cuda import missing, pretended
from bench.launches import COLUMNS, Cost, Launch, Operations, lower

MODELS = ("resnet18", "preactresnet18", "wrn34-10")
METHODS = ("cure", "trades", "pgd_at")
BATCH = 128
# What the loss may cost at most, in units of what it cost with another commit's engine.
LIMIT = 1.03
# The figures that the limit is for.
LIMITED = ("launches", "convolution calls", "GB")


class _JudgedError(Exception):
    """Ends a step where its gradients are complete."""


def measure(method: str, model: str, options: Mapping[str, Any]) -> Cost:
    """Return what the loss of one step and its gradients cost.

    Args:
        method: a training method's name.
        model: a network's name.
        options: Inductor's, beside those that the engine asks for.
    """
    counter = Operations()

    def compiled(graph: fx.GraphModule, **asked: Any) -> Callable[..., Any]:
        cost: Cost | None = None

        def call(*inputs: Tensor) -> Any:
            nonlocal cost
            if cost is None:
                cost = lower(graph, inputs, {**asked["options"], **options})
            with counter.instead(cost):
                return graph(*inputs)

        return call

    with pretended(), FakeTensorMode() as mode, mock.patch("torch.compile", compiled):
        step = loss_of(method, model, mode)
        step()  # Records and lowers, so that the second does nothing but the work.
        counter.cost = Cost()
        with counter:
            step()
    return counter.cost


def loss_of(method: str, model: str, mode: FakeTensorMode) -> Callable[[], None]:
    """Return what computes one step's loss and its gradients by the fast engine.

    Its tensors are the CPU's, as autograd asks the driver about others in places that no Python
    replaces; the engine is told that it has a GPU, and :func:`lower` moves what is compiled. So
    BatchNorms are recorded as ATen's own, where a GPU may record cuDNN's for Inductor to write out.
    """
    from cure_fast.config import Config, OptimConfig, RunConfig
    from cure_fast.engine.fast import FastEngine
    from cure_fast.methods import select_method
    from cure_fast.models import build_model

    build_run = importlib.import_module(f"{home('training')}.trainer").build_run
    config = Config(optim=OptimConfig(batch_size=BATCH), run=RunConfig(engine="fast"))
    with _disable_current_modes():
        network = build_model(model, num_classes=10)
    for module in network.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                held[name] = tensor if tensor is None else mode.from_tensor(tensor)  # pyright: ignore[reportArgumentType]
    network.compute_dtype = torch.bfloat16
    loader: Any = mock.Mock(batch_size=BATCH, batches_per_epoch=1)
    # Modules of fake tensors cannot be moved, and copies of them are to be of the same mode.
    with (
        mock.patch.object(nn.Module, "to", lambda module, *_: module),
        mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, create=True),
    ):
        run = build_run(select_method(config, method), network, loader, torch.device("cpu"))
    x, x_adv = (torch.empty(BATCH, 3, 32, 32, memory_format=torch.channels_last) for _ in range(2))
    y = torch.empty(BATCH, dtype=torch.int64)
    run.method = replace(run.method, uses_attack=False, attack=lambda *given: x_adv)
    assert isinstance(run.engine, FastEngine), run.engine.reason
    with mock.patch.object(FastEngine, "has", lambda engine, part: part not in engine.without):
        prepared = run.engine.prepare()
    prepared.undo = mock.Mock()
    prepared.judge = mock.Mock(side_effect=_JudgedError)

    def step() -> None:
        try:
            prepared.compute(*batch(x, y))
        except _JudgedError:
            prepared.clear()

    return step


def home(room: str) -> str:
    """Return the package of a room in the checkout, which may be from before there were rooms."""
    return "cure_fast" if find_spec("cure_fast.training") is None else f"cure_fast.{room}"


def batch(x: Tensor, y: Tensor) -> Sequence[Any]:
    """Return what the checkout's engine takes for a batch: one object, or images and labels."""
    if find_spec("cure_fast.batch") is None:
        return x, y
    from cure_fast.batch import Batch

    return (Batch(x, y, torch.empty_like(y)),)


def main() -> int:
    """Print the counts; return 1 where they are above the limit, else 0."""
    asked = arguments()
    if (reason := missing()) is not None:
        raise SystemExit(f"python -m bench.lowered: {reason}.")
    if asked.checkout is not None:
        sys.path.insert(0, str(asked.checkout.resolve()))
    commit = importlib.import_module(f"{home('runs')}.environment").commit
    other = {} if asked.against is None else json.loads(asked.against.read_text())["counts"]
    options = {"combo_kernels": True} if asked.combo_kernels else {}
    counts: dict[str, dict[str, float]] = {}
    print(" | ".join(["loss", *COLUMNS]))
    within = True
    for model, method in itertools.product(asked.model, asked.method):
        name = f"{method} {model}"
        cost = measure(method, model, options)
        counts[name] = cost.figures()
        print(" | ".join([name, *(shown(counts[name][column]) for column in COLUMNS)]), flush=True)
        if name in other:
            print(" | ".join(["  beside", *(shown(other[name][column]) for column in COLUMNS)]))
            excess = above(counts[name], other[name])
            within = within and not excess
            print(f"  above {LIMIT} times: {', '.join(excess) or 'nothing'}")
        if asked.kernels:
            print(*map(described, cost.launches), sep="\n")
    if asked.out is not None:
        about = {"commit": commit(), "torch": torch.__version__, "batch": BATCH, "options": options}
        asked.out.write_text(json.dumps({**about, "counts": counts}, indent=1) + "\n")
    return 0 if within else 1


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    about, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=MODELS, help="networks")
    parser.add_argument("--method", nargs="+", default=METHODS, help="training methods")
    parser.add_argument("--combo-kernels", action="store_true", help="with this option of Inductor")
    parser.add_argument("--kernels", action="store_true", help="list every launch")
    parser.add_argument("--checkout", type=Path, help="another commit's, whose engine is counted")
    parser.add_argument("--against", type=Path, help="an --out to set beside")
    parser.add_argument("--out", type=Path, help="JSON file to write the counts to")
    return parser.parse_args()


def above(counts: Mapping[str, float], others: Mapping[str, float]) -> list[str]:
    """Return the names of the figures above :data:`LIMIT` times the others'."""
    return [name for name in LIMITED if counts[name] > LIMIT * others[name]]


def shown(figure: float) -> str:
    """Return a figure for the table: a count, or GB."""
    return str(figure) if isinstance(figure, int) else f"{figure:.3f}"


def described(launch: Launch) -> str:
    """Return a line about a launch."""
    megabytes = f"{launch.read / 1e6:9.3f} MB read {launch.written / 1e6:9.3f} MB written"
    kind = "layout copy" if launch.reorders else launch.kind
    return f"    {megabytes}  {kind}: {launch.name}"


if __name__ == "__main__":
    sys.exit(main())
