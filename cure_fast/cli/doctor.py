"""What this machine offers to training: versions, processor, GPU, Triton, FFCV; and what it lacks.

Only the standard library is imported at the top, so that the answer also comes where torch is
absent or broken. FFCV and Triton are tried in child processes with a time limit: a broken build
of either can crash or hang the process that imports it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import warnings
from ctypes.util import find_library
from pathlib import Path

import cure_fast
from cure_fast.errors import InputError
from cure_fast.runs.versions import PACKAGES, nvidia_driver, package_version

# Import names of what training and its report need, which bring NumPy; FFCV is an extra.
NEEDED = ("torch", "torchvision", "safetensors", "cyclopts", "rich", "pyautoattack")
# Receivers of a run's numbers, flags of the same names; training goes on without them.
RECEIVERS = ("tensorboard", "wandb", "trackio")

FFCV_PROBE = """
import tempfile
from pathlib import Path
import ffcv
import numpy as np
from cure_fast.loaders.beton import ensure_beton
from cure_fast.loaders.image_set import ImageSet

images = np.arange(4 * 8 * 8 * 3).reshape(4, 8, 8, 3).astype(np.uint8)
with tempfile.TemporaryDirectory() as folder:
    ensure_beton(ImageSet("probe", images, np.arange(4), tuple("abcd"), "none"), Path(folder))
"""

TRITON_PROBE = """
import os
os.environ["CURE_FAST_KERNELS"] = "triton"
import torch
from cure_fast.kernels.pgd import pgd_step_

x_adv, x, grad = (torch.full((5,), value, device="cuda") for value in (0.0, 0.0, 1.0))
pgd_step_(x_adv, x, grad, step_size=0.25, eps=0.5)
if x_adv.tolist() != [0.25] * 5:
    raise SystemExit(f"a compiled kernel gave {x_adv.tolist()}")
