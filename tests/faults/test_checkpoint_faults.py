"""Saving checkpoints under faults: killed, disk full, read-only, folder gone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cure_fast.cli.main import main
from cure_fast.errors import InputError
from cure_fast.runs.checkpoint import (
    has_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    tidy_checkpoints,
)
from cure_fast.runs.folder import load_config, own_folder
from moments import signal_at_change
from small_state import is_state, state

RUN = Path(__file__).parent / "data" / "run-format-1"


def content(folder):
    """Every file below the folder with its content, and every link with its target."""
    return {
        path.relative_to(folder).as_posix(): path.readlink().as_posix()
        if path.is_symlink()
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def in_child(action):
    """Run ``action`` in a forked process; return its exit code, minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            # The parent's OpenMP threads are not in the child, which would wait for them.
            torch.set_num_threads(1)
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# Which step it is decides what is renamed, and a half file is refused by its own hash: with --slow
# each is met with the other.
@pytest.mark.parametrize(
    ("step", "half"),
    [
        pytest.param(3, True, id="next step-files half written"),
        pytest.param(2, False, id="same step again-between calls"),
        pytest.param(3, False, id="next step-between calls", marks=pytest.mark.slow),
        pytest.param(2, True, id="same step again-files half written", marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_call_inside_a_save(tmp_path, step, half):
    new = state(step) | {"new": True}
    finished, call = False, 0
    found = set()
    before = tmp_path / "before"
    for earlier in (1, 2):
        save_checkpoint(before, earlier, state(earlier), {})
    while not finished:
        call += 1
        folder = tmp_path / str(call)
        shutil.copytree(before, folder, symlinks=True)

        def save(call=call, folder=folder):
            signal_at_change(call, signal.SIGKILL, half=half)
            save_checkpoint(folder, step, new, {})

        code = in_child(save)
        assert code in (0, -signal.SIGKILL)
        finished = code == 0
        loaded, skipped = load_checkpoint(folder)
        assert skipped == []
        assert is_state(loaded, step if "new" in loaded else 2)
        found.add("new" in loaded)
        # The next save works, and clears up what was left.
        save_checkpoint(folder, step + 1, state(step + 1), {})
        assert is_state(load_checkpoint(folder)[0], step + 1)
        names = {path.name for path in folder.iterdir()}
        assert len(names) == 3 and not any(n.startswith(".tmp") or n.endswith("~") for n in names)
    assert call > 15 and found == {True, False}


def test_tidying_finishes_what_a_killed_save_left_undone(tmp_path):
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    for step in (1, 2, 3):
        save_checkpoint(whole, step, state(step), {})
        save_checkpoint(folder, step, state(step), {})
    wanted = sorted(path.name for path in whole.iterdir())
    shutil.copytree(folder / "checkpoint-000000002", folder / "checkpoint-000000001")
    shutil.copytree(folder / "checkpoint-000000002", folder / "checkpoint-000000003~")
    (folder / ".tmp-checkpoint-000000004").mkdir()
    (folder / ".tmp-latest").symlink_to("checkpoint-000000003")
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("checkpoint-000000001")
    tidy_checkpoints(folder, 3)
    assert sorted(path.name for path in folder.iterdir()) == wanted
    assert (folder / "latest").readlink().as_posix() == "checkpoint-000000003"
    assert is_state(load_checkpoint(folder)[0], 3)


@pytest.mark.parametrize("tidied", [True, False])
def test_a_replaced_checkpoint_stays_where_what_took_its_place_is_damaged(tmp_path, tidied):
    save_checkpoint(tmp_path, 2, state(2), {})
    final = tmp_path / "checkpoint-000000002"
    shutil.copytree(final, tmp_path / "checkpoint-000000002~")
    weights = bytearray((final / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (final / "weights.safetensors").write_bytes(weights)
    loaded, skipped = load_checkpoint(tmp_path)
    assert is_state(loaded, 2) and len(skipped) == 1
    if tidied:
        tidy_checkpoints(tmp_path, 2)
    else:
        save_checkpoint(tmp_path, 3, state(3), {})
        shutil.rmtree(tmp_path / "checkpoint-000000003")
    assert is_state(load_checkpoint(tmp_path)[0], 2) and load_checkpoint(tmp_path)[1] == []
    assert not (tmp_path / "checkpoint-000000002~").exists()


def failing_at(monkeypatch, number, error):
    """Have the ``number``-th call that writes or flushes raise ``error``; return what counts."""
    calls = []

    def wrap(owner, name):
        real = getattr(owner, name)

        def wrapped(*arguments, **options):
            calls.append(name)
            if len(calls) == number:
                raise error
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, wrapped)

    for owner, name in (
        (Path, "mkdir"),
        (Path, "write_bytes"),
        (Path, "write_text"),
        (os, "fsync"),
        (Path, "replace"),
    ):
        wrap(owner, name)
    return calls


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_at_any_call_leaves_the_older_ones(tmp_path, monkeypatch, error):
    for earlier in (1, 2):
        save_checkpoint(tmp_path, earlier, state(earlier), {})
    before = content(tmp_path)
    number, outcome = 0, None
    while outcome != "saved":
        number += 1
        with monkeypatch.context() as patch:
            failing_at(patch, number, error)
            try:
                save_checkpoint(tmp_path, 3, state(3), {})
                outcome = "saved"
            except type(error) as raised:
                assert raised is error
                outcome = "failed"
        if (tmp_path / "checkpoint-000000003").exists():
            break
        assert content(tmp_path) == before and is_state(load_checkpoint(tmp_path)[0], 2)
        assert not list(tmp_path.glob(".tmp*"))
    assert number > 6 and is_state(load_checkpoint(tmp_path)[0], 3)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield disk
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("where", ["model", "optimizer"])
def test_a_full_disk(small_disk, where):
    folder = small_disk / "checkpoints"
    for earlier in (1, 2):
        save_checkpoint(folder, earlier, state(earlier), {})
    before = content(folder)
    large = state(3) | {where: {"weight": torch.zeros(1_000_000)}}
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(folder, 3, large, {})
    assert content(folder) == before and is_state(load_checkpoint(folder)[0], 2)
    # Space was given back, so that a smaller state can still be saved.
    save_checkpoint(folder, 4, state(4), {})
    assert is_state(load_checkpoint(folder)[0], 4)


def test_a_file_size_limit(tmp_path):
    """The nearest to a full disk where nothing can be mounted: the system refuses the write."""
    import resource

    save_checkpoint(tmp_path, 1, state(1), {})
    before = content(tmp_path)

    def save():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path, 2, state(2) | {"x": torch.zeros(100_000)}, {})

    assert in_child(save) == 0 and content(tmp_path) == before


def test_a_read_only_file_system(small_disk, capsys):
    run = small_disk / "run"
    shutil.copytree(RUN, run)
    save_checkpoint(run / "checkpoints", 9, state(9), {})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="Read-only"):
        save_checkpoint(run / "checkpoints", 10, state(10), {})
    assert is_state(load_checkpoint(run / "checkpoints")[0], 9)
    assert main(["train", str(run), "--resume", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "able to write" in error and "copy" in error


def as_nobody(action):
    """Run ``action`` in a child that is not the superuser, whom no permission stops."""

    def dropped():
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        action()

    return in_child(dropped)


def let_others_in(folder):
    """Open pytest's folders, which are private to their user, on the way to this one."""
    shared = Path(tempfile.gettempdir())
    for parent in (folder, *folder.parents):
        if parent in (shared, *shared.parents):
            break
        parent.chmod(0o755)


def test_a_run_folder_without_permission_to_write(tmp_path):
    run = Path(shutil.copytree(RUN, tmp_path / "run"))
    save_checkpoint(run / "checkpoints", 9, state(9), {})
    let_others_in(tmp_path)
    for path in (run, *run.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    config = load_config(run)
    config = replace(config, run=replace(config.run, out=str(run)))

    def attempts():
        with pytest.raises(PermissionError):
            save_checkpoint(run / "checkpoints", 10, state(10), {})
        assert is_state(load_checkpoint(run / "checkpoints")[0], 9)
        refused = pytest.raises(InputError, match="able to write in its folder: Permission denied")
        with refused, own_folder(config, resume=True):
            pass

    assert as_nobody(attempts) == 0
    run.chmod(0o755)


def test_checkpoints_that_may_not_be_read_are_not_taken_for_none(tmp_path):
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, 1, state(1), {})
    folder.chmod(0o000)
    let_others_in(tmp_path)

    def attempts():
        for call in (has_checkpoints, load_checkpoint):
            with pytest.raises(PermissionError):
                call(folder)
        assert newest_checkpoint(folder) is None

    assert as_nobody(attempts) == 0
    folder.chmod(0o755)


def test_a_run_folder_that_was_deleted_does_not_come_back_empty(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    save_checkpoint(run / "checkpoints", 1, state(1), {})
    shutil.rmtree(run)
    with pytest.raises(FileNotFoundError):
        save_checkpoint(run / "checkpoints", 2, state(2), {})
    assert not run.exists()


@pytest.mark.parametrize("thing", ["dangling", "elsewhere", "folder", "file"])
def test_latest_is_for_people_and_no_checkpoint_depends_on_it(tmp_path, thing):
    save_checkpoint(tmp_path, 1, state(1), {})
    link = tmp_path / "latest"
    link.unlink()
    other = tmp_path.with_name(f"{tmp_path.name}-other")
    other.mkdir()
    if thing in ("dangling", "elsewhere"):
        link.symlink_to("nowhere" if thing == "dangling" else other)
    elif thing == "folder":
        (link / "kept").mkdir(parents=True)
    else:
        link.write_text("text")
    assert is_state(load_checkpoint(tmp_path)[0], 1)
    save_checkpoint(tmp_path, 2, state(2), {})
    assert is_state(load_checkpoint(tmp_path)[0], 2) and not list(other.iterdir())
    if thing == "folder":
        assert (link / "kept").is_dir()
    else:
        assert link.readlink().as_posix() == "checkpoint-000000002"
