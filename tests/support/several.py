"""Several processes that share one run, as a launcher would start them, and tiny runs in them."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cure_fast import distributed
from cure_fast.batch import Batch, Part
from processes import Running, start
from tiny_step import FixedLoader

# Seconds that a process of a test waits for the others.
TIMEOUT_S = 120.0
CLASSES = 10


def start_together(
    words: Sequence[str],
    cwd: Path,
    *,
    prepare: Callable[[], object] | None = None,
    of_last: Callable[[], object] | None = None,
    env: Mapping[str, str] | None = None,
) -> list[Running]:
    """Start ``cure-fast WORDS`` in two processes that find one another.

    ``prepare`` is as for :func:`processes.start`; the last one has ``of_last`` in its place.
    Variables in ``env`` go before what a launcher would set.
    """
    cwd.mkdir(parents=True, exist_ok=True)
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    launched |= env or {}
    return [
        start(words, cwd, env={**launched, "RANK": rank, "LOCAL_RANK": rank}, prepare=own)
        for rank, own in (("0", prepare), ("1", of_last or prepare))
    ]


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class PartLoader(FixedLoader):
    """Gives a process its part of each batch."""

    def batch(self, number: int) -> Batch:
        whole, (place, count) = super().batch(number), distributed.place()
        if count == 1:
            return whole
        size = len(whole)
        own = slice(place * size // count, (place + 1) * size // count)
        part = Part(own.start, own.stop - own.start, size)
        return replace(whole, x=whole.x[own], y=whole.y[own], index=whole.index[own], part=part)


def trained(method: str, steps: int, *policies: str, engine: str = "eager") -> list[Any]:
    """Return the terms of each step in float64, batches of 13 and 7 images, and what came of it.

    That is a sum over each tensor of the networks, by name.
    """
    import engine_runs as runs
    from cure_fast.engine import choose
    from cure_fast.models import build_model
    from cure_fast.policies import find_policy
    from cure_fast.training.trainer import average_statistics, next_step

    torch.manual_seed(1)
    model = build_model("resnet-small", num_classes=CLASSES, width=4).double()
    settings = {"strategy_every": 2} if method == "las_at" else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "FixedLoader", PartLoader)
        # Users' weights are float32, in which signs of gradients differ between sums; the fused
        # update takes no others, and sees what its reference sees.
        patch.setattr(choose, "obstacle_of", lambda run: None)
        run = runs.make_run(
            method,
            engine,
            model=model,
            data=[(x.double(), y) for x, y in runs.batches(2, size=13, last=7)],
            policies={name: find_policy(name).settings for name in policies},
            optim={"epochs": steps // 2, "batch_size": 13},
            run={"sync_batchnorm": True, "engine_without": ("fuse",) if engine == "fast" else ()},
            **settings,
        )
    for network in run.networks.values():
        network.double()
    found = []
    while run.epoch < steps // 2:
        with run.loader.epoch(run.epoch) as batches:
            found += [next_step(run, batch)[1] for batch in batches]
        for policy in run.policies:
            policy.on_epoch_end(run)
        average_statistics(run)
        run.epoch, run.batch = run.epoch + 1, 0
    assert run.engine.name == engine
    ends = {
        f"{name}.{key}": value.double().sum()
        for name, network in run.all_networks.items()
        for key, value in network.state_dict().items()
    }
    return [{k: float(v) for k, v in terms.items()} for terms in [*found, ends]]


def mixed() -> list[list[list[float]]]:
    """Return what a process has of mixed batches: pixels, labels of partners, and shares."""
    import engine_runs as runs
    from cure_fast.models import build_model
    from cure_fast.policies.mix import Mix
    from cure_fast.step.policy import Policy
    from cure_fast.training.trainer import next_step

    found = []

    class Watch(Policy):
        def before(self, run: Any, batch: Batch) -> None:
            found.append([t.flatten().tolist() for t in (batch.x, *batch.notes.values())])

    torch.manual_seed(1)
    model = build_model("resnet-small", num_classes=CLASSES, width=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "FixedLoader", PartLoader)
        run = runs.make_run("natural", "eager", model=model, data=runs.batches(2, size=5, last=4))
    run.policies = (Mix(0.7), Watch())
    for _ in range(4):
        with run.loader.epoch(0) as batches:
            for batch in batches:
                next_step(run, batch)
    return found


def bright_ones_fall(guard: Any, attack: str, x: Any, y: Any, settings: Any) -> Any:
    """Stand for an attack of AutoAttack, which takes minutes."""
    dark = {"apgd-ce": 0.53, "apgd-t": 0.52, "fab-t": 0.51, "square": 0.505}[attack]
    return x, x.flatten(1).mean(dim=1) > dark, [f"{len(x)} images told of"]


def evaluated() -> dict[str, Any]:
    """Return what attacks on a network drawn at random leave, batch by batch, but for the times."""
    from cure_fast.evaluation import autoattack
    from cure_fast.evaluation.evaluate import evaluate
    from cure_fast.models import build_model

    torch.manual_seed(2)
    model = build_model("resnet-small", num_classes=CLASSES, width=4)
    images = torch.randint(256, (45, 8, 8, 3), dtype=torch.uint8)
    with torch.no_grad():
        x = images.permute(0, 3, 1, 2) / 255
        # Near the boundaries, and half of the images right: there is something to attack.
        model.get_parameter("linear.bias").sub_(model.eval()(x).mean(dim=0))
        labels = model(x).argmax(dim=1)
    labels[::2] = (labels[::2] + 1) % CLASSES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoattack, "attack_batch", bright_ones_fall)
        found = evaluate(
            model,
            images,
            labels,
            num_classes=CLASSES,
            attacks=("natural", "fgsm", "pgd3", "pgd2-t", "cw2", "aa"),
            eps=0.02,
            step_size=None,
            batch_size=4,
            device="cpu",
            seed=0,
            restarts=2,
        )
    return {name: {**r.to_dict(), "seconds": 0} for name, r in found.items()}


def attempt(work: Callable[[], Any]) -> Any:
    """Return what ``work`` returns, or the line of what it refuses."""
    from cure_fast.errors import InputError

    try:
        return work()
    except InputError as error:
        return str(error)


def write_results(cases: Sequence[Callable[[], Any]]) -> None:
    """Write what the cases return into ``results-RANK.json``, and end the process."""
    with distributed.joined(timeout_s=TIMEOUT_S):
        found = [attempt(case) for case in cases]
    Path(f"results-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    raise SystemExit(0)


def results_of(cwd: Path, count: int, cases: Sequence[Callable[[], Any]]) -> list[list[Any]]:
    """Return what each of one or two processes finds for the cases."""
    cwd.mkdir()
    together, work = start_together if count == 2 else alone, partial(write_results, cases)
    for process in together([], cwd, prepare=work):
        assert process.wait() == 0, process.output()
    return [json.loads((cwd / f"results-{rank}.json").read_text()) for rank in range(count)]


def alone(words: Sequence[str], cwd: Path, *, prepare: Callable[[], object]) -> list[Running]:
    """Start a process by itself."""
    return [start(words, cwd, prepare=prepare)]
