from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cure_fast.report import write_report

HOSTILE = '<script>alert("1")</script>\'" onerror=x & <img src=http://evil.test/x>'

Read = Callable[[Path], Any]
Make = Callable[..., Path]


def test_the_answer_comes_first_with_counts_intervals_and_the_start(
    page_of: Read, complete_run: Path
) -> None:
    page = page_of(complete_run)
    answer = page.text.split("Results on test images")[0]
    for part in ("CURE on CIFAR-10", "71.20 %", "37.10 %", "83.10 %", "0.20 %", "8/255"):
        assert part in answer
    assert "71.20 % of the 1,000 test images right and still 37.10 %" in answer
    assert "712 of 1,000 images" in answer and "80 of 256 images" in answer
    pgd = page.row("PGD-20")
    assert pgd[2] == "37.10 % 371 of 1,000 95 %: 34.2 to 40.1"
    assert pgd[3:] == ["+36.90", "54.92 %", "\N{MINUS SIGN}17.82"]
    assert "80 of 256, a part of the test images" in page.row("AutoAttack")[2]
    assert page.row("NRR (C&W)")[1:4] == ["0.2 %", "46.3 %", "+46.1"]


def test_a_part_of_the_test_images_is_called_one(
    page_of: Read, new_run: Make, results: dict[str, Any]
) -> None:
    results["test_images"] = 10_000
    page = page_of(new_run(results=results))
    assert "71.20 % of 1,000 of the 10,000 test images right" in page.text
    assert "712 of 1,000, a part of the test images" in page.row("Natural")[2]
    assert "PGD-20 on 1,000 test images only" in page.text


def test_the_paper_row_says_what_makes_it_incomparable(page_of: Read, complete_run: Path) -> None:
    text = page_of(complete_run).text
    assert "can only be compared where data set, model and all test images are the same" in text
    for part in (
        "epochs 15 instead of 200",
        "epochs of natural pre-training 8 instead of 200",
        "schedule onecycle instead of multistep",
        "training images 5,000 instead of all",
        "width of the network 16 instead of the published one",
        "training attack's steps 5 instead of 10",
        "AutoAttack on 256 test images only",
    ):
        assert text.count(part) == 1, part
    assert text.count("500 training images were held out to pick the best epoch") == 1
    assert "eps of the evaluation" not in text and "batch size" not in between(text)


def between(text: str) -> str:
    """Return the part of the page's text that lists what makes a run incomparable."""
    return text.split("Not comparable as it stands: ")[1].split("training images were held")[0]


def test_without_a_paper_row_no_paper_number_appears(
    page_of: Read, new_run: Make, results: dict[str, Any]
) -> None:
    results["paper"] = None
    page = page_of(new_run(results=results))
    assert "The paper gives no result for this combination" in page.text
    assert "54.92" not in page.text and len(page.row("PGD-20")) == 4


def test_a_value_the_paper_does_not_give_is_not_made_up(
    page_of: Read, new_run: Make, results: dict[str, Any]
) -> None:
    results["paper"]["aa"] = None
    page = page_of(new_run(results=results))
    assert page.row("AutoAttack")[-2:] == ["not given", ""]
    assert page.row("NRR (AA)")[-2:] == ["not given", ""]


def test_the_page_loads_nothing_and_runs_nothing(page_of: Read, complete_run: Path) -> None:
    text = write_report(complete_run).read_text(encoding="utf-8")
    page = page_of(complete_run)
    assert not page.all("script") and not page.all("iframe") and not page.all("object")
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:"), (tag, name, value)
    assert "http://" not in text and "https://" not in text and "@import" not in text
    policy = next(m for m in page.all("meta") if m.get("http-equiv"))
    assert (policy.get("content") or "").startswith("default-src 'none'")


def test_structure_is_accessible(page_of: Read, complete_run: Path) -> None:
    page = page_of(complete_run)
    names = [tag for tag, _ in page.tags]
    assert names.count("h1") == 1 and names.count("h2") >= 6
    assert page.all("html")[0]["lang"] == "en"
    assert all(image.get("alt") for image in page.all("img"))
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    charts = [
        svg for svg in page.all("svg") if svg.get("class", "") in ("chart", "chart heat small")
    ]
    assert len(charts) == 5
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in charts)
    anchors = [a["id"] for _, a in page.tags if "id" in a]
    assert len(anchors) == len(set(anchors))


