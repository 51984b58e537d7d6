"""``cure-fast eval``: what it takes from the run, what it keeps, and foreign files of weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import cure_fast
from cure_fast.cli.evaluate import stoppable
from cure_fast.cli.main import main
from cure_fast.config.arguments import EvalArgs
from cure_fast.errors import InputError, StoppedError
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.evaluation.autoattack import Outcome
from cure_fast.evaluation.measurement import by_class
from cure_fast.evaluation.record import merge_results, model_entry
from cure_fast.evaluation.trust import Guard
from cure_fast.loaders import read_dataset
from cure_fast.models.building import build_for_data, load_model
from cure_fast.models.weights import read_metadata, save_weights

RUN = (
    "train quickstart --out run --train-images 60 --val-images 20 --width 4 --pretrain-epochs 0 "
    "--epochs 1 --batch-size 30 --attack-steps 1 --step-size 0.15 --attacks natural,pgd2 "
    "--eval-step-size 0.1 --limit 20 --aa-limit 4 --val-attack-steps 1 --loader resident "
    "--device cpu --seed 3 --no-tensorboard"
).split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made once."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        patch.chdir(home)
        assert main(RUN) == 0
        return home / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, to be changed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")
    return Path("run")


def results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def attacks(path: Path) -> dict[str, Any]:
    return results(path)["models"]["trained"]["attacks"]


def aside(run: Path) -> list[Path]:
    return sorted((run / "evaluation").glob("results-*.json"))


def evaluate(*words: str) -> int:
    return main(["eval", "run", *words])


def test_without_flags_all_is_the_runs_own_and_nothing_changes(run: Path) -> None:
    before = (run / "results.json").read_bytes()
    (run / "report.html").write_text("old", encoding="utf-8")
    assert evaluate() == 0
    assert (run / "results.json").read_bytes() == before and not aside(run)
    assert (run / "report.html").read_text(encoding="utf-8") == "old"
    assert results(run / "results.json")["seed"] == 3
    assert attacks(run / "results.json")["pgd2"]["settings"]["seed"] == 3


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--eps", "0.05"], "eps", 0.05),
        (["--step-size", "0.02"], "step_size", 0.02),
        (["--seed", "8"], "seed", 8),
    ],
    ids=["eps", "step", "seed"],
)
def test_other_settings_stay_out_of_the_record(
    run: Path, words: list[str], key: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {name: (run / name).read_bytes() for name in ("results.json", "report.html")}
    pictures = (run / "examples.npz").read_bytes()
    assert evaluate(*words) == 0
    assert {name: (run / name).read_bytes() for name in kept} == kept
    assert (run / "examples.npz").read_bytes() == pictures
    [written] = aside(run)
    assert str(written) in capsys.readouterr().out.replace("\n", "")
    assert results(written)[key] == value
    assert attacks(written)["pgd2"]["settings"][key] == value


def test_run_and_file_of_the_same_weights_are_attacked_alike(run: Path) -> None:
    """The radius, step and seed of the run's evaluation are in its files of weights."""
    words = ["--attacks", "pgd2,cw20", "--limit", "20", "--out", "alone"]
    assert main(["eval", "run/model.safetensors", *words]) == 0
    assert evaluate("--attacks", "pgd2,cw20") == 0
    alone, there = results(Path("alone/results.json")), results(run / "results.json")
    for key in ("eps", "step_size", "seed"):
        assert alone[key] == there[key]
    settings = [
        [found[name]["settings"] for name in ("pgd2", "cw20")]
        for found in (alone["models"]["model"]["attacks"], attacks(run / "results.json"))
    ]
    assert settings[0] == settings[1] and settings[0][0]["step_size"] == 0.1


