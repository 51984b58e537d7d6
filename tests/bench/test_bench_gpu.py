"""The GPU benchmark as a command: its options, its parts, and a rehearsal."""

from __future__ import annotations

import json
import platform
import re
import runpy
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from bench import bench_kernels
from bench.gpu import __main__ as command
from bench.gpu import gate, kernel_part, plan
from bench.gpu.plan import Plan
from bench.gpu.record import Row
from bench.gpu.sources import CODE, digest_of
from cure_fast.config import EngineFeature

CPU = torch.device("cpu")


@pytest.fixture
def tiny(tmp_path) -> Plan:
    return Plan(CPU, True, 60.0, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "--device cpu: expected --tiny with it"),
        (["--device", "cpu"], "`python -m bench.gpu --tiny --device cpu` rehearses"),
        (["--device", "cuda:99"], "usable GPUs. Name another, or rehearse without one: `python"),
        (["--device", "tpu"], "--device: expected cpu, cuda"),
        (["--tiny", "--device", "cpu", "--seconds-per-part", "0"], "expected more than 0, got 0"),
    ],
)
def test_wrong_options_are_refused_in_one_line(arguments, said, capsys) -> None:
    assert command.main(arguments) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_machine_without_gpu_is_told_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Take --device cpu" not in err
    assert err.startswith("error: --device cuda: this machine has 0 usable GPUs. ")
    # What it names works: the words of a command line that is accepted.
    told = re.search(r"`python -m bench.gpu (.+)`", err)
    assert told is not None
    arguments = told[1].split()
    assert command.plan_of(command.parser().parse_args(arguments), arguments).device == CPU


def test_help_says_what_device_takes() -> None:
    text = " ".join(command.parser().format_help().split())
    assert "cuda, cuda:N for the GPU of that number, or cpu, which can only rehearse" in text


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_results_cannot_go_into_a_file(tmp_path, monkeypatch, capsys, below) -> None:
    monkeypatch.setattr(command, "require_green_tests", lambda plan: pytest.fail("tested"))
    file = tmp_path / "kept.txt"
    file.write_text("mine", encoding="utf-8")
    assert command.main(["--tiny", "--device", "cpu", "--out", f"{file}{below}"]) == 2
    err = capsys.readouterr().err
    got = "not a directory" if below else "a file"
    assert f"--out {file}{below}: expected a folder" in err and f"got {got}. Name" in err
    assert err.count("\n") == 1 and file.read_text() == "mine"


@pytest.mark.parametrize(("rows", "said"), [(0, "nothing was measured"), (1, "1 rows were")])
def test_an_interrupted_part_says_what_it_kept(tmp_path, monkeypatch, capsys, rows, said) -> None:
    def stopped(plan, record) -> None:
        for _ in range(rows):
            record.add(Row({"engine": "fast"}, rounds=(0.016,)))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "require_green_tests", lambda plan: None)
    monkeypatch.setitem(command.PARTS, "feeds", stopped)
    arguments = ["--part", "feeds", "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(arguments) == command.INTERRUPTED
    assert f"feeds: {said}" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "feeds.json").read_text())["rows"]) == rows


def test_each_of_several_parts_is_a_process_and_one_failure_is_told(
    tmp_path, monkeypatch, capsys
) -> None:
    ran = []

    def run_process(arguments, seconds) -> int:
        ran.append((arguments[1:5], seconds))
        return int("feeds" in arguments)

    monkeypatch.setattr(command, "run_process", run_process)
    monkeypatch.setattr(command, "require_green_tests", lambda plan: None)
    arguments = ["--part", "ceilings", "feeds", "gate", "wrn34-10", "feeds", "--tiny"]
    arguments += ["--device", "cpu"]
    assert command.main([*arguments, "--out", str(tmp_path), "--seconds-per-part", "7"]) == 1
    parts = ["ceilings", "feeds", "wrn34-10-128", "wrn34-10-512", "wrn34-10-256"]
    assert [call[0][-1] for call in ran] == parts
    assert all(seconds == 7 + command.GRACE for _, seconds in ran)
    assert capsys.readouterr().err == "error: see the failures in feeds\n"


