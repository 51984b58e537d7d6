"""What is read of the processor, and what is said where it makes a choice a bad one."""

from __future__ import annotations

import pytest
import torch

from cure_fast.runs import environment
from cure_fast.runs.environment import processor_name, warn_of_emulation

CPU = torch.device("cpu")
OLD = "processor\t: 0\nmodel name\t: Old: One\nflags\t\t: fpu avx2 avx512f\n\nprocessor\t: 1\n"


@pytest.fixture
def told(tmp_path, monkeypatch):
    """The file in which Linux tells of the processors."""
    monkeypatch.setattr(environment, "CPUINFO", tmp_path / "cpuinfo")
    return tmp_path / "cpuinfo"


@pytest.mark.parametrize(
    ("text", "amp", "device", "warns"),
    [
        (OLD, "bf16", "cpu", True),
        (OLD, "auto", "cpu", False),
        (OLD, "bf16", "cuda", False),
        (OLD.replace("avx512f", "avx512_bf16"), "bf16", "cpu", False),
        (OLD.replace("avx512f", "amx_bf16"), "bf16", "cpu", False),
        ("processor : 0\nFeatures : fp asimd\n", "bf16", "cpu", True),
        ("processor : 0\nFeatures : fp asimd bf16\n", "bf16", "cpu", False),
        ("", "bf16", "cpu", False),
        (None, "bf16", "cpu", False),
    ],
)
def test_bf16_without_instructions_for_it_is_warned_of(told, capsys, text, amp, device, warns):
    if text is not None:
        told.write_text(text, encoding="utf-8")
    warn_of_emulation(amp, torch.device(device))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == warns
    assert all(line.startswith("warning: --amp bf16: this processor has no") for line in lines)


def test_the_name_of_the_processor(told):
    assert processor_name()
    told.write_text(OLD, encoding="utf-8")
    assert processor_name() == "Old: One"
