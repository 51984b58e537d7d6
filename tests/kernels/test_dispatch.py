"""Who computes: the device, CURE_FAST_KERNELS, and what happens where a kernel cannot."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from triton.compiler.errors import CompilationError

from cure_fast import kernels
from cure_fast.kernels import dispatch, ema_update_, rgp_mask_
from cure_fast.kernels.device import launching, select
from cure_fast.kernels.rgp import rgp_mask_ref

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = {
    name: operation
    for name, operation in vars(kernels).items()
    if name in kernels.__all__ and inspect.isfunction(operation) and name != "rgp_score"
}


def reference_of(operation):
    module = sys.modules[operation.__module__]
    return getattr(module, operation.__name__.removesuffix("_") + "_ref")


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_a_reference_takes_what_its_operation_takes(name):
    operation = OPERATIONS[name]
    assert inspect.signature(operation) == inspect.signature(reference_of(operation))


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_every_operation_has_a_launcher_of_the_same_parameters(name):
    operation = OPERATIONS[name]
    launchers = [
        vars(module)[operation.__name__.removesuffix("_")]
        for path in sorted((ROOT / "kernels" / "device").glob("*.py"))
        if path.stem not in ("__init__", "launching")
        for module in [__import__(f"cure_fast.kernels.device.{path.stem}", fromlist=["x"])]
        if operation.__name__.removesuffix("_") in vars(module)
        and vars(module)[operation.__name__.removesuffix("_")].__module__ == module.__name__
    ]
    assert len(launchers) == 1
    assert [*inspect.signature(launchers[0]).parameters] == [
        *inspect.signature(operation).parameters
    ]


def test_the_cpu_takes_the_reference_and_a_gpu_the_kernel(monkeypatch):
    monkeypatch.delenv("CURE_FAST_KERNELS", raising=False)
    assert not dispatch.uses_triton(torch.device("cpu"))
    assert dispatch.uses_triton(torch.device("cuda"))


def test_a_choice_can_be_forced(monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", "reference")
    assert not dispatch.uses_triton(torch.device("cuda"))
    monkeypatch.setenv("CURE_FAST_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.uses_triton(torch.device("cpu"))


def test_a_forced_choice_that_cannot_run_says_so(monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1, or move the tensors to CUDA"):
        ema_update_([torch.ones(1)], [torch.ones(1)], decay=0.5)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        dispatch.uses_triton(torch.device("cuda"))
    monkeypatch.setenv("CURE_FAST_KERNELS", "auto")
    assert not dispatch.uses_triton(torch.device("cuda"))


def test_an_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", "cuda")
    with pytest.raises(ValueError, match="CURE_FAST_KERNELS: expected one of auto, triton, ref"):
        rgp_mask_([], [], [], percentile=30, alpha=0.1)


@pytest.fixture
def broken_compiler(monkeypatch):
    """Let CPU tensors take the kernels as CUDA's would, and every compilation fail."""
    tries = []

    def fail(self, kernel):
        tries.append(self.kernel)
        raise CompilationError("", None, "register allocation failed")

    monkeypatch.setenv("CURE_FAST_KERNELS", "auto")
    monkeypatch.setattr(dispatch, "uses_triton", lambda device: True)
    monkeypatch.setattr(launching.Launch, "_start", fail)
    monkeypatch.setattr(dispatch, "_failed", set())
    return tries


def test_a_kernel_that_does_not_compile_gives_way_once_and_says_so(broken_compiler):
    nat, adv = torch.randn(50), torch.randn(50)
    grads = [torch.ones(50) for _ in range(3)]
    arguments = {"percentile": 30, "alpha": 0.1}
    with pytest.warns(RuntimeWarning, match=r"kernel of rgp_mask cannot run here.*Compilation"):
        first = rgp_mask_([grads[0]], [nat], [adv], **arguments)
    tries = len(broken_compiler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = rgp_mask_([grads[1]], [nat], [adv], **arguments)
    assert len(broken_compiler) == tries == 1
    expected = rgp_mask_ref([grads[2]], [nat], [adv], **arguments)
    assert torch.equal(first, expected) and torch.equal(second, expected)
    assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[2])


