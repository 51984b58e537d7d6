"""2,000 epochs in one process: memory, open files and threads stay as they are."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tiny_command import tiny_words

EPOCHS = 2000
# The tiny network has 26 kB of weights, and a row of metrics as an object about 5 kB: a leak of one
# row an epoch would be 5 MB over the half that is looked at, one of the weights 26 MB.
GROWTH_MB = 4.0


def usage(pid: int) -> tuple[float, int, int]:
    """Return the resident memory of a process in MB, and its numbers of files and threads."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return int(fields["VmRSS"].split()[0]) / 1024, files, int(fields["Threads"])


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("loader", ["resident", "ffcv", "torch"])
def test_nothing_grows_over_two_thousand_epochs(tmp_path, loader, capsys):
    if loader == "ffcv":
        pytest.importorskip("ffcv", reason="FFCV is not installed")
    words = tiny_words(
        *f"--epochs {EPOCHS} --train-images 32 --val-images 10 --attack-steps 1".split(),
        *f"--loader {loader} --workers 1 --tensorboard --log-every 10".split(),
        *"--checkpoint-every 5".split(),
    )
    output = tmp_path / "output"
    samples: list[tuple[int, tuple[float, int, int]]] = []
    # A fresh interpreter: the memory of a forked one grows while it touches what it shares.
    with output.open("w") as file:
        run = subprocess.Popen(
            [sys.executable, "-m", "cure_fast", *words], cwd=tmp_path, stdout=file, stderr=file
        )
    try:
        while run.poll() is None:
            epochs = output.read_text().count("train epoch")
            if 0 < epochs < EPOCHS:
                samples.append((epochs, usage(run.pid)))
            time.sleep(0.5)
    finally:
        run.kill()
    assert run.wait() == 0, output.read_text()[-2000:]
    second = [use for epoch, use in samples if epoch >= EPOCHS / 2]
    # Files and threads of a moment, such as a checkpoint's, come and go: the least of each quarter.
    quarters = second[: len(second) // 2], second[len(second) // 2 :]
    before, after = ([min(column) for column in zip(*part, strict=True)] for part in quarters)
    growth = [late - early for early, late in zip(before, after, strict=True)]
    with capsys.disabled():
        print(f"\n{loader}: {len(second)} samples, MB, files, threads {before} -> {after}")
    assert len(second) >= 20
    assert growth[0] < GROWTH_MB and growth[1] == 0 and growth[2] == 0
