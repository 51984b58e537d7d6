"""The signal handler by itself, in small programs that need no torch."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from cure_fast.__main__ import main as command
from cure_fast.signals import Interrupted

# Far above what a busy machine needs for these programs.
HANG_S = 120

LONG_CALL = """
import hashlib
from cure_fast.signals import StopSignals
with StopSignals():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2 * 10**8)
"""
SLOW_IMPORT = """
from cure_fast.signals import Interrupted, StopSignals
import sys, time
sys.path.insert(0, ".")
try:
    with StopSignals() as stop, stop.at_once():
        import slow
        time.sleep(30)
except Interrupted:
    print("interrupted, slow", slow.WHOLE)
"""
POLLING = """
import time
from cure_fast.signals import StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    while not stop():
        time.sleep(0.01)
print("polled")
"""
NESTED = """
import os, signal
from cure_fast.signals import Interrupted, StopSignals
with StopSignals() as outer:
    os.kill(os.getpid(), signal.SIGUSR1)
    assert outer()
    with StopSignals() as inner:
        try:
            with inner.at_once():
                print("went on")
        except Interrupted:
            print("knew")
"""
DONE = """
import os, signal
from cure_fast.signals import ignore_signals
ignore_signals()
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    os.kill(os.getpid(), number)
"""


@pytest.fixture
def start(tmp_path):
    started = []

    def run(program, **options):
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_the_second_interrupt_leaves_a_long_call_of_c(start):
    process = start(LONG_CALL)
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 75 and "left at once" in errors


def test_an_import_is_finished_before_the_program_ends(start, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(0.5)\nWHOLE = True\n"
    )
    process = start(SLOW_IMPORT)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=HANG_S)
    assert (process.returncode, output, errors) == (0, "interrupted, slow True\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_every_signal_can_be_polled_for(start, number):
    # Under `nohup` the tests themselves ignore one of them, and so would the program.
    process = start(POLLING, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    output, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 0 and output == "polled\n"
    assert errors.startswith(f"{number.name}: stopping after this step")


def test_a_hang_up_that_was_switched_off_stays_so(start):
    """As `nohup` does, for a program that shall outlive its terminal."""
    process = start(POLLING, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None


def test_what_came_before_is_known_inside(start):
    process = start(NESTED)
    output, _ = process.communicate(timeout=HANG_S)
    assert (process.returncode, output) == (0, "knew\n")


def test_a_program_that_is_done_keeps_its_exit_code(start):
    process = start(DONE)
    process.communicate(timeout=HANG_S)
    assert process.returncode == 0


@pytest.mark.parametrize(("rank", "told"), [(None, True), ("0", True), ("1", False)])
def test_the_first_process_alone_says_that_it_was_interrupted(monkeypatch, capsys, rank, told):
    def stopped(words: list[str]) -> int:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr("cure_fast.__main__.answered", stopped)
    monkeypatch.setattr("cure_fast.__main__.ignore_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["cure-fast", "list"])
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert command() == 75
    assert capsys.readouterr().err == ("cure-fast: interrupted\n" if told else "")
