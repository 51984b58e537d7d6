"""What a run ran on: versions, machine and commit, for the record of the run."""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import cure_fast
from cure_fast.console import warn
from cure_fast.errors import InputError
from cure_fast.runs.versions import PACKAGES, command_output, nvidia_driver, package_version

CPUINFO = Path("/proc/cpuinfo")
# What processors are said to have that multiply in bfloat16: x86's, ARM's.
BF16 = {"avx512_bf16", "amx_bf16", "bf16"}


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


def processor() -> dict[str, str]:
    """Return what Linux tells of the first processor, by its words; elsewhere nothing."""
    if not CPUINFO.exists():
        return {}
    first = CPUINFO.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def processor_name() -> str:
    """Return the processor's model name where the system tells it."""
    return processor().get("model name") or platform.processor() or platform.machine()


def multiplies_bf16() -> bool | None:
    """Return whether the processor has instructions for bfloat16, None where nothing tells."""
    told = processor()
    flags = f"{told.get('flags', '')} {told.get('Features', '')}".split()  # of x86, of ARM
    return not BF16.isdisjoint(flags) if flags else None


def warn_of_emulation(amp: str, device: torch.device) -> None:
    """Print a warning where bf16 is asked of a processor that has no instructions for it."""
    if amp == "bf16" and device.type == "cpu" and multiplies_bf16() is False:
        warn(
            "--amp bf16: this processor has no instructions for it, and takes 2 to 10 times as "
            "long as for float32; leave --amp out"
        )


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


def precision(amp: str, device: torch.device) -> str:
    """Return the name of the dtype that training computes in, such as ``float32``."""
    return str(choose_dtype(amp, device) or torch.float32).removeprefix("torch.")


def choose_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype that training computes in, ``None`` for float32."""
    if amp == "off" or (amp == "auto" and device.type == "cpu"):
        return None
    if amp == "bf16":
        return torch.bfloat16
    # From Ampere (8.0) on; torch also emulates it on older GPUs, slowly, and calls that support.
    native = amp == "auto" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float16
