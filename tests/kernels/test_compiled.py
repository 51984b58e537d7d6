"""Every kernel as a GPU would run it: few registers, no spills, wide accesses, exact arithmetic.

The kernels are compiled ahead of time; no GPU is needed. In every run that is for one GPU, a few
for each of three generations, and of most variants Triton finds the types alone; all of them are
compiled for all with --slow. See ``python tests/support/aot.py`` for the figures.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import aot
from aot import Compiled

ROOT = Path(__file__).resolve().parents[2]
DEVICE = ROOT / "kernels" / "device"
# With more, fewer than 5 of 8 possible groups of 4 warps fit on a multiprocessor.
MOST_REGISTERS = 96

# Compiling is slow on a machine with other work on it.
pytestmark = pytest.mark.timeout(900)

# Kernels, and text of their lines, that cannot use 16-byte accesses or need not, and why.
NARROW = {
    ("softmax_losses_kernel", ""): "few kilobytes a batch, and rows of 10 numbers are not aligned",
    ("_interpolate_kernel", "key_of(tl.load("): "not launched in training",
    ("step_linf_kernel", "tl.load(value + image)"): "gathers a number per image",
}
# Kernels with approximate functions, whose tests have tolerances: exponential, logarithm, cosine.
# These round denormal numbers to 0, and are made of fused multiply-adds.
APPROXIMATE = {"softmax_losses_kernel", "init_linf_kernel", "init_l2_kernel"}
# Kernels whose wide accesses are counted in machine code as well; the others' are seen in PTX.
COUNTED = ("_mask_kernel", "loaded_offset_kernel")
# Kernels that fuse on purpose, as torch's foreach optimizers do on a GPU.
FUSED = {"_update_kernel"}


def launched_kernels() -> dict[str, str]:
    """Return the file of each kernel that is launched: by our convention their names end so."""
    found: dict[str, str] = {}
    for path in sorted(DEVICE.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert node.name not in found, f"two kernels are called {node.name}"
                found[node.name] = path.name
    return found


KERNELS = launched_kernels()
each_kernel = pytest.mark.parametrize("kernel", sorted(KERNELS))
# Kernels that are compiled for each GPU in every run; the others for one, and for each with --slow.
ON_EACH_GPU = {"_update_kernel", "step_l2_kernel"}
each_kernel_and_arch = pytest.mark.parametrize(
    ("kernel", "arch"),
    [
        pytest.param(
            kernel,
            arch,
            marks=() if arch in aot.VARIANTS_ARCH or kernel in ON_EACH_GPU else pytest.mark.slow,
        )
        for kernel in sorted(KERNELS)
        for arch in aot.ARCHITECTURES
    ],
)


@pytest.fixture(scope="module")
def everything(pytestconfig: pytest.Config) -> list[Compiled]:
    words = ["--modules", "aot_cases", "bad_kernels", "--instructions", *COUNTED]
    some = () if pytestconfig.getoption("--slow") else ("--some",)
    return aot.in_own_process(*words, *some, root=ROOT)


@pytest.fixture(scope="module")
def called(everything: list[Compiled]) -> list[Compiled]:
    return [kernel for kernel in everything if not kernel.case.startswith("bad ")]


@pytest.fixture(scope="module")
def compiled(called: list[Compiled]) -> list[Compiled]:
    return [kernel for kernel in called if kernel.whole]


@pytest.fixture(scope="module")
def bad(everything: list[Compiled]) -> dict[str, list[Compiled]]:
    cases = {kernel.case for kernel in everything if kernel.case.startswith("bad ")}
    return {case: [kernel for kernel in everything if kernel.case == case] for case in cases}


def of(compiled: list[Compiled], kernel: str, arch: int) -> list[Compiled]:
    found = [one for one in compiled if (one.kernel, one.arch) == (kernel, arch)]
    assert found, f"no case in tests/support/aot_cases.py launches {kernel}"
    return found


def described(kernels: list[Compiled]) -> str:
    return "\n" + aot.table(kernels)


def failing(kernels: list[Compiled]) -> list[str]:
    return [f"{kernel.case}: {kernel.error}" for kernel in kernels if kernel.error is not None]


def spilling(kernels: list[Compiled]) -> list[Compiled]:
    return [kernel for kernel in kernels if kernel.spills or kernel.stack]


def crowded(kernels: list[Compiled]) -> list[Compiled]:
    return [kernel for kernel in kernels if kernel.registers > MOST_REGISTERS]


def fusing(kernels: list[Compiled]) -> list[Compiled]:
    return [kernel for kernel in kernels if kernel.fused]


def flushing(kernels: list[Compiled]) -> list[Compiled]:
    return [kernel for kernel in kernels if kernel.flushes]


def narrow(kernels: list[Compiled]) -> set[str]:
    """Return the lines that miss 16-byte accesses, but for those of unaligned tensors."""
    return {
        line
        for kernel in kernels
        if "unaligned" not in kernel.case
        for line in kernel.narrow
        if not any(name == kernel.kernel and text in line for name, text in NARROW)
    }


def test_the_cases_launch_every_kernel(compiled: list[Compiled]) -> None:
    assert {kernel.kernel for kernel in compiled} == set(KERNELS)


@each_kernel
def test_it_compiles_for_all_kinds_of_arguments(called: list[Compiled], kernel: str) -> None:
    failures = failing([one for one in called if one.kernel == kernel])
    assert not failures, "\n\n".join(failures)


@each_kernel_and_arch
def test_nothing_is_kept_in_local_memory(compiled: list[Compiled], kernel: str, arch: int) -> None:
    bad = spilling(of(compiled, kernel, arch))
    assert not bad, described(bad)


@each_kernel_and_arch
def test_registers_leave_room_for_other_programs(
    compiled: list[Compiled], kernel: str, arch: int
) -> None:
    bad = crowded(of(compiled, kernel, arch))
    assert not bad, described(bad)


@each_kernel_and_arch
def test_blocks_move_16_bytes_at_a_time(compiled: list[Compiled], kernel: str, arch: int) -> None:
    assert not narrow(of(compiled, kernel, arch))


@pytest.mark.parametrize("kernel", sorted(set(KERNELS) - APPROXIMATE - FUSED))
def test_multiply_and_add_round_twice(compiled: list[Compiled], kernel: str) -> None:
    bad = fusing([one for one in compiled if one.kernel == kernel])
    assert not bad, described(bad)


@pytest.mark.parametrize("kernel", sorted(set(KERNELS) - APPROXIMATE))
def test_denormal_numbers_keep_their_values(compiled: list[Compiled], kernel: str) -> None:
    bad = flushing([one for one in compiled if one.kernel == kernel])
    assert not bad, described(bad)


def test_every_excuse_is_needed(compiled: list[Compiled]) -> None:
    lines = {(kernel.kernel, line) for kernel in compiled for line in kernel.narrow}
    for name, text in NARROW:
        assert any(kernel == name and text in line for kernel, line in lines), (name, text)
    assert {kernel.kernel for kernel in flushing(compiled)} == APPROXIMATE
    assert {kernel.kernel for kernel in fusing(compiled)} == APPROXIMATE | FUSED


def test_wide_accesses_are_in_the_machine_code_too(compiled: list[Compiled]) -> None:
    """The assembler could split what the compiler wrote as one access."""
    kernels = [kernel for kernel in compiled if kernel.kernel == "_mask_kernel"]
    assert kernels
    assert all(min(kernel.loads[0], kernel.stores[0]) >= 2 for kernel in kernels)


def test_an_offset_that_is_not_provably_aligned_is_seen(bad: dict[str, list[Compiled]]) -> None:
    for kernel in bad["bad offset"]:
        assert kernel.loads[1] and kernel.stores[1]
        assert [line.split(": ")[1][:8] for line in narrow([kernel])] == ["tl.store"]
        assert kernel.loads[0] == kernel.stores[0] == 0


def test_a_block_that_is_too_large_is_seen(bad: dict[str, list[Compiled]]) -> None:
    kernels = bad["bad block"]
    assert spilling(kernels) == crowded(kernels) == kernels


def test_a_kernel_that_does_not_compile_is_seen(bad: dict[str, list[Compiled]]) -> None:
    (failure,) = failing(bad["bad types"])
    assert "Inconsistent return types" in failure


def test_inexact_arithmetic_is_seen(bad: dict[str, list[Compiled]]) -> None:
    kernels = bad["bad rounding"]
    assert fusing(kernels) == flushing(kernels) == kernels
