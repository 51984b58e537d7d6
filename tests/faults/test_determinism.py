"""Another seed gives another run, and the evaluation's batch size changes no count.

That the same seed gives the same run: the strange machines of test_environments.
"""

from __future__ import annotations

import json

import pytest
import torch

from cure_fast.training.job import set_determinism
from processes import finish, start
from tiny_command import differences, tiny_words

BATCH_SIZES = (7, 128)


def test_another_seed_gives_another_run(tmp_path, unbroken):
    code, output = finish(tiny_words("--seed", "1"), tmp_path)
    assert code == 0, output
    found = differences(unbroken.folder, tmp_path / "run")
    assert "metrics.jsonl" in found and any(f.startswith("model.safetensors") for f in found)


@pytest.fixture
def torch_settings():
    """Brings back what the settings were."""
    fills, cudnn = torch.utils.deterministic, torch.backends.cudnn
    before = fills.fill_uninitialized_memory, cudnn.benchmark, cudnn.deterministic
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    fills.fill_uninitialized_memory, cudnn.benchmark, cudnn.deterministic = before


def test_deterministic_algorithms_do_not_fill_tensors_with_nan(torch_settings, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    fills = torch.utils.deterministic
    assert fills.fill_uninitialized_memory, "torch's default, without which this shows nothing"
    for deterministic in (True, True, False, False):
        set_determinism(deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert fills.fill_uninitialized_memory == (not deterministic)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A file of weights that is right on some images and robust on fewer."""
    cwd = tmp_path_factory.mktemp("model")
    words = tiny_words(
        *"--train-images 600 --pretrain-epochs 0 --epochs 6 --attacks natural".split(),
        method="natural",
    )
    code, output = finish(words, cwd)
    assert code == 0, output
    return cwd / "run" / "model.safetensors"


def test_the_batch_size_of_an_evaluation_changes_no_count(tmp_path, model):
    words = f"eval {model} --attacks natural,pgd5 --eps 0.03 --limit 140 --device cpu"
    runs = [
        start([*words.split(), "--batch-size", str(size), "--out", str(size)], tmp_path)
        for size in BATCH_SIZES
    ]
    assert [run.wait() for run in runs] == [0, 0], [run.output() for run in runs]
    counts = [counts_in(tmp_path / str(size) / "results.json") for size in BATCH_SIZES]
    assert counts[0] == counts[1]
    # Neither none nor all, which any evaluation would find.
    natural, attacked = counts[0]["natural"][0], counts[0]["pgd5"][0]
    assert 0 < attacked < natural < 140


def counts_in(path):
    """Return the right and all images under each attack."""
    (entry,) = json.loads(path.read_text())["models"].values()
    return {name: (a["correct"], a["count"]) for name, a in entry["attacks"].items()}
