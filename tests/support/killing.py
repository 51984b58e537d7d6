"""One run killed once or more and resumed, judged by what the disk held at each kill."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cure_fast.runs.checkpoint import load_checkpoint
from processes import PATIENCE_S, Running, finish, start
from tiny_command import STEPS_PER_EPOCH, checkpoints, differences, tiny_words


@dataclass(frozen=True)
class Unbroken:
    """A run to compare with: its folder, and the seconds that it took."""

    folder: Path
    seconds: float


@dataclass
class Outcome:
    """What became of a run that was killed.

    Attributes:
        phases: where each kill came.
        lost: work that was on the disk and was not taken up again.
        different: in what the finished run differs from the unbroken one.
        refused: commands that should have gone on and did not, with their output.
        leftovers: files that an unbroken run does not have.
    """

    phases: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)

    def faults(self) -> list[str]:
        """Return all that is wrong, in lines; nothing where nothing is."""
        return self.lost + self.different + self.refused + self.leftovers


def measure_unbroken(cwd: Path, method: str = "cure") -> Unbroken:
    """Run without a fault."""
    # The first process of all waits for the server's imports.
    assert finish(["list"], cwd)[0] == 0
    started = time.monotonic()
    code, output = finish(tiny_words(method=method), cwd)
    assert code == 0, output
    return Unbroken(cwd / "run", time.monotonic() - started)


def same_end(first: Path, second: Path) -> bool:
    """Return whether the newest checkpoints of two folders hold the same to the last bit.

    A run's files of weights are those of its best epoch, which may lie before a fault.
    """
    states = [load_checkpoint(folder / "checkpoints")[0] for folder in (first, second)]
    return equal(*states)


def equal(a: Any, b: Any) -> bool:
    """Return whether two states of tensors and plain values are the same."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def kill_and_resume(
    cwd: Path, unbroken: Unbroken, kills: Sequence[float | Callable[[], object]]
) -> Outcome:
    """Kill a run again and again, continue it each time and at last to its end, and judge it.

    A kill comes after some seconds, or is placed by what is called in the process beforehand, which
    may also leave it alone: the run then ends before its time.
    """
    outcome = Outcome()
    words = tiny_words()
    for kill in kills:
        expected = to_resume_from(cwd)
        running = start(words, cwd, prepare=kill if callable(kill) else None)
        running.join(PATIENCE_S if callable(kill) else kill)
        code = running.kill()
        if code == 0:
            words = tiny_words("--resume")
            break
        if code != -signal.SIGKILL:
            outcome.refused.append(f"exit code {code}: {running.output()}")
            return outcome
        note_resumed(running.output(), expected, outcome, whole=False)
        note_kill(cwd, running, outcome)
        words = words_to_go_on(cwd, outcome)
    expected = to_resume_from(cwd)
    code, output = finish(words, cwd)
    if code != 0:
        outcome.refused.append(f"exit code {code}: {output}")
        return outcome
    note_resumed(output, expected, outcome, whole=True)
    outcome.different = differences(unbroken.folder, cwd / "run")
    if not same_end(unbroken.folder, cwd / "run"):
        outcome.different.append("the last checkpoint")
    if kept(unbroken.folder) != kept(cwd / "run"):
        outcome.different.append(f"checkpoints kept: {kept(cwd / 'run')}")
    outcome.leftovers = sorted(
        tree(cwd) - {name for name in tree(unbroken.folder.parent) if "checkpoint-" not in name}
    )
    return outcome


def note_resumed(output: str, expected: list[str], outcome: Outcome, *, whole: bool) -> None:
    """Note where a process took up other checkpoints than those on the disk at its start.

    One that was killed, which is no ``whole`` one, may not have come to it.
    """
    found = re.findall(r"\w+: resumed after step \d+", output)
    if found != (expected if whole or found else []):
        outcome.lost.append(f"expected {expected}, came {found}")


def kept(run: Path) -> tuple[list[int], str]:
    """Return the steps of the checkpoints that a run has kept, and what ``latest`` points to."""
    return checkpoints(run), (run / "checkpoints" / "latest").readlink().as_posix()


def tree(cwd: Path) -> set[str]:
    """Return the files and folders below the folder, without those of checkpoints."""
    names = {path.relative_to(cwd).as_posix() for path in cwd.rglob("*")}
    return {name for name in names if "/checkpoint-" not in name}


def note_kill(cwd: Path, running: Running, outcome: Outcome) -> None:
    """Note where a kill came, and what had been reported as finished and is not on the disk."""
    outcome.phases.append(phase(cwd))
    for stage, folder in (("pretrain", pretraining(cwd)), ("train", cwd / "run")):
        epochs = re.findall(rf"^{stage} epoch +(\d+)/", running.stdout(), re.MULTILINE)
        # The line comes right before the checkpoint of its epoch.
        before = STEPS_PER_EPOCH * (int(epochs[-1]) - 1) if epochs else 0
        done = folder is not None and (folder / "done").exists()
        if before and not done and (folder is None or max(checkpoints(folder), default=0) < before):
            outcome.lost.append(f"{stage} epoch {epochs[-1]} was over: {phase(cwd)}")


def words_to_go_on(cwd: Path, outcome: Outcome) -> list[str]:
    """Return the command that continues the run, or starts it where there is nothing yet."""
    resuming = tiny_words("--resume")
    if (cwd / "run" / "config.json").exists():
        return resuming
    refused = start(resuming, cwd)
    if (code := refused.wait()) != 2 or len(refused.stderr().splitlines()) != 1:
        outcome.refused.append(f"--resume without a run gave exit code {code}: {refused.output()}")
    return tiny_words()


def to_resume_from(cwd: Path) -> list[str]:
    """Return what the next process should say of the checkpoint it takes."""
    run, cached = cwd / "run", pretraining(cwd)
    if steps := checkpoints(run):
        return [f"train: resumed after step {steps[-1]}"]
    if (run / "start.safetensors").exists() or cached is None or (cached / "done").exists():
        return []
    return [f"pretrain: resumed after step {step}" for step in checkpoints(cached)[-1:]]


def pretraining(cwd: Path) -> Path | None:
    """Return the folder of the natural pre-training, if it was begun."""
    return next((cwd / "cache" / "pretrained").glob("*"), None)


def phase(cwd: Path) -> str:
    """Return the phase that a killed run was in, by its files."""
    run, cached = cwd / "run", pretraining(cwd)
    saving = [*run.glob("checkpoints/.tmp*"), *(cached.glob("checkpoints/.tmp*") if cached else ())]
    if saving:
        return "saving"
    for name, text in (
        ("report.html", "end"),
        ("results.json", "report"),
        ("start.safetensors", "training"),
        ("config.json", "pre-training"),
    ):
        if (run / name).exists():
            last = checkpoints(run)[-1:] == [2 * STEPS_PER_EPOCH]
            return "evaluation" if text == "training" and last else text
    return "start"
