"""How much of a method's file is the method: its length, and what it repeats of other files."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

import cure_fast.methods

FILES = sorted(p for p in Path(cure_fast.methods.__file__).parent.glob("[a-z]*.py"))
# A line that short says nothing of its own.
SHORT = 12


def code_lines(path):
    """The lines of a file, but for imports, docstrings, comments and empty ones."""
    text = path.read_text(encoding="utf-8")
    left_out = set()
    for node in ast.walk(ast.parse(text)):
        said = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if said or isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, node.end_lineno + 1))
    lines = [line.strip() for n, line in enumerate(text.splitlines(), 1) if n not in left_out]
    return [line for line in lines if line and not line.startswith("#")]


def repeated(path, others):
    """Which lines of a file stand in a quarter or more of the others."""
    own = [line for line in code_lines(path) if len(line) >= SHORT]
    theirs = [set(code_lines(other)) for other in others]
    return own, [line for line in own if sum(map(lambda t: line in t, theirs)) * 4 >= len(theirs)]


def test_half_of_the_methods_take_sixty_lines_at_most():
    assert len(FILES) > 5
    assert statistics.median(len(code_lines(path)) for path in FILES) <= 60


def test_a_method_repeats_little_of_the_others():
    shares = {}
    for path in FILES:
        own, again = repeated(path, [other for other in FILES if other != path])
        shares[path.stem] = len(again) / len(own)
    too_much = {name: round(share, 2) for name, share in shares.items() if share > 0.1}
    assert not too_much


def test_repeated_lines_are_seen(tmp_path):
    files = [tmp_path / f"{name}.py" for name in "abcde"]
    for file in files:
        lines = (
            '"""Docstring alike."""',
            "import torch",
            "same_in_all = 1",
            f"x_{file.stem} = 123456",
        )
        file.write_text("\n".join(lines))
    own, again = repeated(files[0], files[1:])
    assert own == ["same_in_all = 1", "x_a = 123456"] and again == ["same_in_all = 1"]
