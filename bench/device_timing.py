"""Times of work on the device, and the bandwidth that a plain copy reaches there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

# More than twice the 50 MB second-level cache of an H100 or H200, and the 126 MB of a B200.
FLUSH_BYTES = 256 * 2**20
COPY_BYTES = 1024 * 2**20
COPY_BYTES_ON_CPU = 2**24


class DeviceTimer:
    """Clock that is read before and after a piece of work, in turn, in seconds.

    On CUDA it reads events around the work. With ``cold`` the second-level cache is overwritten
    first, and the work is launched while that still goes on, so up to 0.1 ms of launching does not
    count. Without, the device is idle when the work is launched, so all launching counts.
    On the CPU it is ``time.perf_counter``.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cold = True
        self._elapsed = 0.0
        self._began: torch.cuda.Event | None = None
        self._waste: torch.Tensor | None = None

    def __call__(self) -> float:
        """Return the seconds of all work measured so far; every second call ends one."""
        if self.device.type != "cuda":
            return time.perf_counter()
        if self._began is None:
            self._flush()
            self._began = torch.cuda.Event(enable_timing=True)
            self._began.record()
            return self._elapsed
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        ended.synchronize()
        self._elapsed += self._began.elapsed_time(ended) / 1e3
        self._began = None
        return self._elapsed

    def abandon(self) -> None:
        """Forget a piece of work that failed before its end."""
        self._began = None

    def _flush(self) -> None:
        torch.cuda.synchronize()
        if not self.cold:
            return
        if self._waste is None:
            self._waste = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        self._waste.zero_()

    def seconds(self, work: Callable[[], object], rounds: int) -> list[float]:
        """Return the time of each of ``rounds`` calls of ``work``."""
        times = []
        for _ in range(rounds):
            began = self()
            work()
            times.append(self() - began)
        return times


def rounds_within(seconds: float, one: float, *, most: int, least: int) -> int:
    """Return how often work of ``one`` second fits into ``seconds``, in [least, most]."""
    return max(least, min(most, int(seconds / max(one, 1e-9))))


def spread(times: list[float]) -> tuple[float, float, float]:
    """Return the 20th percentile, the median and the 80th percentile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return fifths[0], statistics.median(times), fifths[3]


def copy_bandwidth(timer: DeviceTimer) -> float:
    """Return the bytes per second, read plus written, of a copy of 1 GiB on the device."""
    size = COPY_BYTES if timer.device.type == "cuda" else COPY_BYTES_ON_CPU
    source = torch.zeros(size, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    timer.seconds(lambda: target.copy_(source), 3)
    return 2 * size / statistics.median(timer.seconds(lambda: target.copy_(source), 20))
