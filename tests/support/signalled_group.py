"""A run's processes that are all signalled at once, as a terminal or a scheduler does."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import torch

from cure_fast.loaders import ImageSet, make_loader, torch_loader
from cure_fast.signals import SIGNALS


def signal_all(late: float) -> None:
    """Read an epoch with two workers, print how much came, and end the process.

    Every signal goes to all of them after the first batch. The second worker takes its own handling
    of signals ``late`` seconds after it has started.
    """
    take_signals = torch_loader._leave_signals_to_the_parent

    def take_signals_late(worker: int) -> None:
        time.sleep(late * worker)
        take_signals(worker)

    torch_loader._leave_signals_to_the_parent = take_signals_late
    came = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: came.append(number))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (900, 8, 8, 3), dtype=np.uint8)
    labels = (np.arange(900) % 3).astype(np.int64)
    loader = make_loader(
        "torch",
        ImageSet("random", images, labels, ("a", "b", "c"), "a generator"),
        batch_size=10,
        device=torch.device("cpu"),
        seed=0,
        crop_padding=0,
        flip=False,
        workers=2,
        cache=None,
    )
    os.setpgid(0, 0)
    count = 0
    with loader.epoch(0) as batches:
        for batch in batches:
            count += len(batch)
            if count == 10:
                for number in SIGNALS:
                    os.killpg(0, number)
    print(count, sorted(set(came)) == sorted(SIGNALS), flush=True)
    raise SystemExit(0)
