"""What the GPU would run: kernels compiled ahead of time, as the operations launch them, no GPU.

    python tests/support/aot.py            a table of every kernel, for three generations of GPUs
    python tests/support/aot.py --json     the same as JSON
    python tests/support/aot.py --arch 90 --cases masked_sgd
    python tests/support/aot.py --some     what differs in kind, for one GPU; of the rest the types

Every operation is called on CPU tensors while its launches are recorded instead of run. Each is
then compiled as Triton's JIT would for those very arguments (it looks at the alignment of addresses
and at numbers that are 1 or multiples of 16), and the machine code is read with the disassembler
that Triton ships. Run it in a process of its own, without TRITON_INTERPRET: where that is set when
a kernel is defined, the kernel can only be interpreted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import linecache
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

# A100, H100 and H200, B200.
ARCHITECTURES = (80, 90, 100)
# Variants of a kernel differ by a few registers between GPUs, and compiling takes a second each.
VARIANTS_ARCH = (90,)
PROCESSES = 2

WIDE = 16  # bytes of the widest access of one thread

# One global access of a thread: what it does, elements, bits of each.
ACCESS = re.compile(r"\b(ld|st)\.(?:\w+\.)*?global(?:\.[\w:]+)*?(?:\.v(\d))?\.[busf](\d+)\b")
# Where it is in the source: line, and the calls that it is inlined through.
PLACE = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+[^\n]*?(?:@(\[.*\]))?$")
FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]+)"')
OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
USAGE = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")


@dataclass(frozen=True)
class Compiled:
    """Machine code of one kernel for one kind of arguments and one GPU.

    Attributes:
        case: the recorded call that launched it.
        kernel: name of the ``@triton.jit`` function.
        arch: compute capability, as in 90 for sm_90.
        signature: types of its arguments, constants as numbers.
        warps: per program.
        registers: per thread.
        shared: bytes of shared memory per program.
        stack: bytes of stack per thread; local memory is used where it is not 0.
        spills: instructions that read or write local memory.
        loads: global loads of 16 bytes per thread, and all of them; (0, 0) where not counted.
        stores: global stores of 16 bytes per thread, and all of them; (0, 0) where not counted.
        narrow: lines whose global accesses could be of 16 bytes, and never are.
        flushes: PTX instructions that take denormal numbers for 0.
        fused: PTX instructions that multiply and add with one rounding.
        error: why it cannot be compiled, and everything else is 0; None if it can.
        whole: whether there is machine code; without, types were found and everything else is 0.
    """

    case: str
    kernel: str
    arch: int
    signature: str
    warps: int
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    loads: tuple[int, int] = (0, 0)
    stores: tuple[int, int] = (0, 0)
    narrow: tuple[str, ...] = ()
    flushes: int = 0
    fused: int = 0
    error: str | None = None
    whole: bool = True


class TypesFoundError(Exception):
    """Ends a compilation whose kernel has passed Triton's own checks."""


