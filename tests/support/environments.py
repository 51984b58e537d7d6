"""A tiny run of the command line, to be done again on a strange machine and compared."""

from __future__ import annotations

import os
import subprocess
import sys

from processes import finish
from tiny_job import same_weights, stable_rows

TINY = (
    "train quickstart --train-images 60 --val-images 20 --width 4 --pretrain-epochs 1 --epochs 1 "
    "--batch-size 30 --eps 4/255 --attack-steps 1 --step-size 4/255 --attacks natural,pgd2 "
    "--eval-step-size 0.1 --limit 20 --val-attack-steps 1 --device cpu --log-every 1"
).split()
QUICK = [*TINY, "--loader", "resident", "--no-tensorboard"]


def quick_run(plain, tmp_path, words=(), **options):
    """Run the command of `plain` in another way; return exit code and output."""
    cache = str(plain.parent / "cache")
    return finish([*QUICK, "--cache", cache, "--out", "run", *words], tmp_path, **options)


def check_same(folder, plain):
    assert same_weights(folder, plain) and stable_rows(folder) == stable_rows(plain)


def fresh(words, cwd, env=None, *, module="cure_fast", **options):
    """Run the command line in a new interpreter; `env` as for `processes.start`."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=cwd,
        env={name: value for name, value in variables.items() if value is not None},
        timeout=240,
        check=False,
        **{"capture_output": True, **options},
    )