def test_an_unreliable_result_is_flagged_wherever_it_stands(
    page_of: Read, new_run: Make, results: dict[str, Any]
) -> None:
    assert "unreliable" not in page_of(new_run(results=results)).text.lower()
    score = results["models"]["trained"]["attacks"]["pgd20"]
    score |= {"reliable": False, "warnings": ["gradients are zero on 40 % of the images"]}
    page = page_of(new_run(results=results))
    assert "Unreliable results: do not quote these numbers" in page.text
    assert "PGD-20, trained: gradients are zero on 40 % of the images" in page.text
    assert "unreliable" in page.row("PGD-20")[2] and "unreliable" not in page.row("PGD-20")[1]
    # Box, tile, bar and table cell.
    assert page.text.lower().count("unreliable") == 4


def test_warnings_of_the_evaluation_are_shown(
    page_of: Read, new_run: Make, results: dict[str, Any]
) -> None:
    results["warnings"] = ["PGD-20 leaves fewer images than C&W-20"]
    results["models"]["start"]["attacks"]["aa"]["warnings"] = ["check_dynamic did not run"]
    text = page_of(new_run(results=results)).text
    assert "PGD-20 leaves fewer images than C&W-20" in text
    assert "AutoAttack, start: check_dynamic did not run" in text


def test_everything_from_files_is_escaped(
    page_of: Read,
    new_run: Make,
    results: dict[str, Any],
    examples: dict[str, np.ndarray],
) -> None:
    results["classes"] = [HOSTILE] * 10
    results["warnings"] = [HOSTILE]
    results["paper"]["row"] = HOSTILE
    results["models"]["trained"]["title"] = HOSTILE
    score = results["models"]["trained"]["attacks"]["aa"]
    score |= {"warnings": [HOSTILE], "settings": {HOSTILE: HOSTILE}, "reliable": False}
    folder = new_run(results=results, examples=examples)
    config = json.loads((folder / "config.json").read_text())
    config |= {"name": HOSTILE, "method": HOSTILE}
    config["data"]["data"] = config["model"]["model"] = config["optim"]["schedule"] = HOSTILE
    config["settings"] = {HOSTILE: HOSTILE, "rgp": True}
    (folder / "config.json").write_text(json.dumps(config))
    facts = {"command": [HOSTILE], HOSTILE: HOSTILE, "cpu": HOSTILE}
    (folder / "environment.json").write_text(json.dumps(facts))
    rows = (folder / "metrics.jsonl").read_text().replace('"consistency"', json.dumps(HOSTILE))
    rows = rows.replace('"conv1.weight"', json.dumps(HOSTILE)).replace(
        '"pgd10"', json.dumps(HOSTILE)
    )
    (folder / "metrics.jsonl").write_text(rows)
    page = page_of(folder)
    assert not page.all("script")
    assert all((image.get("src") or "").startswith("data:") for image in page.all("img"))
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    # Shown as text, not dropped: in the lead, the warnings, the tables, captions and settings.
    assert page.text.count('<script>alert("1")</script>') > 20


def test_the_pictures_are_the_images_of_the_file(
    page_of: Read, complete_run: Path, examples: dict[str, np.ndarray]
) -> None:
    page = page_of(complete_run)
    pictures = [
        i for i in page.all("img") if i.get("alt") != "colour scale from dark blue to yellow"
    ]
    assert len(pictures) == 6 * 5
    first = [decode(image["src"] or "") for image in pictures[:5]]
    eps = 8 / 255
    for shown, name in ((0, "natural"), (1, "start_adversarial"), (3, "trained_adversarial")):
        assert np.array_equal(first[shown], np.rint(examples[name][0] * 255))
    for shown, model in ((2, "start"), (4, "trained")):
        delta = examples[f"{model}_adversarial"][0].astype(float) - examples["natural"][0]
        expected = np.clip(0.5 + delta * 0.5 / eps, 0, 1) * 255
        assert np.abs(first[shown] - expected).max() <= 0.501
    assert "multiplied by 15.9" in page.text and "largest 8/255" in page.text


