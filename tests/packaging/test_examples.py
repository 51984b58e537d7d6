"""The committed example run still loads, and its README states its figures."""

from __future__ import annotations

import json
from pathlib import Path

from cure_fast.report import write_report
from cure_fast.runs.folder import load_config
from cure_fast.runs.log import read_rows

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "example-cifar10"


def test_the_example_loads_and_its_figures_are_the_readmes(tmp_path):
    config = load_config(EXAMPLE)
    assert (config.data.data, config.data.train_images, config.method) == ("cifar10", 5000, "cure")
    models = json.loads((EXAMPLE / "results.json").read_text())["models"]
    text = (EXAMPLE / "README.md").read_text()
    for name in ("start", "trained"):
        for attack in ("natural", "pgd20", "cw20"):
            result = models[name]["attacks"][attack]
            assert result["count"] == 10_000 and result["reliable"]
            assert f"{result['accuracy']:.2f} %" in text
    pgd = [models[name]["attacks"]["pgd20"]["accuracy"] for name in ("trained", "start")]
    assert pgd[0] >= pgd[1] + 15


def test_the_example_still_makes_a_report(tmp_path):
    for name in ("config.json", "environment.json", "metrics.jsonl", "results.json"):
        (tmp_path / name).write_text((EXAMPLE / name).read_text())
    assert len(read_rows(tmp_path / "metrics.jsonl")) > 40
    assert "22.03" in write_report(tmp_path).read_text()
