"""The count of bytes: right for kernels whose traffic is known, and the design's for ours."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from cure_fast import kernels
from interpreter import hastened

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "traffic.py"
traffic = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
OPERATIONS = {operation.name: operation for operation in traffic.OPERATIONS}

# Bytes per element, counted by hand from what each operation is: those that must move, and those
# of the kernels. float32 has 4, bfloat16 2. The score is written once and read by the two later
# digits of the selection, then by the mask or the update.
EXPECTED = {
    "select": (4 + 4 + 4, 4 + 4 + 4 + 2 * 4),
    "threshold": (4 + 4, 20 + 4),
    "mask": (4 + 4 + 4, 12),
    "update": (4 + 2 * (4 + 4), 20),
    "select + mask": (2 * 4 + 4 + 4, 20 + 4 + 4 + 4),
    "select + update": (3 * 4 + 2 * (4 + 4), 20 + 4 + 4 + 2 * (4 + 4)),
    "select + update + average": (28 + 4 + 4, 44 + 4 + 4),
    "select + update, bf16 gradients and copy": (
        3 * 2 + 16 + 2,
        2 + 2 + 4 + 2 * 4 + 4 + 2 + 16 + 2,
    ),
    "average": (4 + 4 + 4, 12),
    "copy": (4 + 4, 8),
    "augment": (1 + 4, 5),
    "attack step, linf": (3 * 4 + 4, 16),
    "attack step, l2": (3 * 4 + 4, 4 + 3 * 4 + 4 * 4 + 4),
    "attack start, linf": (4 + 4, 8),
    "attack start, normal": (4 + 4, 8),
    "attack start, l2": (4 + 4, 8),
    # Four logits and four gradients; of each row of ten also a label, and six losses.
    "losses with a teacher": ((4 + 4) * 4 + (8 + 6 * 4) / 10, 35.2),
}
# Each chunk also reads its entries of tables and adds to counters, however few elements it has.
PER_CHUNK = 0.1


@pytest.fixture(autouse=True, scope="module")
def hastened_interpreter() -> Iterator[None]:
    with hastened():
        yield


@cache
def cost(name: str):
    return traffic.cost(OPERATIONS[name])


def test_every_operation_has_an_expectation() -> None:
    assert set(OPERATIONS) == set(EXPECTED)


def test_every_operation_of_the_package_is_counted() -> None:
    """The coin is one number, and the score alone has no kernel."""
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    operations = {name for name in kernels.__all__ if name.islower()}
    assert operations - used == {"flip_coin", "rgp_score"}


@pytest.mark.parametrize("name", EXPECTED)
def test_bytes_per_element_are_those_of_the_design(name: str) -> None:
    floor, moved = EXPECTED[name]
    assert cost(name).floor == pytest.approx(floor, rel=1e-12)
    assert moved <= cost(name).moved < moved + PER_CHUNK


def test_few_counters_are_added_to_one_by_one() -> None:
    """Only scores that share the first digit, an exponent, reach the counters: a few in ten."""
    assert 0.01 < cost("select").atomics < 0.4
    assert cost("average").atomics == 0


def test_a_step_of_training_takes_four_launches() -> None:
    assert cost("select").launches == 3
    assert cost("select + update + average").launches == 4


@pytest.mark.parametrize("name", EXPECTED)
def test_kernels_use_the_tensors_that_the_floor_counts(name: str) -> None:
    operation = OPERATIONS[name]
    work = operation.make(traffic.SIZES[operation.unit][0])
    accesses, _ = traffic.measure(work)
    assert accesses.touched == {"read": set(work.reads), "written": set(work.writes)}


def test_averages_that_do_not_move_are_not_touched() -> None:
    resting = traffic.Operation("at rest", lambda n: traffic.update(n, moved=False))
    assert 44 <= traffic.cost(resting).moved < 44 + PER_CHUNK


def test_masked_lanes_move_nothing() -> None:
    """A tensor of 5 elements in a chunk of thousands."""
    accesses, floor = traffic.measure(traffic.average(5))
    tables = traffic.measure(traffic.average(1))[0]
    assert floor == 5 * 12
    assert accesses.read - tables.read == 4 * 8
    assert accesses.written - tables.written == 4 * 4


def test_counting_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), traffic.counted({}):
        pass


def test_the_table_scales_with_the_model_and_the_bandwidth() -> None:
    operation = OPERATIONS["average"]
    one = traffic.Cost(floor=12.0, moved=24.0, atomics=0.25, launches=2)
    text = traffic.table({operation: one}, {"weight": 1_000_000, "pixel": 1, "logit": 1}, 1e12)
    heading, row = text.splitlines()
    assert heading.split()[-4:] == ["floor", "us", "moved", "us"]
    assert row.split() == (
        ["average", "weight", "12.0", "24.0", "2.00", "0.25", "2", "1,000,000", "12.0", "24.0"]
    )


# To count all of them takes ten seconds, and has been done above.
COUNTED = ("select + update", "average")
PROGRAM = """
import runpy, sys
path, counted, *sys.argv[1:] = sys.argv[1:]
main = runpy.run_path(path)["main"]
names = main.__globals__
names["OPERATIONS"] = [each for each in names["OPERATIONS"] if each.name in counted.split(",")]
main()
"""


def run(*words: str, operations: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run the script on some of its operations."""
    program = [sys.executable, "-c", PROGRAM, str(SCRIPT), ",".join(operations), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--model", "resnet"), "argument --model: invalid choice: 'resnet'"),
        (("--bandwidth", "0"), "argument --bandwidth: expected a positive number, got 0"),
        (("--bandwidth", "nan"), "argument --bandwidth: expected a positive number, got nan"),
        (("--bandwidth", "fast"), "argument --bandwidth: invalid positive value: 'fast'"),
        (("--speed",), "unrecognized arguments: --speed"),
    ],
)
def test_wrong_flags_are_told_in_a_line(
    words: tuple[str, ...],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["traffic.py", *words])
    with pytest.raises(SystemExit) as ended:
        traffic.main()
    assert ended.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_the_script_counts_without_being_told_of_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = run("--model", "wrn34-10", "--bandwidth", "1e12", operations=COUNTED)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "wrn34-10, batches of 128; 1e+12 bytes per second assumed"
    assert len(lines) == 2 + len(COUNTED)
    update = next(line for line in lines if line.startswith("select + update  "))
    # WideResNet-34-10 with ten classes has 46.16 million parameters.
    assert "46,160,474" in update.split()
