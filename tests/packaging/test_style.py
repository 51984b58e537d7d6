"""Rules that no linter knows: sizes, names, swallowed errors, tests that cannot fail."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Files and functions that are longer are listed with a reason; see test_what_is_long_is_listed.
FILE_LINES = 600
FUNCTION_LINES = 80
LONG: dict[str, str] = {}
# Slow to import, optional, or needed by one command only: inside the function that needs them.
HEAVY = {
    *("matplotlib", "torchvision", "scipy", "ffcv", "pyautoattack", "rich", "PIL"),
    *("tensorboard", "cyclopts", "timm"),
}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
# A test checks something by an assert or a call whose name begins so, or by a helper that does.
CHECKS = ("assert", "check", "raises", "warns", "fail", "expect")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    """Return the repository's Python files in the folders, without following links."""
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py") if p.is_file())


SHIPPED = sorted({p.resolve() for p in python_files("cure_fast", "kernels", "loaders")})
ALL = sorted({*SHIPPED, *python_files("tests", "bench", "setup")})


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def swallowed(tree: ast.AST) -> list[int]:
    """Return the lines of handlers that catch everything or drop what they caught."""
    return [
        handler.lineno
        for handler in ast.walk(tree)
        if isinstance(handler, ast.ExceptHandler)
        and (handler.type is None or all(isinstance(s, ast.Pass) for s in handler.body))
    ]


def checking_functions(tree: ast.Module) -> set[str]:
    """Return the functions of a file that assert, or call something that does."""
    calls: dict[str, set[str]] = {}
    checking = set()
    for function in functions(tree):
        nodes = list(ast.walk(function))
        called = {
            ast.unparse(n.func).split(".")[-1].lstrip("_") for n in nodes if isinstance(n, ast.Call)
        }
        calls[function.name] = called
        if any(isinstance(n, ast.Assert) for n in nodes) or any(
            c.startswith(CHECKS) for c in called
        ):
            checking.add(function.name)
    while more := {f for f, c in calls.items() if c & {n.lstrip("_") for n in checking}} - checking:
        checking |= more
    return checking


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function after its signature and docstring, which document it."""
    first = function.body[1:] if ast.get_docstring(function) else function.body
    return (function.end_lineno or 0) - first[0].lineno + 1 if first else 0


def test_the_walk_sees_the_package() -> None:
    names = {name(path) for path in ALL}
    assert {
        "cure_fast/config/__init__.py",
        "kernels/rgp.py",
        "tests/packaging/test_style.py",
    } <= names
    assert not {n for n in names if n.startswith(("cure_fast/kernels", "cure_fast/loaders"))}


def test_what_is_long_is_listed() -> None:
    """Length alone splits no thought: what outgrows the bounds is listed with what holds it."""
    long = {name(p) for p in ALL if len(p.read_text(encoding="utf-8").splitlines()) > FILE_LINES}
    long |= {
        f"{name(path)}:{node.name}"
        for path in ALL
        for node in functions(parse(path))
        if body_lines(node) > FUNCTION_LINES
    }
    assert long == LONG.keys()


@pytest.mark.parametrize("path", ALL, ids=name)
def test_annotations_are_postponed_and_errors_kept(path: Path) -> None:
    tree = parse(path)
    imports = [ast.unparse(node) for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert "from __future__ import annotations" in imports
    assert not swallowed(tree)
    assert path.stem not in VAGUE_NAMES


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_heavy_modules_are_imported_where_they_are_needed(path: Path) -> None:
    allowed = {"cyclopts"} if path.parent.name == "cli" else set()
    modules = set()
    for node in parse(path).body:
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module.split(".")[0])
    assert not modules & (HEAVY - allowed)


@pytest.mark.parametrize("path", python_files("tests"), ids=name)
def test_every_test_can_fail(path: Path) -> None:
    tree = parse(path)
    tests = {function.name for function in functions(tree) if function.name.startswith("test_")}
    assert not tests - checking_functions(tree)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("try:\n    f()\nexcept ValueError:\n    pass\n", [3]),
        ("try:\n    f()\nexcept:\n    raise\n", [3]),
        ("try:\n    f()\nexcept ValueError as error:\n    print(error)\n", []),
    ],
)
def test_swallowed_errors_are_seen(source: str, expected: list[int]) -> None:
    assert swallowed(ast.parse(source)) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("print(1)", False),
        ("show(1)", False),
        ("assert x", True),
        ("pytest.raises(E)", True),
        ("compare(1)", True),
    ],
)
def test_idle_tests_are_seen(body: str, expected: bool) -> None:
    helpers = "def compare(x):\n    assert x\ndef show(x):\n    print(x)\n"
    tree = ast.parse(f"{helpers}def test_x():\n    {body}\n")
    assert ("test_x" in checking_functions(tree)) is expected
