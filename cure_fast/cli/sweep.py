"""The words of ``cure-fast sweep``: a grid of flags, each combination an entry of a comparison."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from cure_fast.cli.compare import ENTRY, comparison_of, given_to_all, seeds_of
from cure_fast.cli.flags import pointing_to, split_flags
from cure_fast.config.checks import flag_of, shown
from cure_fast.console import command
from cure_fast.errors import InputError
from cure_fast.training.compare import Comparison

# What a run is called by is given by the sweep; its seed may be in the grid.
GIVEN = {"seed": str, "out": str}


def read_sweep(
    recipe: str, words: Sequence[str], switches: Mapping[str, Any]
) -> tuple[Comparison, dict[str, list[str]] | None]:
    """Return the runs of a grid; for ``--list`` also the words that train each entry, by its name.

    Args:
        recipe: recipe or run folder.
        words: flags for all runs, and the command's own.
        switches: the command's own flags, as for :func:`.read_config`.

    Raises:
        InputError: for wrong words.
    """
    own = given_to_all("cure-fast sweep", words, switches)
    with pointing_to("cure-fast sweep", "it"):
        grid = read_grid(own.get("grid", ""))
    numbers = grid.pop("seed", [])
    given = {word.partition("=")[0] for word in words}
    for name in [*grid, *(["seed", "seeds"] if numbers else [])]:
        if found := given & {flag_of(name), f"--no-{flag_of(name)[2:]}"}:
            raise InputError(f"{found.pop()}: expected it in --grid or beside it, got both.")
    if "seed" in own:
        raise InputError('--seed: expected seeds as --grid "seed=0,1" or as --seeds 2, got --seed.')
    if wrong := [number for number in numbers if not number.isdecimal()]:
        raise InputError(f"--grid, seed={wrong[0]}: expected a whole number, at least 0.")
    names = [[f"{flag_of(name)}={value}" for value in values] for name, values in grid.items()]
    entries = [(" ".join(each).replace("--", "") or recipe, each) for each in product(*names)]
    seeds = [int(number) for number in numbers] or seeds_of(own, 1)
    comparison = comparison_of(
        entries, "cure-fast sweep", recipe, words, switches, seeds, flag="--grid"
    )
    if not own.get("list"):
        return comparison, None
    _, shared = split_flags(words, {**switches, **GIVEN})
    return comparison, {name: ["train", recipe, *shared, *each] for name, each in entries}


def read_grid(text: str) -> dict[str, list[str]]:
    """Return the values of each field, as they were written."""
    grid: dict[str, list[str]] = {}
    for part in text.split(";"):
        flag, _, values = part.partition("=")
        name, found = flag.strip().replace("-", "_"), ENTRY.findall(values)
        whole = ",".join(found) == values and all(map(str.strip, found)) and found
        if name == "out":
            raise InputError("--grid: expected no out, as each run has a folder below --out.")
        if name in grid:
            raise InputError(f"--grid: expected each flag once, got {name} twice.")
        if not name or not whole:
            raise InputError(
                '--grid: expected flags and values, such as "lr=0.05,0.1;seed=0,1", and quotes in '
                f"pairs around a value with commas, got {shown(part) if part else 'nothing'}."
            )
        grid[name] = [" ".join(shlex.split(value)) for value in found]
    return grid


def print_commands(comparison: Comparison, words: Mapping[str, Sequence[str]]) -> None:
    """Print the command of each run that is not finished."""
    # These need torch, and reading words does not.
    from cure_fast.runs.folder import is_free
    from cure_fast.training.compare import check_comparison, is_finished

    check_comparison(comparison)
    for entry, seed in comparison.runs():
        folder = comparison.run_folder(entry, seed)
        if not is_finished(folder, comparison.config(entry, seed)):
            resume = [] if is_free(folder) else ["--resume"]
            own = ["--seed", str(seed), "--out", str(folder), *resume]
            print(command(*words[entry.name], *own))