def test_attacked_images_are_saved_with_labels_and_places(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--attacks", "natural,pgd2,pgd2-t", "--restarts", "2", "--save-adversarial", "x.npz"]
    assert evaluate(*words) == 0
    assert "adversarial images: x.npz" in capsys.readouterr().out
    test = read_dataset("digits", Path("data"), "test")
    with np.load("x.npz") as file:
        assert sorted(file) == ["images_pgd2", "images_pgd2-t", "indices", "labels"]
        assert (file["indices"] == np.arange(20)).all() and (
            file["labels"] == test.labels[:20]
        ).all()
        natural = test.images[:20].transpose(0, 3, 1, 2).astype(np.float32) / 255
        moved = np.abs(file["images_pgd2"] - natural)
        found = cure_fast.evaluate(
            cure_fast.load(run), file["images_pgd2"], file["labels"], attacks=["natural"]
        )
    assert 0.1 < moved.max() <= 0.15 + 1e-6
    [written] = aside(run)
    assert results(written)["restarts"] == 2
    assert found.accuracy["natural"] == attacks(written)["pgd2"]["accuracy"]
    assert attacks(written)["pgd2"]["settings"]["restarts"] == 2
    for words in (["--save-adversarial", "x.npz"], ["--save-adversarial", "x.npy"]):
        assert evaluate(*words) == 2
        assert "expected a new file ending in .npz" in capsys.readouterr().err


def test_another_norm_needs_a_radius(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--norm", "l2") == 2
    assert "--norm l2: expected --eps with it" in capsys.readouterr().err
    for name in ("--eps", "--step-size"):
        assert evaluate(name, "2") == 2
        told = f"{name}: expected a number at least 0 and at most 1, got 2.0"
        assert told in capsys.readouterr().err
    assert evaluate("--norm", "l2", "--eps", "0.5") == 0
    assert "eps 0.5 in L2, step 0.1, seed 3" in capsys.readouterr().out
    [written] = aside(run)
    assert results(written)["norm"] == attacks(written)["pgd2"]["settings"]["norm"].lower() == "l2"


def test_fewer_images_stay_out_and_more_go_in(run: Path) -> None:
    before = (run / "results.json").read_bytes()
    assert evaluate("--limit", "10") == 0
    assert (run / "results.json").read_bytes() == before
    [written] = aside(run)
    assert attacks(written)["pgd2"]["count"] == 10
    assert evaluate("--limit", "all", "--attacks", "natural") == 0
    record = results(run / "results.json")
    counts = {name: a["count"] for name, a in record["models"]["trained"]["attacks"].items()}
    assert counts == {"natural": record["test_images"], "pgd2": 20}
    assert len(aside(run)) == 1


def test_a_part_that_fits_goes_in_and_the_whole_is_kept_beside(run: Path) -> None:
    old = attacks(run / "results.json")["natural"]
    assert evaluate("--limit", "10", "--attacks", "natural,cw1") == 0
    stored = attacks(run / "results.json")
    assert stored["natural"] == old and stored["cw1"]["count"] == 10
    [written] = aside(run)
    assert list(attacks(written)) == ["natural", "cw1"]


def test_results_of_other_weights_are_kept_beside(run: Path) -> None:
    file, old = run / "model.safetensors", results(run / "results.json")
    metadata = read_metadata(file)
    model = load_model(file, metadata)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    save_weights(model, file, metadata)
    assert evaluate("--attacks", "natural", "--limit", "5") == 0
    assert list(attacks(run / "results.json")) == ["natural"]
    [written] = aside(run)
    assert results(written) == old


def test_autoattack_takes_the_runs_limit_or_all(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_all(_guard: object, _load: object, correct: torch.Tensor, **_: object) -> Outcome:
        return Outcome(torch.zeros_like(correct), {"square": 0}, 0.1, ())

    # The attack itself is tested elsewhere; here it matters which images it gets.
    monkeypatch.setattr("cure_fast.evaluation.measurement.run_autoattack", break_all)
    assert evaluate("--attacks", "aa") == 0
    entry = results(run / "results.json")["models"]["trained"]
    found = entry["attacks"]["aa"]
    assert found["count"] == 4 and entry["nrr_aa"] is not None
    assert evaluate("--attacks", "natural", "--limit", "4") == 0
    [written] = aside(run)
    assert found["settings"]["natural_correct"] == attacks(written)["natural"]["correct"]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "on the first 4 images" in page
    assert evaluate("--attacks", "aa", "--limit", "6", "--aa-limit", "all") == 0
    assert attacks(run / "results.json")["aa"]["count"] == 6


@pytest.mark.parametrize(
    "words",
    [
        ["--data", "digits"],
        ["--model", "resnet18"],
        ["--width", "4"],
        ["--stem", "cifar"],
        ["--normalize", "none"],
        ["--out", "elsewhere"],
    ],
    ids=lambda words: words[0],
)
def test_flags_for_files_are_refused_with_a_run(
    run: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(*words) == 2
    told = capsys.readouterr().err
    assert words[0] in told and "only for a file" in told and not Path("elsewhere").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("limit", 0), ("aa_limit", 0), ("eps", -0.1), ("seed", -1), ("batch_size", 0), ("width", 0)],
)
def test_values_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')}:"):
        EvalArgs(**{name: value})


def test_the_data_root_is_used(run: Path) -> None:
    config = results(run / "config.json")
    config["data"]["data"] = "cifar10"
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        asked: list[Path] = []

        def read(_name: str, root: Path, _split: str, **_: object) -> None:
            asked.append(root)
            raise InputError("no images there")

        patch.setattr("cure_fast.cli.evaluate.read_dataset", read)
        assert evaluate() == 2 and evaluate("--data-root", "other") == 2
    assert asked == [Path("data"), Path("other")]


@pytest.mark.parametrize("normalize", ["none", "dataset"])
def test_a_foreign_file_is_described_by_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalize: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = build_for_data(
        "resnet18", data="digits", num_classes=10, width=2, stem="imagenet", normalize=normalize
    )
    torch.save(model.state_dict(), "foreign.pt")
    words = ["eval", "foreign.pt", "--attacks", "natural", "--limit", "30", "--device", "cpu"]
    words += ["--model", "resnet18", "--width", "2", "--out", "out"]
    assert main(words) == 2, "the data set is not known"
    words += ["--data", "digits", "--normalize", normalize]
    assert main(words) == 2, "the stem differs"
    assert main([*words, "--stem", "imagenet"]) == 0
    found = results(Path("out/results.json"))["models"]["foreign"]["attacks"]["natural"]
    assert found["count"] == 30

    from cure_fast.loaders import read_dataset

    test = read_dataset("digits", Path("data"), "test")
    x = torch.from_numpy(test.images[:30]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        right = model.eval()(x).argmax(dim=1) == torch.from_numpy(test.labels[:30])
    assert found["correct"] == int(right.sum())


def test_the_same_weights_make_the_same_bytes(tmp_path: Path) -> None:
    model = build_for_data(
        "resnet-small", data="", num_classes=3, width=1, stem="cifar", normalize="none"
    )
    metadata = {name: str(index) for index, name in enumerate("recipe data model eps k".split())}
    files = [tmp_path / f"{index}.safetensors" for index in range(8)]
    for index, file in enumerate(files):
        items = list(metadata.items())
        save_weights(model, file, dict(items[index % 5 :] + items[: index % 5]))
    assert len({file.read_bytes() for file in files}) == 1
    assert read_metadata(files[0]) == metadata
    with safe_open(files[0], framework="pt") as opened:
        assert len(opened.metadata()) == 1
    # As earlier versions wrote it.
    old = tmp_path / "old.safetensors"
    save_file({"weight": torch.zeros(2)}, old, metadata)
    assert read_metadata(old) == metadata


@pytest.mark.parametrize("text", ["{", "[1]", '{"width": 4}'])
def test_damaged_metadata_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, file, {"cure-fast": text})
    with pytest.raises(InputError, match="metadata"):
        read_metadata(file)


def result(attack: str, correct: int, count: int, **settings: int) -> AttackResult:
    return AttackResult(attack, correct, count, 1.0, settings)


def test_ratios_take_the_longest_attack_on_the_same_images() -> None:
    found = [result("natural", 80, 100), result("cw5", 60, 100), result("cw40", 40, 100)]
    found += [result("cw100", 1, 10), result("aa", 4, 10, natural_correct=6)]
    entry = model_entry("model", {r.attack: r for r in found})
    assert entry["nrr_cw"] == pytest.approx(2 * 80 * 40 / 120)
    assert entry["nrr_aa"] == pytest.approx(2 * 60 * 40 / 100)
    without = model_entry("model", {"natural": found[0], "aa": result("aa", 4, 10)})
    assert without["nrr_aa"] is None and without["nrr_cw"] is None


@pytest.mark.parametrize("count", [9, 10, 11])
def test_a_result_is_replaced_by_one_of_as_many_images(count: int) -> None:
    def record(result: AttackResult) -> dict[str, Any]:
        models = {"trained": model_entry("t", {"pgd1": result}) | {"weights": "w"}}
        return {"classes": ["a", "b"], "models": models}

    merged, complete = merge_results(
        record(result("pgd1", 5, 10)), record(result("pgd1", 4, count))
    )
    now = merged["models"]["trained"]["attacks"]["pgd1"]
    assert complete == (count >= 10)
    assert (now["correct"], now["count"]) == ((4, count) if complete else (5, 10))


def test_further_networks_join_the_record_and_unknown_ones_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = results(run / "results.json")["models"]
    assert list(before) == ["trained"]
    kept = (run / "results.json").read_bytes()
    assert evaluate("--networks", "revision,raw") == 2
    told = capsys.readouterr().err
    assert "no network 'raw'; it has revision." in told and len(told.splitlines()) == 1
    assert (run / "results.json").read_bytes() == kept
    assert evaluate("--networks", "revision") == 0
    after = results(run / "results.json")["models"]
    assert after["trained"] == before["trained"]
    assert after["revision"]["title"] == "revision network, the result's best epoch 1 of 1"
    assert after["revision"]["weights"] != after["trained"]["weights"]
    assert main(["eval", "run/revision.safetensors", "--networks", "raw"]) == 2
    assert "only for a run folder" in capsys.readouterr().err


def test_accuracies_by_class_make_up_the_accuracy_and_are_kept(run: Path) -> None:
    stored = attacks(run / "results.json")["pgd2"]
    result = AttackResult.from_dict(stored)
    labels = read_dataset("digits", Path("data"), "test", download=False).labels[:20]
    counts = np.bincount(labels, minlength=10)
    assert [share is None for share in result.by_class] == [not count for count in counts]
    right = sum(
        count * (share or 0) / 100 for count, share in zip(counts, result.by_class, strict=True)
    )
    assert right == pytest.approx(result.correct)
    assert result.to_dict() == stored
    del stored["by_class"]
    assert AttackResult.from_dict(stored).by_class == ()


def test_a_class_without_images_has_no_accuracy() -> None:
    right = torch.tensor([True, False, True, True])
    assert by_class(right, torch.tensor([0, 0, 2, 2]), 4) == (50.0, None, 100.0, None)


def test_what_is_stopped_says_how_it_goes_on() -> None:
    for kept, how in ((True, "continues it."), (False, "starts anew, and --out FOLDER would")):
        with pytest.raises(StoppedError, match=f"^evaluation stopped by a signal; .* {how}"):
            with stoppable(kept=kept):
                Guard(nn.Identity(), stop=lambda: True)(torch.rand(1, 3, 8, 8))
