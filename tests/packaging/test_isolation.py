"""Importing the packages takes no foreign names, and the kernels need nothing but torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

IMPORT_ALL = """
import importlib, pkgutil, sys
import cure_fast
names = [m.name for m in pkgutil.walk_packages(cure_fast.__path__, "cure_fast.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
assert {"cure_fast.kernels", "cure_fast.loaders"} <= set(names), names
print(sorted({"kernels", "loaders"} & set(sys.modules)))
"""

# Everything installed is blocked but torch and what torch's own metadata requires. NumPy is blocked
# before torch is imported, which says so on the standard error.
KERNELS_ALONE = """
import importlib.abc, importlib.metadata, re, sys

class Block(importlib.abc.MetaPathFinder):
    blocked = {"numpy"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import torch

def closure(name, found):
    found.add(name)
    for requirement in importlib.metadata.requires(name) or ():
        needed = re.match(r"[\\w.-]+", requirement)[0].lower()
        if "extra ==" not in requirement and needed not in found:
            try:
                closure(needed, found)
            except importlib.metadata.PackageNotFoundError:
                continue
    return found

def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()

kept = {plain(n) for n in closure("torch", {"cure-fast"})} - {"triton"}
blocked = {
    module
    for module, owners in importlib.metadata.packages_distributions().items()
    if not {plain(owner) for owner in owners} & kept
}
assert {"numpy", "cyclopts", "rich", "torchvision", "triton"} <= blocked, blocked
blocked.add("ffcv")
Block.blocked = blocked
for name in [n for n in sys.modules if n.partition(".")[0] in blocked]:
    del sys.modules[name]
from cure_fast.kernels import TensorList, rgp_mask_
grad = torch.tensor([1.0, 2.0, 3.0])
kept_fraction = rgp_mask_([grad], [grad.clone()], [grad.clone()], percentile=50, alpha=0.5)
(group,) = TensorList([grad, grad]).plan(chunk=2).groups
print(grad.tolist(), [round(f, 4) for f in kept_fraction.tolist()], group.chunks.tolist())
"""


def run(program: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("place", ["root", pytest.param("elsewhere", marks=pytest.mark.slow)])
def test_bare_names_stay_free(place: str, tmp_path: Path) -> None:
    assert run(IMPORT_ALL, ROOT if place == "root" else tmp_path) == "[]"


def test_importing_the_package_does_not_import_torch(tmp_path: Path) -> None:
    modules = "sys, cure_fast, cure_fast.config, cure_fast.cli.doctor"
    program = f"import {modules}; print('torch' in sys.modules)"
    assert run(program, tmp_path) == "False"


def test_kernels_need_only_torch(tmp_path: Path) -> None:
    chunks = [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert run(KERNELS_ALONE, tmp_path) == f"[0.0, 2.0, 3.0] [0.6667] {chunks}"
