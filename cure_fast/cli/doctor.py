"""What this machine offers to training: versions, processor, GPU, Triton, FFCV; and what it lacks.

Only the standard library is imported at the top, so that the answer also comes where torch is
absent or broken. FFCV and Triton are tried in child processes with a time limit: a broken build
of either can crash or hang the process that imports it.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import cure_fast
from cure_fast.errors import InputError
from cure_fast.runs.versions import package_version

PACKAGES = ("torch", "torchvision", "triton", "numpy", "ffcv", "pyautoattack")
# Import names of what training and its report need; FFCV is an extra, Triton comes with torch.
NEEDED = (
    "torch",
    "torchvision",
    "numpy",
    "safetensors",
    "sklearn",
    "tyro",
    "rich",
    "pyautoattack",
)
# Receivers of a run's numbers; training goes on without them.
RECEIVERS = {"tensorboard": "--tensorboard", "wandb": "--wandb"}
PROBE_SECONDS = 120
SMALL_SHM = 256 * 2**20

FFCV_PROBE = """
import sys, tempfile
import numpy as np
from ffcv.fields import IntField, NDArrayField
from ffcv.fields.decoders import IntDecoder, NDArrayDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.writer import DatasetWriter

class Images:
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return np.full((2, 3), 10 * index, np.uint8), index

with tempfile.TemporaryDirectory() as folder:
    path = folder + "/probe.beton"
    fields = {"x": NDArrayField(np.dtype("uint8"), (2, 3)), "y": IntField()}
    DatasetWriter(path, fields, num_workers=1).from_indexed_dataset(Images())
    pipelines = {"x": [NDArrayDecoder()], "y": [IntDecoder()]}
    loader = Loader(path, batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL,
                    pipelines=pipelines, drop_last=False)
    read = [(x.tolist(), y.ravel().tolist()) for x, y in loader]
expected = [([[[10 * i] * 3] * 2 for i in range(4)], [0, 1, 2, 3])]
if read != expected:
    sys.exit(f"a file written and read back differs: {read}")
"""

TRITON_PROBE = """
import torch, triton
import triton.language as tl

@triton.jit
def add_one(x, count, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < count
    tl.store(x + offsets, tl.load(x + offsets, mask=mask) + 1, mask=mask)

x = torch.arange(5, device="cuda", dtype=torch.float32)
add_one[(1,)](x, 5, BLOCK=8)
if x.tolist() != [1, 2, 3, 4, 5]:
    raise SystemExit(f"a compiled kernel gave {x.tolist()}")
"""


@dataclass(frozen=True)
class Ffcv:
    """State of FFCV: whether it works, what was seen, and the command that mends it (or "")."""

    works: bool
    detail: str
    mend: str


@dataclass(frozen=True)
class Gpus:
    """GPUs that torch can use, one line each; why there is none; what stops training on them."""

    lines: tuple[str, ...] = ()
    absence: str = "none"
    problem: str = ""


@dataclass(frozen=True)
class Report:
    """All findings: rows of (name, value), what stops training, and FFCV's state."""

    rows: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]
    ffcv: Ffcv
    gpus: Gpus

    @property
    def verdict(self) -> str:
        """One line: whether training can run, and on what."""
        if self.problems:
            return f"Not ready: {'; '.join(self.problems)}."
        place = "on the GPU" if self.gpus.lines else f"on the CPU ({usable_cores()} cores)"
        feed = "with FFCV" if self.ffcv.works else "without FFCV, which is optional"
        return f"Ready: training can run {place}, {feed}."


def doctor() -> int:
    """Print the report; return 0 if training can run and 2 (the code of bad input) if not."""
    report = examine()
    width = max(len(name) for name, _ in report.rows) + 2
    for name, value in report.rows:
        print(f"{name:<{width}}{value}")
    if report.ffcv.mend:
        print(f"\nTo install FFCV:\n{report.ffcv.mend}")
    print(f"\n{report.verdict}")
    return InputError.code if report.problems else 0


