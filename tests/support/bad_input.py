"""Wrong command lines and what is answered: the cases of docs/errors.md, and how they are run.

``python tests/support/bad_input.py`` from the checkout writes docs/errors.md again.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest import mock

from bad_input_cases import CASES, EXIT_CODES, INTRODUCTION

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "errors.md"
ASSIGNED = re.compile(r"[A-Z_]+=")
# The user `nobody`, as whom permissions count also where the tests run as root.
NOBODY = 65534


class ReachedError(Exception):
    """Raised where training or attacks would begin: all that can be checked before has passed."""


def reached(*arguments: Any, **options: Any) -> Any:
    """Stand for what takes long."""
    raise ReachedError


@contextlib.contextmanager
def no_training() -> Iterator[None]:
    """Replace training, estimates of its time, attacks, FFCV, the GPU, downloads and `doctor`.

    What is left is all that looks at a user's input, so a command line takes milliseconds.
    """
    from cure_fast.loaders import datasets

    def offline(name: str, root: Path, split: str, *, download: bool) -> Any:
        if download:
            raise OSError("Network is unreachable")
        return opened(name, root, split, download=False)

    opened = datasets._open_torchvision
    stand_ins = {
        "cure_fast.training.job.run_stages": reached,
        "cure_fast.training.job.plan_job": lambda *_: None,
        "cure_fast.training.job.time_passes": lambda *_, **__: None,
        "cure_fast.cli.evaluate.measure_run": reached,
        "cure_fast.cli.evaluate.attack_model": reached,
        "cure_fast.loaders.beton.ensure_beton": reached,
        "cure_fast.export.command._make_folder": reached,
        "cure_fast.cli.doctor.doctor": lambda: 0,
        "cure_fast.runs.folder.environment": dict,
        "cure_fast.loaders.choose.ffcv_problem": lambda: "FFCV is not installed",
        "cure_fast.loaders.datasets._open_torchvision": offline,
        "cure_fast.loaders.datasets._read_digits": functools.cache(datasets._read_digits),
        "torch.cuda.is_available": lambda: False,
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch(name, stand_in))
        yield


def answer(words: list[str], *, as_nobody: bool = False) -> tuple[int | None, str]:
    """Return exit code and standard error of a command line; ``None`` where training would begin.

    Args:
        words: the command line without the program's name; variables may be set before it.
        as_nobody: run it as a user without rights where this process is root.
    """
    from cure_fast.cli.main import main

    code: Any
    errors = io.StringIO()
    # As a shell has it: what is set for the command stands before it.
    given = dict(word.split("=", 1) for word in takewhile(ASSIGNED.match, words))
    words = words[len(given) :]
    with (
        mock.patch.dict(os.environ, given),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
    ):
        drop = as_nobody and os.geteuid() == 0
        if drop:
            os.seteuid(NOBODY)
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
        except ReachedError:
            code = None
        finally:
            if drop:
                os.seteuid(0)
    return code, errors.getvalue()


def prepare(folder: Path) -> None:
    """Write the files and folders that the cases name into an empty folder."""
    import torch

    from cure_fast.config.values import to_dict
    from cure_fast.models.building import build_for_data
    from cure_fast.models.weights import save_weights
    from cure_fast.recipes import find_recipe

    for name in ("empty-folder", "full/kept", "photos/train/cat", "photos/train/dog"):
        (folder / name).mkdir(parents=True)
    (folder / "notes.txt").write_text("Buy milk.\n")
    (folder / "empty.pt").touch()
    (folder / "page.pt").write_text("<!DOCTYPE html><title>Sign in</title>")
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    torch.save({"run": os.system}, folder / "code.pt")
    torch.manual_seed(0)
    options: dict[str, Any] = {"data": "digits", "width": 4, "stem": "cifar", "normalize": "none"}
    model = build_for_data("resnet-small", num_classes=10, **options)
    told = {k: str(v) for k, v in options.items()} | {"model": "resnet-small", "num_classes": "10"}
    save_weights(model, folder / "good.safetensors", told)
    save_weights(model, folder / "untold.safetensors", {})
    save_weights(model, folder / "eps.safetensors", {**told, "eps": "wide"})
    whole = (folder / "good.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    values = to_dict(find_recipe("quickstart"))
    changes: dict[str, dict[str, Any]] = {
        "run": {},
        "run-no-model": {},
        "run-newer": {"colour": 1},
        "run-text": {"optim": {**values["optim"], "epochs": "many"}},
        "run-method": {"method": "cuer"},
        "run-policy": {"policies": {"pait": {}}},
        "run-policies": {"policies": ["piat"]},
    }
    for name, change in changes.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**values, **change}))
        (folder / name / "metrics.jsonl").write_text("")
    shutil.copy(folder / "good.safetensors", folder / "run" / "model.safetensors")
    (folder / "run-cut").mkdir()
    (folder / "run-cut" / "config.json").write_text(json.dumps(values)[:300])
    shutil.copytree(folder / "run", folder / "run-rows")
    (folder / "run-rows" / "metrics.jsonl").write_text('{"event": "epoch"}\n{"event": "step"}\n')
    shutil.copytree(folder / "run", folder / "run-results")
    (folder / "run-results" / "results.json").write_text('{"format": 1, "models": 3}')
    shutil.copytree(folder / "run", folder / "locked")
    for name in ("locked/config.json", "locked"):
        (folder / name).chmod(0)


@contextlib.contextmanager
def prepared() -> Iterator[Path]:
    """Yield the working and home folder of the cases, with their files, for the block."""
    former = Path.cwd()
    with tempfile.TemporaryDirectory() as name, mock.patch.dict(os.environ, {"HOME": name}):
        folder = Path(name)
        folder.chmod(0o755)
        prepare(folder)
        os.chdir(folder)
        try:
            with no_training():
                yield folder
        finally:
            os.chdir(former)
            (folder / "locked").chmod(0o700)


def answers() -> dict[str, tuple[int | None, str]]:
    """Return what each case is answered."""
    cases = [words for rows in CASES.values() for words, _ in rows]
    return {words: answer(shlex.split(words), as_nobody="locked" in words) for words in cases}


def document(answered: Mapping[str, tuple[int | None, str]]) -> str:
    """Return docs/errors.md: what each case of each group is answered, with the introduction."""
    codes = [f"| {code} | {what} | {remedy} |" for code, (what, remedy) in EXIT_CODES.items()]
    lines = [INTRODUCTION.format(codes="\n".join(codes)).rstrip()]
    for title, rows in CASES.items():
        lines += ["", f"## {title}", "", "| `cure-fast ...` | answer |", "|---|---|"]
        for words, _ in rows:
            text = answered[words][1].strip().removeprefix("cure-fast: ").replace("|", "\\|")
            lines.append(f"| `{words}` | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with prepared():
        DOCUMENT.write_text(document(answers()), encoding="utf-8")
