"""That the bench of steps on a CPU takes each kind in turn, in the precision asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import cpu_steps
from bench.gpu.plan import Plan
from cure_fast.classifier import ImageClassifier


@pytest.fixture(autouse=True)
def same_threads():
    former = torch.get_num_threads()
    yield
    torch.set_num_threads(former)


def test_medians_and_ratios_are_of_the_steps_taken(capsys, monkeypatch):
    clock = iter(range(1000))
    # From before a step to after it: 1, 2, 3 and 4 s, whatever the turn.
    times = (t for t in clock for t in (10 * t, 10 * t + 1 + t % 4))
    monkeypatch.setattr(cpu_steps.time, "process_time", lambda: float(next(times)))
    cpu_steps.main(["--tiny", "--batch", "4", "--rounds", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("--amp off")
    assert [line.split()[:3] for line in lines[1:5]] == [
        ["cure", "eager", "1.000"],
        ["cure", "authors", "2.000"],
        ["trades", "eager", "3.000"],
        ["trades", "authors", "4.000"],
    ]
    assert lines[5:] == [
        "cure eager / cure authors: 0.50",
        "trades eager / trades authors: 0.75",
        "cure eager / trades eager: 0.33",
    ]


@pytest.mark.parametrize(("amp", "half"), [("off", False), ("bf16", True)])
def test_precision_is_that_of_our_steps_alone(tmp_path, monkeypatch, amp, half):
    seen: list[bool] = []
    forward = ImageClassifier.own_logits

    def own_logits(self: ImageClassifier, x: torch.Tensor) -> torch.Tensor:
        seen.append(self.compute_dtype is torch.bfloat16)
        return forward(self, x)

    monkeypatch.setattr(ImageClassifier, "own_logits", own_logits)
    plan = Plan(torch.device("cpu"), tiny=True, seconds=0.0, out=Path())
    for (_, engine), step in cpu_steps.build_steps(plan, 4, amp, tmp_path).items():
        seen.clear()
        step()
        assert seen and set(seen) == {half and engine == "eager"}
