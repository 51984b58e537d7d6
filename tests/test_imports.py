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
    *("errors", "console", "progress", "signals", "losses", "batch", "classifier", "kernels"),
    "distributed",
    "plugins",
    *("attacks", "files", "figures", "loaders", "config"),
    *("models", "step"),
    "policies",
    "methods",
    *("engine", "recipes", "runs"),
    "evaluation",
    *("report", "export", "analysis"),
    "training",
    "cli",
    *("api", "__main__"),
)
# Rooms that know less than all rooms before them: that they can be taken elsewhere, or read alone.
NARROW = {
    "batch": set(),
    "distributed": set(),
    "figures": {"files"},
    "kernels": set(),
    "plugins": set(),
    "config": {"errors", "plugins"},
    "loaders": {"batch", "console", "errors", "kernels", "plugins", "signals"},
    "models": {"classifier", "distributed", "errors", "files", "loaders", "plugins"},
    "step": {
        *("attacks", "batch", "classifier", "config", "console", "distributed", "errors"),
        *("kernels", "loaders"),
    },
    "policies": {"batch", "classifier", "config", "errors", "kernels", "losses", "step"},
    "methods": {
        *("attacks", "batch", "classifier", "config", "errors", "kernels", "losses", "models"),
        *("plugins", "policies", "step"),
    },
    "engine": {
        *("batch", "classifier", "config", "console", "distributed", "errors", "kernels", "step"),
    },
    "recipes": {"config", "errors", "loaders", "methods", "models", "step"},
}
# Rooms -> what they may import besides torch, NumPy and the standard library; elsewhere anything.
LIBRARIES = {
    "batch": set(),
    "kernels": {"triton"},
    "plugins": set(),
    "loaders": {"torchvision", "PIL", "ffcv"},
    "config": set(),
    "models": {"safetensors", "torchvision", "timm"},
    "step": set(),
    "policies": set(),
    "methods": set(),
    "engine": set(),
}


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


def imports_of(path: Path) -> Iterator[str]:
    """Yield the absolute module name of each import of a file, those for types included.

    For ``from package import name`` both names are joined, as ``name`` may be a module.
    """
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


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
    assert len(list((ROOT / "cure_fast").glob("*.py"))) <= 13


def rooms_imported_by(room: str) -> set[str]:
    names = (room_of(name) for path in files_of(room) for name in imports_of(path))
    return {name for name in names if name not in (None, room)}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_below(room: str) -> None:
    before = set(ROOMS[: ROOMS.index(room)])
    below = NARROW.get(room, before)
    assert below <= before
    assert rooms_imported_by(room) <= below


def test_the_house_has_ten_floors_at_most() -> None:
    floors: dict[str, int] = {}
    for room in ROOMS:
        floors[room] = 1 + max((floors[below] for below in rooms_imported_by(room)), default=0)
    assert max(floors.values()) <= 10


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = {module_name(path): path for path in package_files()}
    # A name is of the longest module that it begins with: `package.module.function`.
    imported = {
        module: {
            found
            for name in imports_of(path)
            for end in range(len(name.split(".")), 1, -1)
            if (found := ".".join(name.split(".")[:end])) in modules and found != module
        }
        for module, path in modules.items()
    }
    # A package's own file hands names on; who asks for a module of it loads it, and needs it not.
    needed = {m: {n for n in names if n not in faces(modules)} for m, names in imported.items()}
    while free := [module for module, names in needed.items() if not names & needed.keys()]:
        for module in free:
            del needed[module]
    assert not needed


def faces(modules: dict[str, Path]) -> set[str]:
    return {module for module, path in modules.items() if path.name == "__init__.py"}


@pytest.mark.parametrize("room", LIBRARIES)
def test_a_room_needs_few_libraries(room: str) -> None:
    allowed = {"torch", "numpy", "cure_fast", *LIBRARIES[room], *sys.stdlib_module_names}
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files_of(room)
        for name in imports_of(path)
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
        for name in imports_of(path)
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
        "typing.TYPE_CHECKING",
        "cure_fast.kernels.pgd",
        "cure_fast.errors.InputError",
        "cure_fast.training.trainer.Run",
        "ffcv.loader",
    }
    assert room_of("cure_fast.kernels.pgd") == "kernels"
    assert room_of("cure_fast.errors.InputError") == "errors"
    assert room_of("ffcv.loader") is None
