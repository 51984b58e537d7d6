"""The wheel and the sdist hold all three packages as real files, and work on their own."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cure_fast", "cure_fast/kernels", "cure_fast/loaders")
PROGRAM = """
import cure_fast, cure_fast.kernels, cure_fast.loaders, torch
modules = (cure_fast, cure_fast.kernels, cure_fast.loaders)
print(*(module.__file__ for module in modules), sep="\\n")
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def expected_files() -> set[str]:
    """Return the package's files by their names inside a wheel."""
    names = set()
    for folder in ("cure_fast", "kernels", "loaders"):
        for path in (ROOT / folder).rglob("*"):
            if not path.is_file() or path.suffix == ".pyc":
                continue
            name = path.relative_to(ROOT).as_posix()
            names.add(name if folder == "cure_fast" else f"cure_fast/{name}")
    return names


@pytest.fixture(scope="module")
def from_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel built straight from the checkout."""
    out = tmp_path_factory.mktemp("from_tree")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "-o", out, cwd=ROOT)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def from_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel built from the sdist, which lies beside it."""
    out = tmp_path_factory.mktemp("from_sdist")
    run(sys.executable, "-m", "build", "--no-isolation", "-o", out, cwd=ROOT)
    return next(out.glob("*.whl"))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_holds_every_file_of_the_three_packages(from_tree: Path) -> None:
    files = contents(from_tree)
    names = {name for name in files if ".dist-info/" not in name}
    assert names == expected_files()
    assert {f"{package}/__init__.py" for package in PACKAGES} <= names
    for name in names:
        assert files[name] == (ROOT / name).read_bytes(), f"{name} differs from the checkout"


def test_sdist_holds_them_as_files_and_gives_the_same_wheel(
    from_tree: Path, from_sdist: Path
) -> None:
    with tarfile.open(next(from_sdist.parent.glob("*.tar.gz"))) as archive:
        members = {m.name.split("/", 1)[1]: m for m in archive.getmembers()}
    for name in expected_files():
        assert name in members
        assert members[name].isfile()
    assert contents(from_sdist) == contents(from_tree)


def test_wheel_works_in_an_empty_environment(from_tree: Path, tmp_path: Path) -> None:
    """Only the wheel is installed; torch and the rest are found behind it on the path.

    A path line in a .pth file adds a folder without reading the .pth files inside it, so the
    editable install of the environment that runs the tests stays out.
    """
    environment = tmp_path / "env"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "-q", "--no-deps", "--no-index", from_tree, cwd=tmp_path)
    site = Path(
        run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip()
    )
    without_torch = subprocess.run([python, "-I", "-c", "import torch"], capture_output=True)
    assert without_torch.returncode != 0, "the environment was not empty"
    (site / "behind.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")

    places = run(python, "-I", "-c", PROGRAM, cwd=tmp_path).split()
    assert places == [str(site / package / "__init__.py") for package in PACKAGES]
    assert "train" in run(environment / "bin" / "cure-fast", "--help", cwd=tmp_path)
