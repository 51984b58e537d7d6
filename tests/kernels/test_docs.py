"""The snippets of docs/kernels.md run one after another, and do what the text says."""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from cure_fast import models

DOCS = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


class Small(nn.Module):
    """Stands for the network of the snippets, which takes seconds a step on a CPU."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 10, 3, bias=False), nn.BatchNorm2d(10)
        self.linear = nn.Linear(10, 10)

    def forward(self, x):
        return self.linear(self.bn1(self.conv1(x)).relu().mean((2, 3)))


def test_the_blocks_run_one_after_another(monkeypatch):
    monkeypatch.setattr(models, "build_model", lambda name, *, num_classes: Small())
    section = DOCS.read_text(encoding="utf-8").split("## How to use them")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 5
    space = {}
    for block in blocks[:4]:
        exec(block, space)
    model, x, x_adv = space["model"], space["x"], space["x_adv"]
    assert x.shape == (8, 3, 32, 32)
    assert 0 < (x_adv - x).abs().max() <= 8 / 255 + 1e-6
    before = [p.detach().clone() for p in model.parameters()]
    for block in blocks[4:]:
        exec(block, space)
    kept, moved = (
        space["found"].kept,
        [(p != old).float().mean() for p, old in zip(model.parameters(), before, strict=True)],
    )
    # Weight decay moves masked weights too, but for those that are zero, as biases are here.
    assert 0.65 < kept.mean() < 0.75 and min(moved) > 0.6
