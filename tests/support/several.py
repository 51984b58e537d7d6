"""Several processes that share one run, as a launcher would start them, and tiny runs in them."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cure_fast import distributed
from cure_fast.batch import Batch, Part
from processes import Running, start
from tiny_step import FixedLoader

# What a tiny run may wait; a test that fails shall not take half an hour.
TIMEOUT_S = 60.0


def start_together(
    words: Sequence[str],
    cwd: Path,
    count: int = 2,
    *,
    env: Mapping[str, str | None] | None = None,
    prepare: Callable[[], object] | Mapping[int, Callable[[], object]] | None = None,
) -> list[Running]:
    """Start ``cure-fast WORDS`` in ``count`` processes that find one another.

    ``prepare`` is as for :func:`processes.start`, for all or by rank.
    """
    cwd.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launched = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(
            words,
            cwd,
            env={**launched, "RANK": str(rank), "LOCAL_RANK": str(rank), **(env or {})},
            prepare=prepare.get(rank) if isinstance(prepare, Mapping) else prepare,
        )
        for rank in range(count)
    ]


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


@contextmanager
def maybe_joined() -> Iterator[None]:
    with distributed.joined(timeout_s=TIMEOUT_S):
        yield


def losses(case: dict[str, Any], steps: int) -> list[dict[str, float]]:
    """Return the terms of each step of a method in float64, trained with this process's images."""
    import torch

    import engine_runs as runs
    from cure_fast.policies import find_policy
    from cure_fast.training.trainer import average_statistics, next_step

    torch.set_num_threads(1)
    model = None
    data = [(x.double(), y) for x, y in runs.batches(2, size=13, last=7)]
    policies = {name: find_policy(name).settings for name in case.get("policies", ())}
    original = runs.FixedLoader
    runs.FixedLoader = PartLoader
    try:
        run = runs.make_run(
            case["method"],
            case.get("engine", "eager"),
            data=data,
            model=model,
            policies=policies,
            optim={"epochs": -(-steps // 2), "batch_size": 13},
            run={"sync_batchnorm": case.get("sync", True)},
            **case.get("settings", {}),
        )
    finally:
        runs.FixedLoader = original
    for network in (*run.all_networks.values(), *run.teachers.values()):
        network.double()
    found = []
    while len(found) < steps:
        with run.loader.epoch(run.epoch) as batches:
            for batch in batches:
                _, terms = next_step(run, batch)
                found.append({k: float(v) for k, v in (terms or {}).items()})
        for policy in run.policies:
            policy.on_epoch_end(run)
        average_statistics(run)
        run.epoch, run.batch = run.epoch + 1, 0
    weights = {
        f"{name}.{key}": float(value.double().sum())
        for name, network in run.all_networks.items()
        for key, value in network.state_dict().items()
    }
    return [*found, weights]


def write_losses(cases: list[dict[str, Any]], steps: int) -> None:
    """Write the losses of all cases into ``losses-RANK.json`` and end the process."""
    found: list[Any] = []
    with maybe_joined():
        for case in cases:
            try:
                found.append(losses(case, steps))
            except Exception as error:
                if isinstance(error, distributed.LostError):
                    raise
                found.append(f"{type(error).__name__}: {error}")
    Path(f"losses-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    raise SystemExit(0)


def losses_in(cwd: Path, cases: list[dict[str, Any]], steps: int, count: int) -> list[list[Any]]:
    """Return what :func:`write_losses` wrote in each of ``count`` processes."""
    prepare = partial(write_losses, cases, steps)
    if count == 1:
        cwd.mkdir(parents=True, exist_ok=True)
        running = [start([], cwd, prepare=prepare)]
    else:
        running = start_together([], cwd, count, prepare=prepare)
    for process in running:
        assert process.wait() == 0, process.output()
    return [json.loads((cwd / f"losses-{rank}.json").read_text()) for rank in range(count)]
