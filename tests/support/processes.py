"""The command line in real processes that start in milliseconds, to be killed and signalled.

A fresh Python needs seconds to import torch. Here one server imports it once, and each process is
forked from it::

    from processes import start

    run = start(["train", "quickstart", "--epochs", "1"], tmp_path)
    run.signal(signal.SIGTERM)
    assert run.wait() == 75, run.output()

A process is what ``cure-fast WORDS`` would be in ``cwd``: the default answers to signals, one
OpenMP thread, standard input empty, standard output and error in files, the environment that the
test has at that moment, the exit code of the program, and minus the signal's number if it was
killed by one. What differs from a fresh interpreter: the modules are imported already, and what
is read once at start (locale, PYTHON... and OMP_... variables) is the server's.

``prepare`` is called in the process before the command, to inject a fault there. It is sent by
name: a function of a module in tests/support, or a ``functools.partial`` of one::

    prepare = partial(signal_at, "cure_fast.engine.eager:train_step", 3, SIGTERM)
    start(words, tmp_path, prepare=prepare)
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path

import pytest

# A tiny run takes a second or two; this is what a machine with other work on it may need.
PATIENCE_S = 240.0
PRELOADED = (
    "cure_fast.cli.main",
    "cure_fast.training.job",
    "cure_fast.cli.evaluate",
    "cure_fast.report",
    "cure_fast.cli.listing",
    "cure_fast.cli.configure",
    "cure_fast.training.choices",
    "warmed",
    "numpy.ma",
    "PIL.PngImagePlugin",
    "safetensors.torch",
    "pyautoattack",
    "rich.progress",
    "rich.table",
    # What torch imports when it is told which algorithms to take.
    "torch._inductor",
    "cyclopts",
)
# Threads do not survive a fork, so the server must never make any.
SINGLE = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}

_numbers = count(1)
_server = threading.Lock()


class Running:
    """A started process; its output is in ``out`` and ``err``."""

    def __init__(self, process: multiprocessing.process.BaseProcess, out: Path, err: Path) -> None:
        self.process, self.out, self.err = process, out, err
        assert process.pid is not None
        self.pid = process.pid

    def wait(self, timeout: float = PATIENCE_S) -> int:
        """Return the exit code; a process that does not end in ``timeout`` s fails the test."""
        code = self.join(timeout)
        if code is None:
            # Answered by the stacks of all threads on standard error: see `_become`.
            self.signal(signal.SIGUSR2)
            time.sleep(0.5)
            self.kill()
            pytest.fail(f"still running after {timeout:g} s:\n{self.output()}")
        return code

    def join(self, timeout: float) -> int | None:
        """Return the exit code as soon as there is one, None if there is none in ``timeout`` s."""
        wait([self.process.sentinel], timeout)
        # The server's answer can be read once only, and starting a process in another thread asks
        # for those of all; who comes second would take the process for lost, with exit code 255.
        with _server:
            return self.process.exitcode

    def ended(self) -> bool:
        """Return whether the process has ended."""
        return self.join(0) is not None

    def wait_for(self, text: str, timeout: float = PATIENCE_S) -> None:
        """Wait until ``text`` is in the output; fails the test if it never comes."""
        deadline = time.monotonic() + timeout
        while text not in self.output():
            if self.ended() or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"{text!r} never came:\n{self.output()}")
            time.sleep(0.005)

    def output(self) -> str:
        """Return what was written so far, standard output before standard error."""
        return self.stdout() + self.stderr()

    def stdout(self) -> str:
        return self.out.read_text(encoding="utf-8", errors="replace")

    def stderr(self) -> str:
        return self.err.read_text(encoding="utf-8", errors="replace")

    def signal(self, number: int) -> None:
        """Send the process a signal; nothing happens if it has ended."""
        if not self.ended():
            os.kill(self.pid, number)

    def kill(self) -> int:
        """Kill the process with SIGKILL and return its exit code, which is another if it was done.

        Only this process: a child of it (FFCV's writer) goes on by itself.
        """
        self.signal(signal.SIGKILL)
        code = self.join(PATIENCE_S)
        assert code is not None
        return code


def start(
    words: Sequence[str],
    cwd: Path,
    *,
    env: Mapping[str, str | None] | None = None,
    prepare: Callable[[], object] | None = None,
) -> Running:
    """Start ``cure-fast WORDS`` in ``cwd``; the first call takes seconds, later ones milliseconds.

    Args:
        words: the command line without the program's name.
        cwd: folder to run in, which must exist; the output goes into ``<cwd>.processes/``.
        env: variables to change; None takes one away.
        prepare: called before the command, in its process; see the module's text.
    """
    variables = dict(os.environ) | SINGLE
    for name, value in (env or {}).items():
        if value is None:
            variables.pop(name, None)
        else:
            variables[name] = value
    texts = cwd.with_name(f"{cwd.name}.processes")
    texts.mkdir(exist_ok=True)
    out, err = (texts / f"{next(_numbers)}.{kind}" for kind in ("out", "err"))
    for path in (out, err):
        path.touch()
    context = multiprocessing.get_context("forkserver")
    with _server, _server_environment():
        process = context.Process(
            target=_become, args=(list(words), cwd, variables, prepare, out, err)
        )
        process.start()
    return Running(process, out, err)


def finish(
    words: Sequence[str],
    cwd: Path,
    *,
    env: Mapping[str, str | None] | None = None,
    prepare: Callable[[], object] | None = None,
    timeout: float = PATIENCE_S,
) -> tuple[int, str]:
    """Run a command to its end; return exit code and output. Arguments as those of `start`."""
    running = start(words, cwd, env=env, prepare=prepare)
    return running.wait(timeout), running.output()


@contextmanager
def _server_environment() -> Iterator[None]:
    """Have the server, if it starts now, be of one thread and know what to import."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["processes", *PRELOADED])
    here = str(Path(__file__).parent)
    wanted = SINGLE | {
        "GOMP_SPINCOUNT": "10000",
        "PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH")))),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _become(
    words: list[str],
    cwd: Path,
    variables: dict[str, str],
    prepare: Callable[[], object] | None,
    out: Path,
    err: Path,
) -> None:
    """Turn the forked process into the program; never returns."""
    for path, numbers in ((Path(os.devnull), (0,)), (out, (1,)), (err, (2,))):
        handle = os.open(path, os.O_RDWR | os.O_APPEND)
        for number in numbers:
            os.dup2(handle, number)
        os.close(handle)
    sys.stdin, sys.stdout, sys.stderr = (open(n, "r" if n == 0 else "w") for n in range(3))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import faulthandler

    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
    # Not the server's way to start further processes, such as a loader's workers.
    multiprocessing.set_start_method(None, force=True)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    sys.argv = ["cure-fast", *words]
    if prepare is not None:
        prepare()
    runpy.run_module("cure_fast.__main__", run_name="__main__")
