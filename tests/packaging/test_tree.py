"""The checkout itself: links, README's tree, constraints, and nothing private in any file."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]

# Written in two halves, so that this file does not match itself.
PRIVATE = re.compile(
    rb"(?<![\w.~-])/(?:wor" + rb"k|roo" + rb"t|opt|hom" + rb"e/\w+)/"
    rb"|pypi\.or" + rb"g|pythonhosted\.or" + rb"g|deb\.debian\.or" + rb"g|ubuntu\.com"
    rb"|download\.pytorch\.or" + rb"g|anaconda\.or" + rb"g|npmjs\.or" + rb"g"
)


def git(*arguments: str) -> str:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def repository_files() -> list[Path]:
    """Return every file that is tracked, or would be by `git add --all`."""
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def readme_tree(text: str) -> list[str]:
    """Return the paths of README's annotated tree: two spaces per level, then name and remark."""
    blocks = [b for b in re.findall(r"```text\n(.*?)```", text, re.S) if b.startswith("cure_fast/")]
    assert len(blocks) == 1, f"README has {len(blocks)} ```text blocks that start with cure_fast/"
    paths: list[str] = []
    folders: list[str] = []
    for line in blocks[0].splitlines():
        if not line.strip():
            continue
        match = re.fullmatch(r"((?:  )*)([\w.*/-]+)(?:  +.*)?", line)
        assert match, f"README's tree: two spaces per level, a name, two spaces, a remark: {line!r}"
        depth = len(match[1]) // 2
        assert depth <= len(folders), f"README's tree: {line!r} lies below no folder"
        folders = folders[:depth]
        paths.append("".join([*folders, match[2]]))
        if match[2].endswith("/"):
            folders.append(match[2])
    return paths


@pytest.mark.parametrize("name", ["kernels", "loaders"])
def test_links_are_relative_and_tracked(name: str) -> None:
    link = f"cure_fast/{name}"
    assert os.readlink(ROOT / link) == f"../{name}"
    listed = git("ls-files", "--cached", "--others", "--exclude-standard", "--", link).split()
    assert listed == [link]
    staged = git("ls-files", "--stage", "--", link)
    assert not staged or staged.startswith("120000 ")


def test_every_path_of_the_readme_tree_exists() -> None:
    paths = readme_tree((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {"kernels/", "loaders/", "bench/", "tests/"} <= set(paths)
    assert [p for p in paths if not any(ROOT.glob(p.rstrip("/")))] == []


def test_the_tree_is_read_by_its_indent() -> None:
    lines = (
        "cure_fast/   the package",
        "  cli.py   flags",
        "  models/",
        "    base.py  x",
        "tests/",
    )
    assert readme_tree("\n".join(["```text", *lines, "```"])) == [
        "cure_fast/",
        "cure_fast/cli.py",
        "cure_fast/models/",
        "cure_fast/models/base.py",
        "tests/",
    ]
    with pytest.raises(AssertionError, match="below no folder"):
        readme_tree("```text\ncure_fast/\n  cli.py\n    deep.py\n```\n")


def test_no_private_path_or_registry_in_any_file() -> None:
    found = []
    for path in repository_files():
        hits = {match[0].decode() for match in PRIVATE.finditer(path.read_bytes())}
        found += [f"{path.relative_to(ROOT)}: {hit}" for hit in sorted(hits)]
    assert not found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see /wor" + "k/main/run", True),
        ('"/hom' + 'e/ann/run"', True),
        ("https://pypi.or" + "g/simple", True),
        ("docs/work/plan", False),
        ("~/.cache/cure-fast", False),
        ("home/ann", False),
    ],
)
def test_private_names_are_seen(text: str, found: bool) -> None:
    assert bool(PRIVATE.search(text.encode())) is found


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)==([\w.]+)", line)
        assert match, f"constraints.txt: expected name==version alone, got {line!r}"
        assert canonicalize_name(match[1]) not in pins, f"constraints.txt: {match[1]} twice"
        pins[canonicalize_name(match[1])] = match[2]
    return pins


def test_constraints_pin_the_tested_set() -> None:
    pins = constraints()
    tested = {
        "torch": "2.11.0",
        "torchvision": "0.26.0",
        "triton": "3.6.0",
        "ffcv": "1.0.2",
        "pyautoattack": "0.2.0",
    }
    assert {name: pins[name] for name in tested} == tested


def test_constraints_lie_in_the_declared_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"]]
    extras = project["optional-dependencies"]
    (own,) = (r for r in map(Requirement, extras["dev"]) if r.name == project["name"])
    # What set-up installs: of dev, and FFCV.
    for name in ("dev", "ffcv", *own.extras):
        declared += [text for text in extras[name] if Requirement(text).name != project["name"]]
    pins = constraints()
    outside = [
        text
        for text in declared
        if not (r := Requirement(text)).specifier.contains(pins[canonicalize_name(r.name)])
    ]
    assert not outside
