from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CLAIM = "paper\N{RIGHT SINGLE QUOTATION MARK}s claim"
HOSTILE = '<script>alert("1")</script>\'" onerror=x & <img src=http://evil.test/x>'

Read = Callable[[Path], Any]
Make = Callable[..., Path]


def test_the_answer_comes_first_and_each_number_once(page_of: Read, complete_run: Path) -> None:
    page = page_of(complete_run)
    answer = page.text.split("Results on test images")[0]
    assert "CURE on CIFAR-10" in answer and "8/255" in answer
    # The strongest attack is AutoAttack, not that with the most images.
    assert (
        "CURE classifies 71.20 % of the 1,000 test images right and still 31.2 % of the first 256 "
        "under AutoAttack. The naturally trained network that it started from had 83.10 % and "
        "0.0 %." in answer.replace(" .", ".")
    )
    # In the sentence and in the chart with its table.
    assert page.text.count("71.20 %") == 2 and page.text.count("37.10 %") == 1
    pgd = page.bars("PGD-20")
    assert list(pgd) == ["before CURE", "CURE", CLAIM]
    assert pgd["before CURE"] == ["0.20 %", "2 of 1,000; 95 %: 0.1 to 0.7"]
    assert pgd["CURE"] == ["37.10 %", "371 of 1,000; 95 %: 34.2 to 40.1 +36.90 from the start"]
    assert pgd[CLAIM] == ["54.92 %", "CURE: \N{MINUS SIGN}17.82"]
    assert "AutoAttack first 256 of the 1,000 test images" in page.text
    assert page.bars("NRR (C&W)", "NRR")["CURE"] == ["46.3 %", "+46.1 from the start"]


@pytest.mark.parametrize(
    "attacks, quoted", [(("cw20", "pgd20"), "34.30 %"), (("pgd20",), "37.10 %")]
)
def test_without_autoattack_the_lowest_accuracy_is_quoted(
    page_of: Read, new_run: Make, results: dict[str, Any], attacks: tuple[str, ...], quoted: str
) -> None:
    for model in results["models"].values():
        model["attacks"] = {k: v for k, v in model["attacks"].items() if k in ("natural", *attacks)}
    answer = page_of(new_run(results=results)).text.split("Results on test images")[0]
    assert f"right and still {quoted} under" in answer


def test_the_waterfall_shows_what_each_part_of_autoattack_leaves(
    page_of: Read, complete_run: Path, results: dict[str, Any]
) -> None:
    label = "What AutoAttack leaves"
    found = page_of(complete_run).bars("CURE", label)
    minus = "\N{MINUS SIGN}"
    assert found == {
        "Natural": ["180", ""],
        "after APGD-CE": ["92", f"{minus}88"],
        "after APGD-T": ["81", f"{minus}11"],
        "after FAB-T": ["80", f"{minus}1"],
        "after Square": ["80", ""],
    }
    # Results of earlier versions, and nonsense, have none.
    for broken in (None, {"apgd-ce": 300}, {"apgd-ce": "x"}, []):
        for model in results["models"].values():
            model["attacks"]["aa"]["settings"]["robust_after"] = broken
        (complete_run / "results.json").write_text(json.dumps(results))
        assert label not in {name for _, name in page_of(complete_run).tables}


def test_a_part_of_the_test_images_is_called_one(
    page_of: Read, new_run: Make, results: dict[str, Any]
) -> None:
    results["test_images"] = 10_000
    page = page_of(new_run(results=results))
    assert "71.20 % of the first 1,000 of the 10,000 test images right" in page.text
    assert "Natural first 1,000 of the 10,000 test images" in page.text
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
    assert "54.92" not in page.text and CLAIM not in page.text


def test_a_value_the_paper_does_not_give_is_not_made_up(
    page_of: Read, new_run: Make, results: dict[str, Any]
) -> None:
    results["paper"]["aa"] = None
    page = page_of(new_run(results=results))
    assert page.bars("AutoAttack")[CLAIM] == ["not given", ""]
    assert page.bars("NRR (AA)", "NRR")[CLAIM] == ["not given", ""]


def only_what_is_ours(page: Any) -> None:
    """Fail where the page holds what could load or run anything but its own script."""
    assert not page.all("iframe") and not page.all("object") and page.all("script") == [{}]
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(name)
            # A link loads nothing until somebody follows it.
            ours = ("#", "https://arxiv.org/abs/") if tag == "a" else ("data:",)
            assert value is None or value.startswith(ours), (tag, name, value)


