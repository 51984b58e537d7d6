"""Who may import what: an `ast` walk over every file of the package."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Folder or file -> what it may import besides the standard library. A name covers its submodules.
ALLOWED = {
    "kernels": {"torch", "triton", "numpy", "cure_fast.kernels"},
    "loaders": {
        *("torch", "numpy", "torchvision", "sklearn", "PIL", "ffcv"),
        *("cure_fast.loaders", "cure_fast.errors", "cure_fast.progress", "cure_fast.kernels"),
        "cure_fast.signals",
    },
    "cure_fast/errors.py": set(),
    "cure_fast/attack_result.py": {"cure_fast.checks", "cure_fast.errors"},
    "cure_fast/checks.py": {"cure_fast.errors"},
    "cure_fast/config.py": {"cure_fast.attack_result", "cure_fast.checks"},
    "cure_fast/arguments.py": {"cure_fast.checks"},
    "cure_fast/models": {"torch", "cure_fast.errors", "cure_fast.models"},
    "cure_fast/methods": {
        "torch",
        *("cure_fast." + name for name in ("config", "checks", "method", "methods", "attacks")),
        *("cure_fast." + name for name in ("losses", "policies", "kernels", "schedules")),
        *("cure_fast." + name for name in ("models", "errors")),
    },
}
# Imports that only the type checker sees may also name what a run is.
FOR_TYPES = {"cure_fast.trainer"}


def module_name(path: Path) -> str:
    """Return the import name of a file, where kernels/ and loaders/ belong to cure_fast."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("kernels", "loaders"):
        parts.insert(0, "cure_fast")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files(folder: str) -> list[Path]:
    """Return the Python files below a folder; a file stands for itself."""
    place = ROOT / folder
    found = [place] if place.is_file() else place.rglob("*.py")
    return sorted(p for p in found if p.is_file())


def package_files() -> list[Path]:
    """Return every Python file that ships, each once."""
    files = {p.resolve() for f in ("cure_fast", "kernels", "loaders") for p in source_files(f)}
    return sorted(files)


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield (absolute module name, seen by the type checker alone) for each import of a file.

    For ``from package import name`` both names are joined, as ``name`` may be a module.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) in for_types


def covered(name: str, allowed: set[str]) -> bool:
    """Whether ``name`` is one of the allowed modules, or lies inside one."""
    parts = name.split(".")
    return parts[0] in sys.stdlib_module_names or any(
        ".".join(parts[: i + 1]) in allowed for i in range(len(parts))
    )


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_only_what_its_place_allows(folder: str) -> None:
    files = source_files(folder)
    assert files, f"{folder} holds no Python file"
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name, for_types in imports_of(path)
        if not covered(name, ALLOWED[folder] | (FOR_TYPES if for_types else set()))
    ]
    assert not wrong


def test_kernels_import_each_other_relatively() -> None:
    wrong = [
        f"{path.name}: {ast.unparse(node)}"
        for path in source_files("kernels")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom) and "cure_fast" in ast.unparse(node)
    ]
    assert not wrong


def test_only_main_imports_the_command_line() -> None:
    importers = {
        path.relative_to(ROOT).as_posix()
        for path in package_files()
        for name, _ in imports_of(path)
        if covered(name, {"cure_fast.cli"}) and name.startswith("cure_fast")
    }
    assert importers == {"cure_fast/__main__.py"}


def test_nothing_imports_the_bare_names() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*package_files(), *source_files("tests"), *source_files("bench")]
        for name, _ in imports_of(path)
        if name.split(".")[0] in ("kernels", "loaders")
    ]
    assert not wrong


def test_the_walk_resolves_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    file = tmp_path / "kernels" / "ema.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "from . import pgd\n"
        "from ..errors import InputError\n"
        "if TYPE_CHECKING:\n    from cure_fast.trainer import Run\n"
        "def late():\n    import ffcv.loader\n",
        encoding="utf-8",
    )
    assert set(imports_of(file)) == {
        ("typing.TYPE_CHECKING", False),
        ("cure_fast.kernels.pgd", False),
        ("cure_fast.errors.InputError", False),
        ("cure_fast.trainer.Run", True),
        ("ffcv.loader", False),
    }
    assert not covered("ffcv.loader", ALLOWED["kernels"])
    assert not covered("cure_fast.errors.InputError", ALLOWED["kernels"])
    assert covered("cure_fast.kernels.pgd", ALLOWED["kernels"])
