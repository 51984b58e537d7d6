"""Two processes that share a run: the losses and counts of one, and the end of both."""

from __future__ import annotations

import json
import signal
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore

from cure_fast.errors import InputError
from cure_fast.loaders import ImageSet, Mix, choose, make_loader
from cure_fast.runs.checkpoint import load_checkpoint
from cure_fast.runs.log import read_rows
from moments import raise_at, signal_at
from processes import start
from several import evaluated, free_port, mixed, results_of, start_together, trained
from tiny_command import checkpoints, tiny_words

# Sums in another order, in float64, after 20 steps.
ROUNDING = 1e-9
STEP = "cure_fast.engine.eager:train_step"
TRAINED = {
    name: partial(trained, *case, engine="fast" if name.startswith("fast ") else "eager")
    for name, case in {
        "pgd_at": ("pgd_at", 4),
        "trades": ("trades", 4),
        "cure": ("cure", 20),
        # Gradients at other weights, averages, statistics estimated anew.
        "policies": ("trades", 4, "awp", "swa"),
        # What is kept of each image or class, where another process had it.
        "te": ("te", 4),
        "fgsm_pgi": ("fgsm_pgi", 4),
        "cfa_at": ("cfa_at", 4),
        # Means over the batch that are in no loss.
        "gairat": ("gairat", 4),
        "rat": ("rat", 4),
        # Decided on the device; with gradients at other weights, and in the middle of an attack.
        "fast cure": ("cure", 4),
        "fast policies": ("trades", 4, "awp", "swa"),
        "fast te": ("te", 4),
        # An attack in training mode, with two starts per image.
        "st_at": ("st_at", 4),
        # A second network that is taught, and tries steps on a copy of the first.
        "las_at": ("las_at", 4),
    }.items()
}
CASES = {**TRAINED, "evaluation": evaluated, "mixed": mixed}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    cases = [*CASES.values()]
    return [
        dict(zip(CASES, results, strict=True))
        for count in (1, 2)
        for results in results_of(folder / str(count), count, cases)
    ]


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_train_as_one(found, name):
    one, first, second = (each[name] for each in found)
    assert first == second
    assert [terms.keys() for terms in one] == [terms.keys() for terms in first]
    for alone, shared in zip(one, first, strict=True):
        for term, value in alone.items():
            assert shared[term] == pytest.approx(value, rel=ROUNDING, abs=1e-12), term


def test_two_processes_count_as_one(found):
    one, first, second = (each["evaluation"] for each in found)
    assert one == first == second
    # Some of the images that are right fall.
    assert one["natural"]["correct"] > one["pgd3"]["correct"]
    assert len({*one["aa"]["settings"]["robust_after"].values()}) > 1


def test_images_of_two_processes_are_mixed_as_those_of_one(found):
    one, first, second = (each["mixed"] for each in found)
    for alone, *shared in zip(one, first, second, strict=True):
        assert alone == [start + end for start, end in zip(*shared, strict=True)]
    assert len({share for _, _, shares in one for share in shares}) > 5


def loader_of(process, *, batch_size=10, count=27, **settings):
    pixels = np.random.default_rng(0).integers(256, size=(count, 8, 8, 3), dtype=np.uint8)
    images = ImageSet("noise", pixels, np.arange(count) % 3, ("a", "b", "c"), "random")
    given = {"crop_padding": 2, "flip": True, "workers": 0, "cache": None, "seed": 3, **settings}
    device = torch.device("cpu")
    return make_loader(
        given.pop("loader", "resident"),
        images,
        batch_size=batch_size,
        device=device,
        process=process,
        **given,
    )


def generated():
    pixels = np.random.default_rng(1).integers(256, size=(40, 8, 8, 3), dtype=np.uint8)
    return Mix(ImageSet("made", pixels, np.arange(40) % 3, ("a", "b", "c"), "random"), 0.7)