def decode(address: str) -> np.ndarray:
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def test_right_and_wrong_are_told_in_words_and_signs(
    page_of: Read, complete_run: Path, examples: dict[str, np.ndarray]
) -> None:
    text = page_of(complete_run).text
    wrong = sum(
        int((examples[f"{m}_adversarial_prediction"] != examples["labels"]).sum())
        for m in ("start", "trained")
    )
    # One more of each sign stands in the explanation above the pictures.
    assert text.count("\N{BALLOT X}") == wrong + 1 and text.count("wrong: ") == wrong
    assert text.count("\N{CHECK MARK}") == 4 * 6 - wrong + 1


def test_pictures_without_a_start(
    page_of: Read,
    new_run: Make,
    results: dict[str, Any],
    examples: dict[str, np.ndarray],
) -> None:
    del results["models"]["start"]
    examples = {name: a for name, a in examples.items() if not name.startswith("start")}
    page = page_of(new_run(results=results, examples=examples, pretrain=0))
    assert "There is no naturally trained start to compare with" in page.text
    assert "Adversarial to the start" not in page.text
    charts = page.text.split("Accuracy on validation images")[1].split("This run")[0]
    assert "pre-training" not in charts.lower()


def test_settings_environment_and_files_are_listed(page_of: Read, complete_run: Path) -> None:
    page = page_of(complete_run)
    assert page.row("--batch-size")[1] == "128"
    assert page.row("--eps")[1] == "8/255"
    assert page.row("--milestones")[1] == "0.5, 0.75"
    assert page.row("--percentile")[1] == "30"
    assert page.row("PyTorch")[1] == "2.11.0"
    assert page.row("Commit")[1] == "0123456789abcdef, with changes that are not committed"
    assert "cure-fast train cifar10-small --out 'runs/a b'" in page.text
    assert page.row("checkpoints/")[2] == "1.2 kB in 1"


@pytest.mark.parametrize("names", [1, 8, 59])
def test_updated_weights_show_every_tensor(page_of: Read, new_run: Make, names: int) -> None:
    folder = new_run(names=names)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updated = [r["updated"] for r in rows if r["event"] == "epoch" and r["stage"] == "train"]
    page = page_of(folder)
    assert "nearly constant by construction" in page.text
    for name in updated[0]:
        mean = 100 * np.mean([values[name] for values in updated])
        assert f"{name} {mean:.1f} %" in page.text