def examine() -> Report:
    """Look at everything once; takes about ten seconds where FFCV is installed."""
    broken = import_problems(NEEDED)
    gpus = Gpus() if any(p.startswith("torch ") for p in broken) else find_gpus()
    ffcv = check_ffcv()
    folder = Path.cwd()
    problems = [*broken]
    if broken:
        problems.append("`make setup` in a fresh clone installs what is needed")
    if gpus.problem:
        problems.append(gpus.problem)
    if not os.access(folder, os.W_OK):
        problems.append(f"runs are written below the current folder, {folder}, which is read-only")
    rows = (
        ("cure_fast", cure_fast.__version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        *((name, package_version(name) or "not installed") for name in PACKAGES),
        ("CPU", f"{usable_cores()} usable cores"),
        ("memory", f"{memory_limit() / 2**30:.1f} GiB"),
        *(("GPU", line) for line in gpus.lines or (gpus.absence,)),
        ("Triton", check_triton(on_gpu=bool(gpus.lines))),
        ("FFCV", ffcv.detail),
        *((name, check_receiver(name, flag)) for name, flag in RECEIVERS.items()),
        *((("/dev/shm", shared_memory()),) if Path("/dev/shm").is_dir() else ()),
        ("folder", f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB free in {folder}"),
    )
    return Report(rows, tuple(problems), ffcv, gpus)


def import_problems(names: tuple[str, ...]) -> list[str]:
    """Return one line for each module that cannot be imported, with the error's text."""
    problems = []
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken binary raises far more than ImportError
            problems.append(f"{name} cannot be imported ({type(error).__name__}: {error})")
    return problems


def check_receiver(name: str, flag: str) -> str:
    """Return the version of a package that receives a run's numbers, or what is without it."""
    version = package_version(name)
    problem = "not installed" if version is None else "".join(import_problems((name,)))
    return f"{problem}; {flag} only warns" if problem else str(version)


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_limit(cgroup: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Return the bytes of memory that this process may use: the machine's, or its container's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = cgroup.read_text(encoding="ascii").strip() if cgroup.is_file() else "max"
    return total if limit == "max" else min(total, int(limit))


def shared_memory(folder: str = "/dev/shm") -> str:
    """Return the free space of shared memory, with a warning where workers may run out of it."""
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**20:,.0f} MiB free"
    if free < SMALL_SHM:
        text += "; little for loader processes (in a container, start it with --shm-size=2g)"
    return text


def find_gpus() -> Gpus:
    """Return torch's CUDA GPUs after one small computation on each."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    driver = nvidia_driver()
    if not usable:
        if driver is None:
            return Gpus()
        reason = str(caught[0].message).splitlines()[0] if caught else "torch gives no reason"
        return Gpus(absence=f"none that torch can use, though driver {driver} sees one: {reason}")
    lines, problem = [], ""
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        lines.append(
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16}, "
            f"compute {properties.major}.{properties.minor}, driver {driver or 'unknown'}"
        )
        try:
            (torch.ones(2, device=f"cuda:{index}") + 1).sum().item()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            problem = f"GPU {index} fails at a small computation ({reason}); try --device cpu"
    return Gpus(tuple(lines), problem=problem)


def nvidia_driver() -> str | None:
    """Return the NVIDIA driver's version, or ``None`` where no driver or no GPU answers."""
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def check_triton(*, on_gpu: bool) -> str:
    """Return what Triton can do here; on a GPU a small kernel is compiled and run."""
    problem = import_problems(("triton",))
    if problem:
        return problem[0]
    if not on_gpu:
        return "imports; without a GPU its kernels run only in the interpreter (TRITON_INTERPRET=1)"
    # A file, because Triton reads the source of its kernels.
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "probe.py")
        script.write_text(TRITON_PROBE, encoding="utf-8")
        failure = run_probe([sys.executable, str(script)])
    return f"cannot compile for this GPU ({failure})" if failure else "compiles for this GPU"


def check_ffcv() -> Ffcv:
    """Write and read back a file of four samples with FFCV, in a child process."""
    version = package_version("ffcv")
    if version is None:
        return Ffcv(False, "not installed", mend_ffcv(missing_packages()))
    failure = run_probe([sys.executable, "-c", FFCV_PROBE])
    if failure:
        missing = missing_packages()
        return Ffcv(False, f"{version} is installed but fails ({failure})", mend_ffcv(missing))
    return Ffcv(True, f"{version} works: a file was written and read back", "")


def run_probe(command: list[str], seconds: float = PROBE_SECONDS) -> str:
    """Run ``command``; return "" if it succeeds, else the last line of its error output.

    The whole process group ends at the time limit: a child that hangs (as FFCV's writer does when
    a sample raises) would otherwise hold the pipe open for ever.
    """
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as child:
        try:
            _, errors = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return f"no answer in {seconds:g} s"
    if child.returncode == 0:
        return ""
    lines = errors.strip().splitlines()
    return lines[-1] if lines else f"ended with code {child.returncode}"


def missing_packages() -> list[str]:
    """Return the Debian packages that FFCV's build or import lacks here, by what is absent."""
    missing = []
    if not shutil.which("g++"):
        missing.append("g++")
    if not shutil.which("pkg-config"):
        missing.append("pkg-config")
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        missing.append(f"python{sys.version_info.major}.{sys.version_info.minor}-dev")
    if not _pkg_config_knows("libturbojpeg"):
        missing.append("libturbojpeg0-dev")
    if not _pkg_config_knows("opencv4"):
        missing.append("libopencv-dev")
    # FFCV requires the opencv-python wheel, which links these two system libraries.
    if not _loads("libGL.so.1"):
        missing.append("libgl1")
    if not _loads("libgthread-2.0.so.0"):
        missing.append("libglib2.0-0")
    return missing


def _pkg_config_knows(library: str) -> bool:
    if not shutil.which("pkg-config"):
        return False
    return subprocess.run(["pkg-config", "--exists", library], check=False).returncode == 0


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def mend_ffcv(missing: list[str]) -> str:
    """Return the line that installs FFCV: the system packages ``missing``, then the Python ones."""
    requirements = [
        requirement.split(";")[0].strip()
        for requirement in importlib.metadata.requires("cure-fast") or ()
        if "extra == 'ffcv'" in requirement.replace('"', "'")
    ]
    pip = [sys.executable, "-m", "pip", "install"]
    constraints = Path(cure_fast.__file__).resolve().parents[1] / "constraints.txt"
    if constraints.is_file():
        pip += ["-c", str(constraints)]
    line = shlex.join([*pip, *requirements])
    if not missing:
        return line
    packages = " ".join(missing)
    if not shutil.which("apt-get"):
        return f"Install what Debian calls {packages}; then run: {line}"
    if os.geteuid() != 0 and not shutil.which("sudo"):
        install = f"apt-get update && apt-get install -y --no-install-recommends {packages}"
        return f"Ask for this to be run as root: {install}; then run: {line}"
    sudo = "" if os.geteuid() == 0 else "sudo "
    return (
        f"{sudo}apt-get update && "
        f"{sudo}apt-get install -y --no-install-recommends {packages} && {line}"
    )