def test_the_page_loads_nothing_and_runs_its_own_script_alone(
    page_of: Read, complete_run: Path
) -> None:
    page, text = page_of(complete_run), (complete_run / "report.html").read_text(encoding="utf-8")
    only_what_is_ours(page)
    assert "http://" not in text and "@import" not in text
    policy = next(m for m in page.all("meta") if m.get("http-equiv"))
    rules = dict(rule.split(" ", 1) for rule in (policy["content"] or "").split("; "))
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["default-src"] == "'none'" and rules["script-src"] == f"'sha256-{digest}'"
    # Every link within the page leads somewhere.
    places = {attributes.get("id") for _, attributes in page.tags}
    inside = {(a["href"] or "")[1:] for a in page.all("a") if (a["href"] or "").startswith("#")}
    assert len(inside) == 8 and inside <= places
    assert {a["href"] for a in page.all("a")} >= {"https://arxiv.org/abs/2401.14948"}


def test_no_folder_of_this_machine_is_told(
    page_of: Read, new_run: Make, results: dict[str, Any]
) -> None:
    secret = "/srv/somebody/private place"
    results["warnings"] = ["seen in /srv/somebody/x/y.pt, twice"]
    results["models"]["trained"]["title"] = "CURE of /srv/somebody/x/y.pt"
    folder = new_run(results=results)

    def moved(config: dict[str, Any]) -> dict[str, Any]:
        config["data"] |= {"data": f"folder:{secret}/photos", "data_root": f"{secret}/data"}
        config["run"] |= {"out": "~/runs/x", "cache": f"{secret}/cache/"}
        config["model"]["init_from"] = f"{secret}/timm.safetensors"
        return config

    rewrite(folder, "config.json", moved)
    facts = json.loads((folder / "environment.json").read_text())
    facts |= {"command": [f"{secret}/cure-fast", "train", f"--out={secret}/run"], "place": secret}
    (folder / "environment.json").write_text(json.dumps(facts))
    page = page_of(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "somebody" not in text and "private" not in text.replace("…/private place", "")
    assert "~/" not in text and str(folder.parent) not in text
    assert "CURE on photos" in page.text and page.row("--cache")[1] == "…/cache"
    assert "…/cure-fast train --out=…/run" in page.text.replace("'", "")
    assert "seen in …/y.pt, twice" in page.text


def test_structure_is_accessible(page_of: Read, complete_run: Path) -> None:
    page = page_of(complete_run)
    names = [tag for tag, _ in page.tags]
    assert names.count("h1") == 1 and names.count("h2") >= 6
    assert page.all("html")[0]["lang"] == "en"
    assert all(image.get("alt") for image in page.all("img"))
    assert all(head.get("scope") in ("col", "row", "rowgroup") for head in page.all("th"))
    charts = [
        svg for svg in page.all("svg") if svg.get("class", "") in ("chart", "chart heat small")
    ]
    assert len(charts) == 9
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
    assert page.text.count("Do not quote these numbers") == 1
    assert page.text.count("PGD-20, CURE: gradients are zero on 40 % of the images") == 1
    assert "unreliable" in page.bars("PGD-20")["CURE"][0]
    # Beside the number alone: the warning is told once.
    assert page.text.lower().count("unreliable") == 1


def test_warnings_of_the_evaluation_are_shown(
    page_of: Read, new_run: Make, results: dict[str, Any]
) -> None:
    results["warnings"] = ["CURE: PGD-20 leaves fewer images than C&W-20"] * 2
    results["models"]["start"]["attacks"]["aa"]["warnings"] = ["check_dynamic did not run"]
    text = page_of(new_run(results=results)).text
    assert text.count("CURE: PGD-20 leaves fewer images than C&W-20") == 1
    assert "AutoAttack, before CURE: check_dynamic did not run" in text


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
    score["settings"] |= {"robust_after": {HOSTILE: 80}, "natural_correct": 99}
    (folder / "environment.json").write_text(json.dumps(facts))
    rows = (folder / "metrics.jsonl").read_text().replace('"consistency"', json.dumps(HOSTILE))
    rows = rows.replace('"conv1.weight"', json.dumps(HOSTILE)).replace(
        '"pgd10"', json.dumps(HOSTILE)
    )
    (folder / "metrics.jsonl").write_text(rows)
    np.savez(folder / "examples.npz", **(examples | {"attack": np.array(HOSTILE)}))  # pyright: ignore[reportArgumentType]
    page = page_of(folder)
    only_what_is_ours(page)
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
    assert "The adversarial images were made by PGD-20, against each network" in page.text
    # Rounded down, as no network is certain.
    assert page.text.count("98.3 %") == 12 and page.text.count("61.7 %") == 12


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
    charts = page.text.split("Accuracy in training and on validation images")[1].split("This run")[
        0
    ]
    assert "pre-training" not in charts.lower()


def test_settings_environment_and_files_are_listed(page_of: Read, complete_run: Path) -> None:
    page = page_of(complete_run)
    assert page.row("--batch-size")[1] == "128"
    assert page.row("--eps")[1] == "8/255"
    assert page.row("--milestones")[1] == "0.5, 0.75"
    assert page.row("--percentile")[1] == "30"
    assert page.row("PyTorch")[1] == "2.11.0"
    assert page.row("Commit")[1] == "0123456789abcdef, with changes that are not committed"
    assert "cure-fast train cifar10-small --out 'runs/a b' --data-root '…/c10'" in page.text
    assert page.row("checkpoints/")[2] == "1.2 kB in 1"


@pytest.mark.parametrize("names", [1, 59])
def test_what_the_mask_does_is_shown_by_layer_and_epoch(
    page_of: Read, new_run: Make, names: int
) -> None:
    folder = new_run(names=names)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["event"] == "epoch" and row["stage"] == "train"]
    text = page_of(folder).text
    for title in ("What the mask does", "Movement of the weights per layer", "Overlap of the mask"):
        assert title in text
    for key in ("movement", "mask_overlap", "masked_energy"):
        for name in rows[-1][key]:
            mean = 100 * np.mean([row[key][name] for row in rows if key in row])
            assert f"{name} {mean:.1f} %" in text
    # Without a mask there is nothing to show of it.
    rewrite(folder, "metrics.jsonl", lambda row: {k: v for k, v in row.items() if "mask" not in k})
    assert "mask does" not in page_of(folder).text