def rewrite(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Replace each row of metrics.jsonl, or the object in another file, by what it changes to."""
    path = folder / name
    texts = path.read_text().splitlines() if name.endswith("l") else [path.read_text()]
    path.write_text("".join(json.dumps(change(json.loads(text))) + "\n" for text in texts))


def test_what_policies_record_is_shown_and_nothing_where_they_record_nothing(
    page_of: Read, new_run: Make
) -> None:
    folder = new_run()
    page = page_of(folder)
    header = next(row for row in page.cells if row[0].startswith("Epoch"))
    assert [cell.strip() for cell in header[-2:]] == ["revision rate", "revision moves"]
    assert page.row("15")[-2:] == ["0.2", "8"]

    def other(row: dict[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in row.items() if k not in ("updated", "revision")}
        if row["event"] == "epoch" and row["stage"] == "train":
            kept |= {"piat_share": 0.125, "shares": {"conv1.weight": 0.25}}
        return kept

    rewrite(folder, "metrics.jsonl", other)
    policies = {"piat": {"piat_share": None}, "awp": {"awp_gamma": 0.01}}
    chosen = {"method": "trades", "settings": {}, "policies": policies}
    rewrite(folder, "config.json", lambda config: config | chosen)
    page = page_of(folder)
    assert "TRADES + PIAT + AWP on CIFAR-10" in page.text
    assert "Policy: awp" in page.text and page.row("--awp-gamma")[1] == "0.01"
    assert page.row("15")[-1] == "0.125"
    assert "shares by tensor" in page.text and "conv1.weight 25.0 %" in page.text
    assert "Weights updated" not in page.text and "evision" not in page.text
    rewrite(folder, "metrics.jsonl", lambda row: {k: v for k, v in row.items() if k != "shares"})
    assert "by tensor" not in page_of(folder).text


def test_every_number_says_of_which_network_it_is(
    page_of: Read, new_run: Make, results: dict[str, Any]
) -> None:
    models = results["models"]
    models["raw"] = models["trained"] | {"title": "raw network, best epoch 12 of 15"}
    models["trained"] = models["trained"] | {"title": "TRADES + EMA, ema network"}
    folder = new_run(results=results | {"network": "ema"})

    def averaged(row: dict[str, Any]) -> dict[str, Any]:
        if row["event"] == "epoch" and row["stage"] == "train":
            found = row["validation"]
            raw = found | {"natural": found["natural"] - 7, "robust": found["robust"] - 5}
            if row["epoch"] == 7:
                raw["robust"] = 99.0
            # As earlier versions wrote it.
            others = {"networks": {"raw": raw}} if row["epoch"] > 3 else {"raw": raw}
            row["validation"] = found | {"network": "ema"} | others
        return row

    before = page_of(folder)
    rewrite(folder, "metrics.jsonl", averaged)
    page = page_of(folder)
    for name in ("natural (ema network)", "under PGD-10 (ema network)", "natural (raw network)"):
        assert name in page.text and name not in before.text
    assert "The ema network is the run's result, which decides" in page.text
    assert "have best epochs of their own: epoch 7 of the raw network." in page.text
    assert page.row("7 (best of raw)") and page.row("12 (best)")
    natural, robust = (float(cell) for cell in page.row("14")[1:3])
    columns = [cell.strip() for row in page.cells if row[0].startswith("Epoch") for cell in row]
    raw = [float(page.row("14")[columns.index(name)]) for name in ("raw natural", "raw robust")]
    assert raw == pytest.approx([natural - 7, robust - 5], abs=0.06)
    assert "Ema network \N{MINUS SIGN} start" in page.text
    # Bars and times.
    assert "ema network 4.2 s" in page.text and "raw network 4.2 s" in page.text
    assert "trained 4.2 s" not in page.text


def test_the_last_epoch_stands_beside_the_best_with_its_difference(
    page_of: Read, new_run: Make, results: dict[str, Any]
) -> None:
    models = results["models"]
    attacks = {"pgd20": models["start"]["attacks"]["pgd20"] | {"correct": 301, "accuracy": 30.1}}
    models["last"] = {"title": "CURE, last epoch 15 of 15", "attacks": attacks}
    page = page_of(new_run(results=results))
    header, row = page.row("Attack"), page.row("PGD-20")
    assert header[1:4] == [
        "naturally trained start",
        "CURE, best epoch 12 of 15",
        "CURE, last epoch 15 of 15",
    ]
    # 30.1 after the last epoch, 37.1 in the best.
    assert row[header.index("Last \N{MINUS SIGN} best epoch")] == "\N{MINUS SIGN}7.00"
    assert page.row("Natural")[header.index("Last \N{MINUS SIGN} best epoch")] == ""
    assert "last epoch 4.2 s" in page.text


def test_a_network_that_collapsed_shows_on_the_page(page_of: Read, new_run: Make) -> None:
    folder = new_run()

    def against_one_step(row: dict[str, Any]) -> dict[str, Any]:
        if row["event"] == "epoch" and row["stage"] == "train":
            row["validation"]["fgsm"] = row["validation"]["robust"] + 4
            if row["epoch"] > 9:
                row |= {"collapsed": True}
        return row

    assert "FGSM" not in page_of(folder).text
    rewrite(folder, "metrics.jsonl", against_one_step)
    page = page_of(folder)
    assert "under FGSM" in page.text and "FGSM %" in page.text
    assert "Catastrophic overfitting in epoch 10, 11, 12, 13, 14, 15: right under" in page.text
    assert page.row("9 (best)") and page.row("12 (collapsed)")
