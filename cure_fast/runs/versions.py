"""Versions of packages and the GPU's driver, found without importing them."""

from __future__ import annotations

import importlib.metadata
import subprocess

# What is shown with its version.
PACKAGES = ("torch", "torchvision", "triton", "numpy", "ffcv", "pyautoattack")


def package_version(name: str) -> str | None:
    """Return the installed version of a distribution, or ``None``."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def command_output(*command: str) -> str | None:
    """Return what a command prints, or ``None`` where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def nvidia_driver() -> str | None:
    """Return the NVIDIA driver's version, or ``None`` where no driver or no GPU answers."""
    query = ("--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return command_output("nvidia-smi", *query) or None