def test_a_forced_kernel_that_does_not_compile_is_an_error(broken_compiler, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", "triton")
    with pytest.raises(dispatch.KernelUnavailable, match="CompilationError"):
        rgp_mask_([torch.ones(5)], [torch.ones(5)], [torch.ones(5)], percentile=30, alpha=0.1)


def test_a_fault_of_the_device_does_not_pass_for_a_compile_failure(broken_compiler, monkeypatch):
    def fail(self, kernel):
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(launching.Launch, "_start", fail)
    with pytest.raises(RuntimeError, match="misaligned"):
        ema_update_([torch.ones(1)], [torch.ones(1)], decay=0.5)


def test_a_later_launch_that_fails_is_an_error_as_tensors_have_changed(monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", "triton")
    start, launches = launching.Launch._start, []

    def fail_second(self, kernel):
        launches.append(self)
        if len(launches) == 2:
            raise CompilationError("", None, "no registers")
        start(self, kernel)

    monkeypatch.setattr(launching.Launch, "_start", fail_second)
    averages = [torch.zeros(2), torch.zeros(2).half()]
    with pytest.raises(RuntimeError, match="launch 2 of 2 failed after"):
        ema_update_(averages, [torch.ones(2), torch.ones(2)], decay=0.5)
    assert averages[0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("failing", [2, 3, 4])
def test_a_later_launch_of_the_selection_gives_way_as_nothing_has_changed(failing, monkeypatch):
    """Launch 4 is the first that changes a gradient."""
    start, launches = launching.Launch._start, []

    def fail(self, kernel):
        launches.append(self)
        if len(launches) == failing:
            raise CompilationError("", None, "no registers")
        start(self, kernel)

    monkeypatch.setenv("CURE_FAST_KERNELS", "auto")
    monkeypatch.setattr(dispatch, "uses_triton", lambda device: True)
    monkeypatch.setattr(launching.Launch, "_start", fail)
    monkeypatch.setattr(dispatch, "_failed", set())
    nat, adv, grad = torch.rand(3, 50).unbind()
    wanted = grad.clone()
    rgp_mask_ref([wanted], [nat], [adv], percentile=30, alpha=0.1)
    with pytest.warns(RuntimeWarning, match="kernel of rgp_mask cannot run here"):
        rgp_mask_([grad], [nat], [adv], percentile=30, alpha=0.1)
    assert torch.equal(grad, wanted) and len(launches) == failing


def test_importing_needs_no_triton_and_starts_nothing():
    program = (
        "import sys; from cure_fast.kernels import RGP, rgp_mask_, ema_update_, pgd_step_\n"
        "import torch; p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "RGP([('p', p)], percentile=50, alpha=0.1).mask_([p.detach()], [p.detach()])\n"
        "assert not torch.cuda.is_initialized()\n"
        "print([m for m in ('triton', 'ffcv', 'cure_fast.training.trainer') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={name: v for name, v in os.environ.items() if not name.startswith("TRITON")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("markexpr", "on_gpu", "interpreted"),
    [
        ("", False, True),
        ("gpu", False, True),
        ("", True, True),
        ("not gpu", True, True),
        ("slow", True, True),
        ("gpu", True, False),
        ("gpu and not slow", True, False),
    ],
)
def test_tests_interpret_kernels_unless_gpu_tests_are_asked_for(
    markexpr, on_gpu, interpreted, pytestconfig
):
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    assert conftest.are_interpreted(markexpr, on_gpu=on_gpu) == interpreted


def test_kernels_are_launched_in_one_place():
    for path in (ROOT / "kernels" / "device").glob("*.py"):
        if path.stem != "launching":
            assert "_kernel[" not in path.read_text(), path
    assert callable(select.select_in)