SETTINGS = [
    {},
    {"augment": "idbh-strong"},
    {"loader": "torch"},
    {"mix": generated()},
    {"mix": generated(), "loader": "torch"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_parts_of_a_batch_are_the_batch(settings):
    loaders = [loader_of(process, **settings) for process in ((0, 1), (0, 3), (1, 3), (2, 3))]
    epochs = []
    for loader in loaders:
        with loader.epoch(1, start_batch=1) as batches:
            epochs.append([*batches])
    for whole, *parts in zip(*epochs, strict=True):
        assert whole.part is None
        assert [part.part.first for part in parts] == [0, len(parts[0]), len(whole) - len(parts[2])]
        assert {part.whole for part in parts} == {len(whole)}
        for name in ("x", "y", "index"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(whole, name))


def test_too_few_images_for_all_processes_are_refused():
    with pytest.raises(InputError, match="2 images or more for each of 4 processes, got one of 7"):
        loader_of((0, 4))


def test_ffcv_reads_no_parts_of_mixed_batches(monkeypatch):
    monkeypatch.setattr(choose, "FEW_BYTES", 0)
    with pytest.raises(InputError, match="--loader ffcv: with --aux a process reads more or fewer"):
        loader_of((0, 2), mix=generated(), loader="ffcv")
    assert loader_of((0, 2), mix=generated(), loader="auto").kind == "resident"


def shared_words(*more, out="run"):
    return tiny_words(
        *("--pretrain-epochs", "0", "--sync-batchnorm", "--start", "uniform", *more),
        method="trades",
        out=out,
    )


def steps_of(folder):
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["event"] == "step"]
    return {row["step"]: row["terms"]["total"] for row in rows}


def form_of(state):
    """Names, types and shapes of all that a checkpoint holds."""
    if isinstance(state, torch.Tensor):
        return state.dtype, tuple(state.shape)
    if isinstance(state, dict):
        return {key: form_of(value) for key, value in state.items()}
    return type(state)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of one process."""
    cwd = tmp_path_factory.mktemp("alone")
    running = start(shared_words(), cwd)
    assert running.wait() == 0, running.output()
    return cwd / "run"


def check_same_run(folder, unbroken):
    shared, alone = steps_of(folder), steps_of(unbroken)
    assert shared.keys() == alone.keys()
    # Float32: what rounds differently moves pixels whose gradient has no certain sign.
    assert [*shared.values()] == pytest.approx([*alone.values()], rel=1e-3)
    states = [load_checkpoint(each / "checkpoints")[0] for each in (folder, unbroken)]
    assert form_of(states[0]) == form_of(states[1])
    names = [{path.name for path in each.iterdir()} for each in (folder, unbroken)]
    assert names[0] == names[1]


def test_a_signal_to_one_process_stops_both_and_one_goes_on(tmp_path, unbroken):
    stopping = partial(signal_at, STEP, 2, signal.SIGTERM)
    both = start_together(shared_words(), tmp_path, of_last=stopping)
    assert [running.wait() for running in both] == [75, 75], both[0].output() + both[1].output()
    assert checkpoints(tmp_path / "run") == [2]
    assert both[0].stderr().count("continue with: cure-fast train run --resume") == 1
    assert "cure-fast:" not in both[1].stderr()
    again = start(shared_words("--resume"), tmp_path)
    assert again.wait() == 0, again.output()
    assert "resumed after step 2" in again.stdout()
    check_same_run(tmp_path / "run", unbroken)


def test_two_processes_go_on_where_one_was_stopped(tmp_path, unbroken):
    alone = start(shared_words(), tmp_path, prepare=partial(signal_at, STEP, 2, signal.SIGTERM))
    assert alone.wait() == 75
    both = start_together(shared_words("--resume"), tmp_path)
    assert [running.wait() for running in both] == [0, 0], both[0].output() + both[1].output()
    assert both[1].output() == ""
    check_same_run(tmp_path / "run", unbroken)
    results = [
        json.loads((folder / "results.json").read_text())["models"]["trained"]["attacks"]
        for folder in (tmp_path / "run", unbroken)
    ]
    counts = [{name: result["count"] for name, result in found.items()} for found in results]
    assert counts[0] == counts[1]


ANALYSES = {
    # Several parts, which processes take in turn, and one, whose attacks they share.
    "eps-sweep": "--attack pgd2",
    "classes": "--attack pgd2",
}


@pytest.mark.parametrize("name", ["eps-sweep", pytest.param("classes", marks=pytest.mark.slow)])
def test_an_analysis_by_two_processes_is_that_of_one(tmp_path, unbroken, name):
    words = ["analyze", name, str(unbroken), *ANALYSES[name].split()]
    words += ["--limit", "30", "--device", "cpu", "--out"]
    both = start_together([*words, "two"], tmp_path)
    assert [running.wait() for running in both] == [0, 0], both[0].output() + both[1].output()
    assert both[1].output() == "" and f"{name}: two/{name}.svg" in both[0].stdout()
    alone = start([*words, "one"], tmp_path)
    assert alone.wait() == 0, alone.output()
    one, two = (tmp_path / count / f"{name}.json" for count in ("one", "two"))
    assert one.read_text() == two.read_text()
    kept = [
        sorted(path.name for path in (tmp_path / c / "parts").glob("*")) for c in ("one", "two")
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 1


def test_a_process_that_is_lost_is_named(tmp_path):
    killed = partial(signal_at, STEP, 4, signal.SIGKILL)
    both = start_together(shared_words(), tmp_path, of_last=killed)
    assert [running.wait() for running in both] == [75, -signal.SIGKILL], both[0].output()
    lines = both[0].stderr().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("cure-fast: process 1 of 2 has ended, or did not come within 1800 s")
    assert lines[0].endswith("continue with: cure-fast train run --resume")
    assert checkpoints(tmp_path / "run") == [3]


def test_processes_started_anew_go_on(tmp_path):
    """The launcher keeps its store, in which the former processes have left their addresses."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    killed = partial(signal_at, STEP, 4, signal.SIGKILL)
    both = start_together(shared_words(), tmp_path, of_last=killed, env=env)
    assert [running.wait() for running in both] == [75, -signal.SIGKILL], both[0].output()
    env["TORCHELASTIC_RESTART_COUNT"] = "1"
    both = start_together(shared_words(), tmp_path, env=env)
    assert [running.wait() for running in both] == [0, 0], both[0].output() + both[1].output()
    assert "resumed after step 3" in both[0].stdout()


def test_one_that_never_comes_is_told(tmp_path):
    alone = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = shared_words("--rank-timeout", "2")
    for rank, name in (("0", ""), ("1", "process 1: ")):
        running = start(words, tmp_path, env={**alone, "RANK": rank})
        assert running.wait() == 75
        line = running.stderr().splitlines()[-1]  # before it stand torch's own
        assert line.startswith(f"cure-fast: {name}2 processes did not find one another (")
        assert line.endswith("; start it again, with --resume where it had begun")
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_process_is_told_by_it_alone(tmp_path):
    failing = partial(raise_at, STEP, 2, InputError("images: expected whole ones. Mend them."))
    both = start_together(shared_words(), tmp_path, of_last=failing)
    assert [running.wait() for running in both] == [75, 2], both[0].output() + both[1].output()
    assert both[0].stderr() == ""
    assert both[1].stderr() == "cure-fast: process 1: images: expected whole ones. Mend them.\n"