class NoGpu:
    """What Triton's JIT asks of a driver before it compiles, answered without a GPU."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def record(cases: Mapping[str, Callable[[], object]]) -> list[tuple[str, Any]]:
    """Call every case; return its name and the launch, for each launch that it would have made."""
    from cure_fast.kernels import dispatch
    from cure_fast.kernels.device.launching import Launch

    launches: list[tuple[str, Any]] = []
    for name, call in cases.items():
        with (
            mock.patch.object(dispatch, "uses_triton", return_value=True),
            mock.patch.object(
                Launch, "run", lambda launch, name=name: launches.append((name, launch))
            ),
        ):
            call()
    return launches


def start_compiling(launch: Any, arch: int) -> Any:
    """Return what Triton makes of a recorded launch for a GPU."""
    from triton.runtime import driver

    driver.set_active(NoGpu(arch))
    launch.kernel.device_caches.clear()
    started: list[Any] = []

    def warm_up(*args: object, **options: object) -> None:
        started.append(launch.kernel.warmup(*args, grid=(launch.programs,), **options))

    # The launcher's own options, such as whether multiply-adds are fused.
    launch._start(warm_up)
    return started[0]


def check_types(case: str, launch: Any, arch: int) -> Compiled:
    """Let Triton find the types of all values, and make no machine code: a tenth of the time."""
    from triton.backends.nvidia.compiler import CUDABackend

    with (
        mock.patch.object(CUDABackend, "make_ttgir", side_effect=TypesFoundError),
        contextlib.suppress(TypesFoundError),
    ):
        start_compiling(launch, arch)
    name, signature = launch.kernel.fn.__name__, named(launch.constants)
    return Compiled(case, name, arch, signature, launch.warps, whole=False)


def compile_launch(
    case: str, launch: Any, arch: int, instructions: Collection[str] | None = None
) -> Compiled:
    """Compile a recorded launch for a GPU, and read its machine code.

    To read instructions takes a second. They are read of the kernels that ``instructions`` names,
    None for all, and of those that use local memory.
    """
    compiled = start_compiling(launch, arch)
    name = launch.kernel.fn.__name__
    named_too = instructions is None or name in instructions
    usage, opcodes = disassemble(compiled.asm["cubin"], always=named_too)
    ptx = compiled.asm["ptx"]
    return Compiled(
        case=case,
        kernel=name,
        arch=arch,
        signature=f"{', '.join(compiled.src.signature.values())}, {named(launch.constants)}",
        warps=compiled.metadata.num_warps,
        registers=usage["REG"],
        shared=compiled.metadata.shared,
        stack=usage["STACK"] + usage["LOCAL"],
        spills=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        loads=wide_and_all("LDG", opcodes),
        stores=wide_and_all("STG", opcodes),
        narrow=narrow_lines(ptx),
        flushes=len(re.findall(r"\.ftz\b", ptx)),
        fused=len(re.findall(r"^\s*fma\.", ptx, re.MULTILINE)),
    )


def named(constants: Mapping[str, object]) -> str:
    """Return constants as text."""
    return ", ".join(f"{name}={value}" for name, value in constants.items())


def disassemble(cubin: bytes, *, always: bool) -> tuple[dict[str, int], list[str]]:
    """Return what a kernel uses, and its instructions: always, or if it uses local memory."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = output(tools / "cuobjdump", "-res-usage", file.name)
        usage = {name: int(number) for name, number in USAGE.findall(text)}
        # What has neither a stack nor local memory has no instruction that accesses it.
        wanted = always or usage["STACK"] or usage["LOCAL"]
        code = output(tools / "nvdisasm", "-c", file.name) if wanted else ""
    return usage, OPCODE.findall(code)


def output(*words: object) -> str:
    return subprocess.run([*map(str, words)], check=True, capture_output=True, text=True).stdout


def wide_and_all(name: str, opcodes: Sequence[str]) -> tuple[int, int]:
    """Return how many accesses of that name are of 16 bytes, and how many there are in all."""
    parts = [opcode.split(".") for opcode in opcodes]
    matching = [part for part in parts if part[0] == name]
    return sum("128" in part for part in matching), len(matching)


def narrow_lines(ptx: str) -> tuple[str, ...]:
    """Return the lines of source that access 16 neighbouring bytes or more, but never in one piece.

    A line counts as wide if one of the places that it is inlined at has a wide access: the branch
    for the whole chunks, while that for a tensor's end goes element by element.
    """
    files = {number: path for number, path in FILE.findall(ptx)}
    line, calls = ("", 0), ""
    widest: dict[tuple[str, int], int] = {}
    moved: dict[tuple[str, int], dict[str, tuple[int, int]]] = {}
    for text in ptx.splitlines():
        if place := PLACE.search(text):
            line, calls = (files[place[1]], int(place[2])), place[3] or ""
        elif access := ACCESS.search(text):
            count, size = int(access[2] or 1), int(access[3]) // 8
            widest[line] = max(widest.get(line, 0), count * size)
            before = moved.setdefault(line, {}).get(calls, (0, 0))
            moved[line][calls] = (before[0] + count, before[1] + count * size)
    # A few numbers of 8 bytes are scalars: no block has fewer than 4 elements per thread.
    blocks = (
        line
        for line, places in moved.items()
        if any(count >= 4 and size >= WIDE for count, size in places.values())
    )
    return tuple(
        f"{Path(path).name}:{number}: {linecache.getline(path, number).strip()}"
        for path, number in sorted(line for line in blocks if widest[line] < WIDE)
    )


# A case, the launch recorded in it, the GPU to compile it for, and whether into machine code.
Task = tuple[str, Any, int, bool]


