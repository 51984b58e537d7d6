"""Runs in processes of their own, several at once: on one machine's cores, or a GPU for each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from cure_fast.config import Config
from cure_fast.config.values import to_dict
from cure_fast.console import say
from cure_fast.errors import (
    CureFastError,
    DivergedError,
    InputError,
    MemoryExhaustedError,
    StoppedError,
)
from cure_fast.progress import duration
from cure_fast.runs.folder import is_free
from cure_fast.signals import StopSignals

# Seconds between two looks at the processes, and from a signal of ours to one to them: a terminal
# sends Ctrl-C to all of a group by itself.
LOOK_S, FORWARD_S = 0.1, 1.0
# Ends of a process that are results of its own; after others no further one is started.
OF_A_RUN = (DivergedError, MemoryExhaustedError)

# ``python -m cure_fast`` in a process that saves its run and ends once its parent is gone, as by a
# SIGKILL, which nothing else tells it of.
WATCHING = """
import os, signal, sys, threading, time
from cure_fast.__main__ import main
def watch():
    while os.getppid() == {parent}:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=watch, daemon=True).start()
sys.exit(main())
"""


def several_gpus(config: Config) -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES calls the GPUs that runs may be spread over; else none."""
    if config.run.device not in ("auto", "cuda") or (count := torch.cuda.device_count()) < 2:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


@dataclass
class Child:
    """A process that trains a run, since when, and the file that it prints into."""

    name: str
    process: subprocess.Popen[bytes]
    printed: Path
    started: float

    def end(self) -> CureFastError | None:
        """Return what it ended with, once it has: None for a finished run."""
        code = self.process.wait()
        if code == 0:
            return None
        lines = self.printed.read_text(encoding="utf-8", errors="replace").split("\n")
        told = next((line for line in reversed(lines) if line.strip()), f"ended with code {code}")
        told = told.removeprefix("cure-fast: ")
        kinds = {kind.code: kind for kind in (*OF_A_RUN, StoppedError)}
        if code in kinds:
            return kinds[code](told)
        return InputError(f"{self.name}: the process ended with code {code}: {told}")


def train_side_by_side(
    runs: Mapping[str, Config], jobs: int, stop: StopSignals
) -> dict[str, CureFastError]:
    """Train and evaluate runs, by their names, ``jobs`` at once, each from where it stands.

    Returns:
        What ended runs without a result, by name.

    Raises:
        StoppedError: after a signal, once every process has saved its run.
        InputError: where a process ended by what is no result of its run; others are stopped.
    """
    gpus = several_gpus(next(iter(runs.values()))) if runs else []
    waiting, free = list(runs.items()), list(range(jobs))
    running: dict[int, Child] = {}
    ended: dict[str, CureFastError] = {}
    broken: CureFastError | None = None
    with tempfile.TemporaryDirectory() as place, ending(running):
        asked: float | None = None
        while running or (waiting and not stop() and broken is None):
            while waiting and free and not stop() and broken is None:
                slot = free.pop(0)
                name, config = waiting.pop(0)
                gpu = gpus[slot % len(gpus)] if gpus else None
                say(f"{name}: started" + (f" on GPU {gpu}" if gpu else ""))
                running[slot] = launch(name, config, Path(place) / str(slot), jobs, gpu)
            time.sleep(LOOK_S)
            if asked is None and (stop() or broken is not None):
                asked = time.monotonic() + FORWARD_S
            elif asked is not None and time.monotonic() > asked:
                asked = float("inf")
                for child in running.values():
                    child.process.send_signal(signal.SIGTERM)
            for slot in [s for s, child in running.items() if child.process.poll() is not None]:
                child = running.pop(slot)
                free.append(slot)
                if error := child.end():
                    ended[child.name] = error
                    broken = broken or (None if isinstance(error, OF_A_RUN) else error)
                else:
                    say(f"{child.name}: done in {duration(time.monotonic() - child.started)}")
    if stop() or isinstance(broken, StoppedError):
        raise StoppedError("stopped by a signal; the same command goes on from there.")
    if broken is not None:
        raise broken
    return ended


def launch(name: str, config: Config, place: Path, jobs: int, gpu: str | None) -> Child:
    """Start the process of a run, with files at ``place`` for its settings and its text."""
    settings, printed = place.with_suffix(".json"), place.with_suffix(".log")
    settings.write_text(json.dumps(to_dict(config)), encoding="utf-8")
    folder = config.run.out
    assert folder is not None
    words = [
        "train",
        str(settings),
        "--out",
        folder,
        *(() if is_free(Path(folder)) else ("--resume",)),
    ]
    cores = max(1, len(os.sched_getaffinity(0)) // jobs)
    own = {"OMP_NUM_THREADS": str(cores), **os.environ}
    if gpu is not None:
        own["CUDA_VISIBLE_DEVICES"] = gpu
    with printed.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", WATCHING.format(parent=os.getpid()), *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=own,
        )
    return Child(name, process, printed, time.monotonic())


@contextmanager
def ending(running: Mapping[int, Child]) -> Iterator[None]:
    """Leave no process behind where the block ends by an error of ours."""
    try:
        yield
    finally:
        for child in running.values():
            child.process.terminate()
        for child in running.values():
            child.process.wait()