def test_training_accuracy_stands_beside_that_of_validation(page_of: Read, new_run: Make) -> None:
    folder = new_run()
    text = page_of(folder).text
    assert "natural, in training" in text and "training attack, in training" in text
    assert "Accuracy in training and on" in text and "Norm of the gradient" in text

    def older(row: dict[str, Any]) -> dict[str, Any]:
        for name in ("natural_accuracy", "adversarial_accuracy", "gradient_norm"):
            row["terms"].pop(name, None)
        return row

    rewrite(folder, "metrics.jsonl", older)
    text = page_of(folder).text
    assert "natural, in training" not in text and "Norm of the gradient" not in text
    assert "Accuracy on validation images" in text


def test_the_time_of_each_part_is_told(page_of: Read, complete_run: Path) -> None:
    found = page_of(complete_run).bars("Time", "Time by part of the run")
    # 15 epochs of 31 s, 8 of 2.4 s; 2 s of validation each; the attacks on two networks.
    assert found["CURE"][0] == "7 min 45 s" and found["natural pre-training"][0] == "19 s"
    assert found["validation"][0] == "46 s" and found["AutoAttack"][0] == "2 min 3 s"


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
    header = [cell.strip() for cell in next(r for r in page.cells if r[0].startswith("Epoch"))]
    recorded = dict(zip(header, page.row("15"), strict=True))
    assert recorded["revision rate"] == "0.2" and recorded["revision moves"] == "8"

    def other(row: dict[str, Any]) -> dict[str, Any]:
        own = ("movement", "mask", "mask_overlap", "masked_energy", "revision")
        kept = {k: v for k, v in row.items() if k not in own}
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
    assert "shares by layer" in page.text and "conv1.weight 25.0 %" in page.text
    assert "mask does" not in page.text and "evision" not in page.text
    rewrite(folder, "metrics.jsonl", lambda row: {k: v for k, v in row.items() if k != "shares"})
    assert "by layer" not in page_of(folder).text


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
    assert list(page.bars("PGD-20"))[:3] == [
        "before CURE",
        "CURE, ema network",
        "CURE, raw network",
    ]
    # Bars and times.
    assert "ema network 4.2 s" in page.text and "raw network 4.2 s" in page.text
    assert "trained 4.2 s" not in page.text


def test_the_last_epoch_stands_beside_the_best_with_its_difference(
    page_of: Read, new_run: Make, results: dict[str, Any]
) -> None:
    models = results["models"]
    attacks = {"pgd20": models["start"]["attacks"]["pgd20"] | {"correct": 301, "accuracy": 30.1}}
    models["last"] = {"title": "CURE after the last epoch 15 of 15", "attacks": attacks}
    page = page_of(new_run(results=results))
    pgd = page.bars("PGD-20")
    assert list(pgd)[:3] == ["before CURE", "CURE", "CURE after the last epoch"]
    # 30.1 after the last epoch, 37.1 in the best.
    assert pgd["CURE after the last epoch"][1].endswith("\N{MINUS SIGN}7.00 from the best epoch")
    assert "CURE after the last epoch" not in page.bars("Natural")
    assert "CURE after the last epoch 15 of 15" in page.text and "last epoch 4.2 s" in page.text


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