@pytest.mark.parametrize("named", [True, False])
def test_nothing_that_is_written_names_the_machine_or_its_folders(
    tmp_path, monkeypatch, named
) -> None:
    def part(plan, record) -> None:
        record.add(Row({"engine": "fast"}, rounds=(0.016,)))
        record.add(Row({"engine": "eager"}, "left out", f"no {tmp_path}/deep/a.so"))
        raise FileNotFoundError(2, "No such file", str(tmp_path / "deep" / "b.so"))

    def run_process(arguments, seconds) -> int:
        return command.main(arguments[3:])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "default_folder", lambda device, tiny: tmp_path / "own")
    monkeypatch.setattr(command, "require_green_tests", lambda plan: None)
    monkeypatch.setattr(command, "run_process", run_process)
    for module, name in ((platform, "node"), (socket, "gethostname")):
        monkeypatch.setattr(module, name, lambda: "name-of-this-machine")
    for name in ("ceilings", "feeds"):
        monkeypatch.setitem(command.PARTS, name, part)
    arguments = ["--part", "ceilings", "feeds", "--tiny", "--device", "cpu"]
    assert command.main([*arguments, *(("--out", "own") if named else ())]) == 1
    texts = {path.name: path.read_text() for path in (tmp_path / "own").iterdir()}
    names = {f"{part}.{ending}" for part in ("ceilings", "feeds") for ending in ("json", "md")}
    assert set(texts) == {*names, "summary.md"}
    found = json.loads(texts["feeds.json"])
    assert found["about"]["command"] == (
        "python -m bench.gpu --part feeds --out own --device cpu --seconds-per-part 450 --tiny"
    )
    assert [row["note"] for row in found["rows"]] == [
        "", "no a.so", "FileNotFoundError: [Errno 2] No such file: 'b.so'",
    ]  # fmt: skip
    for private in (str(tmp_path), str(gate.ROOT), str(Path.home()), "name-of-this-machine"):
        assert not [name for name, text in texts.items() if private in text]


@pytest.mark.slow
def test_kernels_rehearsed_on_the_cpu_leave_their_record_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command, "require_green_tests", lambda plan: None)
    monkeypatch.setattr(kernel_part, "REHEARSED", "mask and sort")
    arguments = ["--part", "kernels", "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "kernels.json",
        "kernels.md",
        "summary.md",
    }
    (row,) = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    wanted = {"operation": "mask", "shapes": "rehearsal", "provider": "torch-sort"}
    assert row["key"] == wanted and len(row["rounds"]) == bench_kernels.REHEARSED
    assert row["figures"]["bytes_per_second"] > 0


def test_a_gpu_of_another_number_becomes_the_current_one(tmp_path, monkeypatch) -> None:
    def red(plan) -> None:
        raise gate.RedTestsError("the tests fail")

    chosen = []
    monkeypatch.setattr(command, "device_of", torch.device)
    monkeypatch.setattr(command, "require_green_tests", red)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cuda", "cuda:1"):
        command.main(["--device", name, "--out", str(tmp_path)])
    assert chosen == [torch.device("cuda:1")]


def test_a_part_that_hangs_is_stopped(capsys) -> None:
    # A shell's background job ignores SIGINT, and what it starts does so too.
    script = (
        "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "time.sleep(600)"
    )
    assert command.run_process([sys.executable, "-c", script], 0.5) != 0
    assert "not done in 0 s" in capsys.readouterr().err
    assert command.run_process([sys.executable, "-c", ""], 20) == 0


def test_a_part_that_breaks_is_written_and_fails(tiny, monkeypatch) -> None:
    def broken(plan, record) -> None:
        record.add(Row({"engine": "fast"}, rounds=(0.016,)))
        raise RuntimeError("driver lost")

    monkeypatch.setitem(command.PARTS, "feeds", broken)
    assert command.run_part("feeds", tiny) == 1
    written = json.loads((tiny.out / "feeds.json").read_text())
    assert [row["status"] for row in written["rows"]] == ["measured", "failed"]
    assert written["rows"][1]["note"] == "RuntimeError: driver lost" and not written["finished"]


