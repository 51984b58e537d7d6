"""Shared by all tests: fixed seeds, the markers' reasons to skip, and the real images."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Read when torch is loaded. One thread for tiny tensors, and as many in each process of a test: the
# number decides the last bits of what runs are compared by.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As the Makefile has it: threads that wait for long by spinning take the cores from other tests.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
UNPACK = ROOT.parent / "shared" / "data" / "unpack.py"

# Read when ONNX Runtime is imported, which otherwise logs its use in the home folder.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


# The gate gives the same answer each time, also on a machine so busy that an example takes seconds.
hypothesis.settings.register_profile("gate", derandomize=True, deadline=None)
hypothesis.settings.load_profile("gate")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests of more than a minute")


def pytest_configure(config: pytest.Config) -> None:
    # Read when a kernel is defined, so it is set before any test imports one.
    if are_interpreted(config.option.markexpr, on_gpu=torch.cuda.is_available()):
        os.environ.setdefault("TRITON_INTERPRET", "1")


def are_interpreted(markexpr: str, *, on_gpu: bool) -> bool:
    """Return whether kernels run in Triton's interpreter: wherever GPU tests are not asked for.

    A process has one choice for all kernels, and most tests run kernels on CPU tensors.
    """
    return not on_gpu or "gpu" not in markexpr or "not gpu" in markexpr


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("takes more than a minute; run with --slow")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, and torch finds none")
    if item.get_closest_marker("gpu") and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted here: run `make bench-kernels`, or pytest -m gpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def disk_trusted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no disk: what only a loss of power would tell apart. Tests of saving do wait."""
    if "faults" not in request.path.parts:
        monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute on one thread: to wait for a second costs more than tiny layers themselves."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture(autouse=True)
def real_data(request: pytest.FixtureRequest) -> None:
    if marker := request.node.get_closest_marker("real_data"):
        request.getfixturevalue(f"{marker.kwargs.get('data', 'cifar10')}_root")


@pytest.fixture(scope="session")
def cifar10_root(pytestconfig: pytest.Config) -> Path:
    """Folder that torchvision accepts as the root of the real CIFAR-10.

    The folder named by CURE_FAST_TEST_DATA (a wrong one is an error), else data/ of the checkout,
    else the images that ../shared/data/unpack.py writes, kept in pytest's cache.
    """
    named = os.environ.get("CURE_FAST_TEST_DATA")
    if named:
        if not holds_cifar10(Path(named)):
            pytest.fail(f"CURE_FAST_TEST_DATA={named} does not hold CIFAR-10 as torchvision has it")
        return Path(named)
    if holds_cifar10(ROOT / "data"):
        return ROOT / "data"
    if not UNPACK.is_file():
        pytest.skip("the real CIFAR-10 is absent: set CURE_FAST_TEST_DATA, or put it into data/")
    return unpacked_cifar10(pytestconfig.rootpath / ".pytest_cache" / "cifar10")


@pytest.fixture(scope="session")
def cifar100_root() -> Path:
    """Folder with the real CIFAR-100 as a tree of images, train/<class>/ and test/<class>/.

    It is cifar-100-folder below the folder named by CURE_FAST_TEST_DATA, or data/ of the checkout.
    It takes minutes to write 60,000 files, so that is not done here.
    """
    root = Path(os.environ.get("CURE_FAST_TEST_DATA", ROOT / "data")) / "cifar-100-folder"
    if not root.is_dir():
        pytest.skip(f"the real CIFAR-100 is absent: there is no {root} (shared/data/unpack.py)")
    return root


def holds_cifar10(root: Path) -> bool:
    from torchvision.datasets import CIFAR10

    try:
        CIFAR10(str(root), train=False, download=False)
    except RuntimeError:  # torchvision's answer to absent files and to a wrong checksum
        return False
    return True


def unpacked_cifar10(root: Path) -> Path:
    """Unpack CIFAR-10 into ``root`` once; a half-written folder is never taken for a whole one."""
    if not holds_cifar10(root):
        partial = root.with_name(f"{root.name}.{os.getpid()}")
        subprocess.run([sys.executable, str(UNPACK), "cifar10", str(partial)], check=True)
        shutil.rmtree(root, ignore_errors=True)
        partial.rename(root)
        assert holds_cifar10(root)
    return root
