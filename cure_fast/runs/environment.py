"""What a run ran on: versions, machine and commit, for the record of the run."""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import cure_fast
from cure_fast.errors import InputError
from cure_fast.runs.versions import PACKAGES, command_output, nvidia_driver, package_version


def environment() -> dict[str, Any]:
    """Return versions, processor, GPU, commit and command line as plain values."""
    gpu = torch.cuda.is_available()
    return {
        "cure_fast": cure_fast.__version__,
        "python": platform.python_version(),
        **{name: package_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "driver": nvidia_driver() if gpu else None,
        **commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": ["cure-fast", *sys.argv[1:]],
    }


def processor_name() -> str:
    """Return the processor's model name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> dict[str, Any]:
    """Return the commit of the checkout the package runs from, and whether it has changes."""
    root = str(Path(__file__).resolve().parent.parent)
    head = command_output("git", "-C", root, "rev-parse", "HEAD")
    changes = command_output("git", "-C", root, "status", "--porcelain")
    return {"commit": head, "dirty": None if head is None else bool(changes)}


def choose_device(name: str) -> torch.device:
    """Return the device that ``--device`` names.

    Raises:
        InputError: for a name that is none, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: expected cpu, cuda, cuda:N or auto, got {name!r}.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InputError(
                f"--device {name}: this machine has {count} usable GPUs. "
                "Take --device cpu, or see `cure-fast doctor`."
            )
    return device


def choose_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype that training computes in, ``None`` for float32."""
    if amp == "off" or (amp == "auto" and device.type == "cpu"):
        return None
    if amp == "bf16":
        return torch.bfloat16
    # From Ampere (8.0) on; torch also emulates it on older GPUs, slowly, and calls that support.
    native = amp == "auto" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float16