"""


def doctor(*, as_json: bool = False) -> int:
    """Print the report, or the same as JSON; return 0 if training can run, else 2."""
    problems = import_problems(NEEDED)
    broken_torch = any(problem.startswith("torch ") for problem in problems)
    gpus, note = ([], "none") if broken_torch else find_gpus()
    if problems:
        problems.append("`make setup` in a fresh clone installs what is needed")
    if gpus and note:
        problems.append(note)
    folder = Path.cwd()
    if not os.access(folder, os.W_OK):
        problems.append(f"runs are written below the current folder, {folder}, which is read-only")
    works, ffcv = check_ffcv()
    cores = f"{len(os.sched_getaffinity(0))} usable cores"
    rows = [
        ("cure_fast", cure_fast.__version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        *((name, package_version(name) or "not installed") for name in PACKAGES),
        *((name, check_receiver(name)) for name in RECEIVERS),
        ("CPU", cores),
        ("memory", f"{memory_limit() / 2**30:.1f} GiB"),
        *(("GPU", line) for line in gpus or (note,)),
        ("Triton", check_triton(on_gpu=bool(gpus))),
        ("FFCV", ffcv),
        *((("/dev/shm", shared_memory()),) if Path("/dev/shm").is_dir() else ()),
        ("folder", f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB free in {folder}"),
    ]
    if as_json:
        told = {name: [value for n, value in rows if n == name] for name, _ in rows}
        mend = None if works else mend_ffcv(missing_packages())
        ready = {"ready": not problems, "problems": problems, "install_ffcv": mend}
        print(json.dumps(ready | {k: v if len(v) > 1 else v[0] for k, v in told.items()}, indent=2))
        return InputError.code if problems else 0
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        print(f"{name:<{width}}{value}")
    if not works:
        print(f"\nTo install FFCV:\n{mend_ffcv(missing_packages())}")
    if problems:
        print(f"\nNot ready: {'; '.join(problems)}.")
        return InputError.code
    place = "on the GPU" if gpus else f"on the CPU ({cores})"
    feed = "with FFCV" if works else "without FFCV, which is optional"
    print(f"\nReady: training can run {place}, {feed}.")
    return 0


def import_problems(names: tuple[str, ...]) -> list[str]:
    """Return one line for each module that cannot be imported, which begins with its name."""
    problems = []
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken binary raises far more than ImportError
            problems.append(f"{name} cannot be imported ({type(error).__name__}: {error})")
    return problems


def check_receiver(name: str) -> str:
    """Return the version of a receiver of numbers, or why it gets none and what comes of that."""
    version = package_version(name)
    problems = import_problems((name,)) if version else ["not installed"]
    return f"{problems[0]}; --{name} only warns" if problems else str(version)


def memory_limit(cgroup: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Return the bytes of memory that this process may use: the machine's, or its container's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = cgroup.read_text(encoding="ascii").strip() if cgroup.is_file() else "max"
    return total if limit == "max" else min(total, int(limit))


def shared_memory(folder: str = "/dev/shm") -> str:
    """Return the free space of shared memory, with a warning where workers may run out of it."""
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**20:,.0f} MiB free"
    if free < 256 * 2**20:
        text += "; little for loader processes (in a container, start it with --shm-size=2g)"
    return text


def find_gpus() -> tuple[list[str], str]:
    """Return torch's CUDA GPUs, one line each, after one small computation on each, and a note.

    The note says why there is none, or what stops training on one; it is empty if all is well.
    """
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    driver = nvidia_driver()
    if not usable and driver is None:
        return [], "none"
    if not usable:
        reason = str(caught[0].message).splitlines()[0] if caught else "torch gives no reason"
        return [], f"none that torch can use, though driver {driver} sees one: {reason}"
    lines, problem = [], ""
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if properties.major >= 8 else "no bf16"
        lines.append(
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16}, "
            f"compute {properties.major}.{properties.minor}, driver {driver or 'unknown'}"
        )
        try:
            (torch.ones(2, device=f"cuda:{index}") + 1).sum().item()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            problem = f"GPU {index} fails at a small computation ({reason}); try --device cpu"
    return lines, problem


def check_triton(*, on_gpu: bool) -> str:
    """Return what Triton can do here; on a GPU one of our kernels is compiled and run."""
    if problem := import_problems(("triton",)):
        return problem[0]
    if not on_gpu:
        return "imports; without a GPU its kernels run only in the interpreter (TRITON_INTERPRET=1)"
    failure = run_probe(TRITON_PROBE)
    return f"cannot compile for this GPU ({failure})" if failure else "compiles for this GPU"


def check_ffcv() -> tuple[bool, str]:
    """Write and read back a file of four images with FFCV; return whether that works, in words."""
    version = package_version("ffcv")
    if version is None:
        return False, "not installed"
    failure = run_probe(FFCV_PROBE)
    if failure:
        return False, f"{version} is installed but fails ({failure})"
    return True, f"{version} works: a file was written and read back"


def run_probe(program: str, seconds: float = 120) -> str:
    """Run Python's ``program``; return "" if it succeeds, else the last line of its error output.

    The whole process group ends at the time limit: a child that hangs (as FFCV's writer does when
    a sample raises) would otherwise hold the pipe open for ever.
    """
    with subprocess.Popen(
        [sys.executable, "-c", program],
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
    pkg_config = shutil.which("pkg-config")

    def knows(library: str) -> bool:
        return bool(pkg_config) and not subprocess.call([pkg_config, "--exists", library])

    here = {
        "g++": shutil.which("g++"),
        "pkg-config": pkg_config,
        f"python{sys.version_info.major}.{sys.version_info.minor}-dev": Path(
            sysconfig.get_paths()["include"], "Python.h"
        ).is_file(),
        "libturbojpeg0-dev": knows("libturbojpeg"),
        "libopencv-dev": knows("opencv4"),
        # FFCV requires the opencv-python wheel, which links these two system libraries.
        "libgl1": find_library("GL"),
        "libglib2.0-0": find_library("gthread-2.0"),
    }
    return [package for package, found in here.items() if not found]


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
    root = os.geteuid() == 0
    steps = ("apt-get update", f"apt-get install -y --no-install-recommends {packages}")
    if root or shutil.which("sudo"):
        return " && ".join([*(step if root else f"sudo {step}" for step in steps), line])
    return f"Ask for this to be run as root: {' && '.join(steps)}; then run: {line}"