def test_there_is_a_part_per_model_and_batch_and_what_targets_name_comes_first() -> None:
    parts = [
        f"{m}-{b}" for m in ("resnet18", "preactresnet18", "wrn34-10") for b in (128, 256, 512)
    ]
    assert sorted(plan.STEP_PARTS) == sorted(parts)
    assert set(command.PARTS) == {*parts, "ceilings", "ablation", "feeds", "kernels"}
    assert list(command.PARTS)[:2] == ["ceilings", "resnet18-128"]
    assert command.parser().parse_args([]).part == list(command.PARTS)
    # Start and end take some of the eight minutes, and a machine's ten hold all there can be.
    assert command.SECONDS < 480 and command.SECONDS + command.GRACE + command.ENDING < 600


def test_a_rehearsal_of_all_engines_on_the_cpu(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command, "require_green_tests", lambda plan: None)
    monkeypatch.setattr(plan, "TINY", replace(plan.TINY, methods={"resnet18-128": ("cure",)}))
    # Tracing without backward graphs, which take seconds, and which test_bench_gpu_turns.py has.
    compiling = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, **options: compiling(module, **options | {"backend": "eager"}),
    )
    arguments = ["--part", "resnet18-128", "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    found = json.loads((tmp_path / "resnet18-128.json").read_text())
    rows = {row["key"]["engine"]: row for row in found["rows"]}
    assert set(rows) == set(plan.ENGINES) and found["finished"] and found["about"]["tiny"]
    for row in rows.values():
        assert row["status"] == "measured" and row["together"] == 1 and len(row["rounds"]) == 5
        low, median, high = row["seconds"]
        assert 0 < low <= median <= high and row["figures"]["share"] > 0
        assert row["figures"]["epoch_seconds"] == pytest.approx(12_500 * median)
    assert "not measured" in (tmp_path / "summary.md").read_text()
    title = "REHEARSAL: Seconds per CIFAR-10 epoch, resnet-small, batch 4"
    assert (tmp_path / "resnet18-128.svg").read_text().count(title) == 2
    page = (tmp_path / "resnet18-128.md").read_text()
    assert "torch.compile in its default mode" in page
    assert page.startswith("# REHEARSAL: resnet18-128\n")
    assert (tmp_path / "summary.md").read_text().startswith("# REHEARSAL: GPU benchmark: ")
    assert found["about"]["sources"] == digest_of(gate.ROOT, CODE)
    for name in ("commit", "dirty", "cuda", "driver", "torch", "triton", "date", "command"):
        assert name in found["about"]


def test_ceilings_and_ablation_rehearsed_on_the_cpu(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command, "require_green_tests", lambda plan: None)
    arguments = ["--tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(["--part", "ceilings", *arguments]) == 0
    found = json.loads((tmp_path / "ceilings.json").read_text())["rows"]
    assert {row["status"] for row in found} == {"measured"}
    assert {row["key"].get("pass") for row in found} > {"forward", "to inputs", "to weights"}
    copies = [row for row in found if row["key"].get("operation") == "copy"]
    assert len(copies) == 1 and copies[0]["figures"]["bytes_per_second"] > 1e6
    assert command.main(["--part", "ablation", *arguments]) == 0
    rows = json.loads((tmp_path / "ablation.json").read_text())["rows"]
    names = [f"without {name}" for name in get_args(EngineFeature)]
    assert [row["key"]["engine"] for row in rows] == ["all features", *names]
    assert rows[0]["figures"]["gain"] == 1 and all(row["figures"]["gain"] > 0 for row in rows)


def test_it_runs_as_a_module(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(command.__file__, run_name="__main__")
    assert not ended.value.code and "--seconds-per-part" in capsys.readouterr().out
