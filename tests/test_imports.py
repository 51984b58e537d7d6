"""Who may import what: an `ast` walk over every file of the package."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The rooms of the house, from the ground up: each imports from rooms before it alone. A room is a
# folder of cure_fast, or a file at its top.
ROOMS = (
    *("errors", "console", "progress", "signals", "losses", "kernels"),
    *("attacks", "files", "loaders", "config"),
    "models",
    "step",
    "policies",
    "methods",
    *("engine", "recipes", "runs"),
    "evaluation",
    *("report", "export"),
    "training",
    "cli",
    "__main__",
)
# Rooms that know less than all rooms before them: that they can be taken elsewhere, or read alone.
NARROW = {
    "kernels": set(),
    "config": {"errors"},
    "loaders": {"errors", "kernels", "progress", "signals"},
    "models": {"errors", "files", "loaders"},
    "policies": {"config", "errors", "kernels", "models", "step"},
    "methods": {"config", "errors", "losses", "policies", "step"},
    "engine": {"config", "console", "errors", "kernels", "models", "step"},
    "recipes": {"config", "errors", "methods"},
}
# Rooms -> what they may import besides torch, NumPy and the standard library; elsewhere anything.
LIBRARIES = {
    "kernels": {"triton"},
    "loaders": {"torchvision", "sklearn", "PIL", "ffcv"},
    "config": set(),
    "models": {"safetensors"},
    "step": set(),
    "policies": set(),
    "methods": set(),
    "engine": set(),
}
# Imports that only the type checker sees may also name what a run is, and settings.
FOR_TYPES = {"training", "methods"}


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


def room_of(name: str) -> str | None:
    """Return the room of a module of cure_fast; None for the bare package and other modules."""
    parts = name.split(".")
    return parts[1] if parts[0] == "cure_fast" and len(parts) > 1 and parts[1] in ROOMS else None


def files_of(room: str) -> list[Path]:
    return [path for path in package_files() if room_of(module_name(path)) == room]


def test_every_file_is_in_a_room() -> None:
    outside = [path for path in package_files() if room_of(module_name(path)) is None]
    assert outside == [ROOT / "cure_fast/__init__.py"]


def test_few_files_lie_at_the_top() -> None:
    assert len(list((ROOT / "cure_fast").glob("*.py"))) <= 12


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_below(room: str) -> None:
    below = NARROW.get(room, set(ROOMS[: ROOMS.index(room)])) | {room}
    assert below <= {*ROOMS[: ROOMS.index(room)], room}
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files_of(room)
        for name, for_types in imports_of(path)
        if (found := room_of(name)) and found not in below | (FOR_TYPES if for_types else set())
    ]
    assert not wrong


@pytest.mark.parametrize("room", LIBRARIES)
def test_a_room_needs_few_libraries(room: str) -> None:
    allowed = {"torch", "numpy", "cure_fast", *LIBRARIES[room], *sys.stdlib_module_names}
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files_of(room)
        for name, _ in imports_of(path)
        if name.split(".")[0] not in allowed
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
        "if TYPE_CHECKING:\n    from cure_fast.training.trainer import Run\n"
        "def late():\n    import ffcv.loader\n",
        encoding="utf-8",
    )
    assert set(imports_of(file)) == {
        ("typing.TYPE_CHECKING", False),
        ("cure_fast.kernels.pgd", False),
        ("cure_fast.errors.InputError", False),
        ("cure_fast.training.trainer.Run", True),
        ("ffcv.loader", False),
    }
    assert room_of("cure_fast.kernels.pgd") == "kernels"
    assert room_of("cure_fast.errors.InputError") == "errors"
    assert room_of("ffcv.loader") is None