def unlike(tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks without those that are compiled to the code of an earlier one."""
    kinds: dict[object, Task] = {}
    for task in tasks:
        _, launch, arch, _ = task
        args = tuple(
            (arg.dtype, arg.data_ptr() % 16 == 0) if hasattr(arg, "data_ptr") else arg
            for arg in launch.args
        )
        constants = tuple(map(str, launch.constants.items()))
        key = (launch.kernel.fn.__qualname__, args, constants, launch.warps, arch)
        kinds.setdefault(key, task)
    return list(kinds.values())


def compile_all(
    tasks: Sequence[Task], instructions: Collection[str] | None = None
) -> list[Compiled]:
    """Compile in two processes, into a cache that is thrown away afterwards."""
    tasks = unlike(tasks)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        # Forked processes inherit the tasks: a launch cannot be pickled.
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        workers = [
            context.Process(
                target=compile_share, args=(tasks[first::PROCESSES], instructions, queue)
            )
            for first in range(PROCESSES)
        ]
        for worker in workers:
            worker.start()
        shares = [queue.get() for _ in workers]
        for worker in workers:
            worker.join()
    return sorted(
        (compiled for share in shares for compiled in share),
        key=lambda c: (c.case, c.kernel, c.signature, c.arch),
    )


def compile_share(tasks: Sequence[Task], instructions: Collection[str] | None, queue: Any) -> None:
    """Compile some of the tasks; send what came out."""
    queue.put([compile_or_say(*task, instructions) for task in tasks])


def compile_or_say(
    case: str, launch: Any, arch: int, whole: bool, instructions: Collection[str] | None
) -> Compiled:
    """Compile a launch; one that cannot be compiled is told by its innermost reason."""
    try:
        if not whole:
            return check_types(case, launch, arch)
        return compile_launch(case, launch, arch, instructions)
    except Exception as error:
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        said = getattr(error, "stderr", None) or ""
        signature = named(launch.constants)
        name = launch.kernel.fn.__name__
        return Compiled(case, name, arch, signature, launch.warps, error=f"{reason}{said}")


def table(kernels: Sequence[Compiled]) -> str:
    """Return the kernels as aligned columns."""
    names = [field.name for field in fields(Compiled) if field.name != "signature"] + ["signature"]
    cells = [names, *([shown(getattr(kernel, name)) for name in names] for kernel in kernels)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def shown(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    # The text of a narrow line is too long for a column; JSON has it.
    return "/".join(str(part).split(": ")[0] for part in value) or "-"


def in_own_process(*words: str, root: Path) -> list[Compiled]:
    """Run this file as a script on the kernels of the checkout at ``root``."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--json", *words],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{__file__} {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return [
        Compiled(**record | {name: tuple(record[name]) for name in ("loads", "stores", "narrow")})
        for record in json.loads(done.stdout)
    ]


def tasks_of(name: str, arguments: argparse.Namespace) -> list[Task]:
    """Return what is asked for of a module's cases."""
    module = importlib.import_module(name)
    variants = getattr(module, "VARIANTS", {})
    chosen = {n: call for n, call in (module.CASES | variants).items() if arguments.cases in n}
    tasks: list[Task] = []
    for case, launch in record(chosen):
        one = case in variants and not arguments.all
        some = arguments.some and case not in module.ON_EACH_GPU
        archs = VARIANTS_ARCH if one or some else arguments.arch
        whole = not some or case in module.CASES or case in module.KINDS
        tasks += [(case, launch, arch, whole) for arch in archs]
    # Where two are alike, the one that is compiled whole stays.
    return sorted(tasks, key=lambda task: not task[3])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel ahead of time.")
    parser.add_argument("--json", action="store_true", help="write JSON instead of a table")
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        default=ARCHITECTURES,
        help="compute capabilities (80 90 100)",
    )
    parser.add_argument("--cases", default="", help="only cases whose name contains this text")
    parser.add_argument(
        "--modules",
        nargs="+",
        default=["aot_cases"],
        help="modules next to this file with dictionaries CASES and VARIANTS of calls by name",
    )
    parser.add_argument(
        "--instructions",
        nargs="+",
        metavar="KERNEL",
        help="kernels whose loads and stores are counted in machine code; all if left out",
    )
    parser.add_argument(
        "--all", action="store_true", help="compile the variants for every GPU, not for one"
    )
    parser.add_argument(
        "--some",
        action="store_true",
        help="machine code of what differs in kind alone, and of the rest the types",
    )
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, so that kernels are not compiled; unset it")
    tasks = [task for name in arguments.modules for task in tasks_of(name, arguments)]
    kernels = compile_all(tasks, arguments.instructions)
    print(json.dumps([asdict(kernel) for kernel in kernels]) if arguments.json else table(kernels))


if __name__ == "__main__":
    main()
