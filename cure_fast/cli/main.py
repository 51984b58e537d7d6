"""The command line: ``cure-fast train | compare | eval | report | export | data | list | ...``.

Heavy imports wait inside the commands, so that help is quick.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from cure_fast.cli.words import flag_words, flags_of, pointing_to, read_words
from cure_fast.config import Config
from cure_fast.config.arguments import DataWriteArgs, EvalArgs, ExportArgs
from cure_fast.config.checks import SHOWN, as_word, nearest, shown
from cure_fast.console import discard, say, tell
from cure_fast.errors import (
    CureFastError,
    InputError,
    MemoryExhaustedError,
    StoppedError,
    is_out_of_memory,
)
from cure_fast.signals import Interrupted, StopSignals

HELP = {"-h", "--help"}
# Commands that take a recipe or a run folder, and each field of the configuration as a flag.
CONFIGURED = {"train", "compare", "show"}
# Commands whose output is all that they do: a reader that has had enough of it is no failure.
PRINTING = {"list", "show", "doctor"}
# What to do about an error of the operating system.
ADVICE = {
    errno.ENOSPC: "Free some space, or name a folder on another disk.",
    errno.EDQUOT: "Free some space, or name a folder on another disk.",
    errno.EACCES: "Name a path that you may use, or change its permissions.",
    errno.EPERM: "Name a path that you may use, or change its permissions.",
    errno.EROFS: "Name a folder that can be written to.",
    errno.EMFILE: "Allow more open files: ulimit -n 4096.",
    errno.ENAMETOOLONG: "Name a shorter path.",
    errno.EPIPE: "A program that was to read from this one has ended; try again.",
}
# A path that no system takes: its beginning is enough of it in a message.
LONG_WORD = re.compile(r"\S{1000,}")
EXIT_CODES = "Exit codes: 0 done, 2 bad input, 3 diverged, 4 out of memory, 75 stopped, resumable."


def registry() -> tyro.constructors.ConstructorRegistry:
    """Return how this project's help shows numbers, which may be fractions, and lists."""
    rules = tyro.constructors.ConstructorRegistry()

    @rules.primitive_rule
    def as_text(info: tyro.constructors.PrimitiveTypeInfo):
        many = get_origin(info.type) is tuple
        if not many and info.type is not float:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="A,B,..." if many else "NUMBER",
            instance_from_str=lambda words: words[0],
            is_instance=lambda value: isinstance(value, tuple if many else int | float),
            str_from_instance=lambda value: [as_word(value)],
        )

    return rules


def show_flags(recipe: str, words: Sequence[str], prog: str) -> None:
    """Print the help of ``train`` or ``show``: every field of the configuration is a flag."""
    from cure_fast.cli.configure import base_config
    from cure_fast.policies import POLICIES
    from cure_fast.recipes import recipe_called

    known = recipe_called(recipe)
    about = known.about if known else f"The run in {recipe}."
    tyro.cli(
        OmitArgPrefixes[Config],  # pyright: ignore[reportInvalidTypeArguments]
        default=base_config(recipe, words, prog),
        args=["--help"],
        prog=prog,
        description=f"{about}\n\nEvery field of the configuration is a flag. --policies A,B adds "
        f"policies to the method ({', '.join(POLICIES)}; none takes them away), whose flags are "
        "then here too. --regime published takes schedule, optimiser and attack from the method's "
        "authors, before all other flags; --regime recipe, the default, from the recipe. With "
        "train, --resume continues the run in --out, or the newest of this recipe, method, "
        "policies and seed; --override with it accepts flags that differ from the run's. With "
        "compare, --methods and --seeds, which `cure-fast compare --help` explains. "
        f"{EXIT_CODES}",
        registry=registry(),
    )


def train(recipe: Positional[str], resume: bool = False, override: bool = False) -> None:
    """Train, attack and report. `cure-fast train RECIPE --help` lists all flags.

    Args:
        recipe: Name of a recipe (see `cure-fast list`), or a run folder to take the settings of.
        resume: Continue the run: the one in --out, or the newest of this recipe, method, policies
            and seed.
        override: With resume: continue although flags differ from what the run was made with.
    """


def compare(recipe: Positional[str], methods: str, seeds: int = 3) -> None:
    """Train methods under one recipe with several seeds, and write tables of what they reached.

    Takes the flags of train too, for all of them. Called again it goes on where it stopped.

    Args:
        recipe: Name of a recipe (see `cure-fast list`), or a run folder to take the settings of.
        methods: Entries with commas between: METHOD[+POLICY...] and flags of its own, such as
            "cure,trades+piat,trades --beta 5"; a value that holds commas is in quotes.
        seeds: Number of seeds, 1 or more: 0, 1, 2 and so on.
    """


def show(recipe: Positional[str]) -> None:
    """Print the resolved configuration of a recipe; takes the same flags as train.

    Args:
        recipe: Name of a recipe (see `cure-fast list`), or a run folder.
    """


def evaluate(target: Positional[str], args: OmitArgPrefixes[EvalArgs]) -> None:
    """Attack the model of a run, or a file of weights, on the test images; always float32.

    Args:
        target: Run folder, or a file of weights (.safetensors, or a .pt of plain tensors).
        args: How to attack; None takes the run's own, or what a file says of itself.
    """
    from cure_fast.cli.evaluate import evaluate_file, evaluate_folder

    path = Path(target)
    if path.is_dir():
        evaluate_folder(path, args)
    else:
        evaluate_file(path, args)


def report(run: Positional[str]) -> None:
    """Write report.html of a run again.

    Args:
        run: Run folder.
    """
    from cure_fast.report import rewrite_report

    say(f"report: {rewrite_report(Path(run))}")


def export(target: Positional[str], args: OmitArgPrefixes[ExportArgs]) -> None:
    """Export the model of a run, or a file of weights, for other programs; verified when written.

    Args:
        target: Run folder, or a .safetensors file that cure-fast wrote.
        args: Which format, and where to.
    """
    from cure_fast.export.command import export_model

    export_model(Path(target), args)


def data_write(data: Positional[str], args: OmitArgPrefixes[DataWriteArgs]) -> None:
    """Write the training images of a data set as a checked FFCV file, ahead of training.

    Training reads the file of its own training split: with the same flags as here it finds this
    one, and with others it writes its own on first use.

    Args:
        data: Data set: cifar10, cifar100, svhn, digits or folder:PATH.
        args: Which images, and where to.
    """
    from cure_fast.files import user_path
    from cure_fast.loaders import read_dataset, split_train
    from cure_fast.loaders.beton import ensure_beton

    started = time.monotonic()
    whole = read_dataset(data, user_path(args.data_root, "--data-root"), "train")
    images, _ = split_train(
        whole, train_images=args.train_images, val_images=args.val_images, seed=args.split_seed
    )
    path = ensure_beton(images, user_path(args.cache, "--cache"))
    seconds = time.monotonic() - started
    say(f"{path}: {len(images):,} images, checked sample by sample, {seconds:.1f} s")


def list_all(topic: Positional[str] = "") -> None:
    """List recipes, methods, policies, models, data sets and attacks.

    Args:
        topic: One of these alone, as recipes, methods, policies, models, data or attacks, with more
            on it: of methods the paper, passes per step, published result and needs.
    """
    from cure_fast.cli.listing import listing

    print(listing(topic))


def doctor() -> None:
    """Check versions, GPU, Triton and FFCV, and say how to mend what is missing."""
    from cure_fast.cli.doctor import doctor as check

    sys.exit(check())


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "compare": compare,
    "eval": evaluate,
    "report": report,
    "export": export,
    "data write": data_write,
    "list": list_all,
    "show": show,
    "doctor": doctor,
}


def dispatch(words: Sequence[str]) -> None:
    """Run the command that ``words`` name."""
    if any("\0" in word for word in words):
        raise InputError("expected words without null characters, got one; leave it out.")
    if words[0] in HELP:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            args=["--help"],
            prog="cure-fast",
            description="Train image classifiers that stay accurate and resist attacks. "
            f"Start with `cure-fast train quickstart`. {EXIT_CODES}",
            registry=registry(),
        )
    command, rest = find_command(words)
    prog = f"cure-fast {command}"
    named = command in CONFIGURED and rest and not rest[0].startswith("-")
    if HELP & set(rest):
        if named:
            show_flags(rest[0], rest[1:], f"{prog} {rest[0]}")
        tyro.cli(COMMANDS[command], args=["--help"], prog=prog, registry=registry())
    if command not in CONFIGURED:
        COMMANDS[command](*read_arguments(COMMANDS[command], rest, prog))
        return
    switches = {k: kind for k, kind in parameters(COMMANDS[command]).items() if k != "recipe"}
    # `train --resume RUN` is what one writes who thinks of the switch first.
    alone = flag_words(name for name, kind in switches.items() if kind is bool)
    first = [word for word in rest if word in alone] if not named else []
    rest = [word for word in rest if word not in first] + first
    if not rest or rest[0].startswith("-"):
        came = f"got {shown(rest[0])} first" if rest else "got nothing"
        raise InputError(
            f"{command}: expected the name of a recipe or a run folder before the flags, {came}, "
            f"such as: {prog} quickstart. `cure-fast list` shows the recipes."
        )
    if command == "compare":
        from cure_fast.cli.compare import read_comparison
        from cure_fast.training.compare import compare as run_comparison

        run_comparison(read_comparison(rest[0], rest[1:], f"{prog} {rest[0]}", switches))
        return
    from cure_fast.cli.configure import read_config

    config, given = read_config(rest[0], rest[1:], f"{prog} {rest[0]}", switches)
    if command == "show":
        from cure_fast.cli.configure import base_config
        from cure_fast.cli.listing import print_config
        from cure_fast.recipes import published_recipe

        base = base_config(rest[0], rest[1:], f"{prog} {rest[0]}")
        official = "published" in rest or published_recipe(rest[0]) is not None
        print_config(config, base, official)
    else:
        from cure_fast.training.opening import opening

        if given.get("override") and not given.get("resume"):
            raise InputError(
                "--override: expected --resume with it, got --override alone. "
                "Add --resume to continue a run, or leave --override out."
            )
        say(opening(config))
        from cure_fast.training.job import train as run_job

        run_job(config, **given)


def find_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the command that ``words`` begin with, which may be of two words, and the rest."""
    for count in (2, 1):
        if " ".join(words[:count]) in COMMANDS:
            return " ".join(words[:count]), list(words[count:])
    if words[0] == "data":
        if HELP & set(words):
            return "data write", list(words[1:])
        came = shown(words[1]) if len(words) > 1 else "nothing"
        raise InputError(
            f"data: expected `cure-fast data write`, got {came} after data. "
            "`cure-fast data write --help` explains it."
        )
    raise InputError(
        f"expected one of the commands {', '.join(COMMANDS)}, got {shown(words[0])}."
        f"{nearest(words[0], COMMANDS)} `cure-fast --help` explains them."
    )


def parameters(function: Callable[..., None]) -> dict[str, Any]:
    """Return the plain type of each parameter of a command by its name."""
    return {k: v for k, v in get_type_hints(function).items() if k != "return"}


def read_arguments(function: Callable[..., None], words: Sequence[str], prog: str) -> list[Any]:
    """Return what a command is called with: text for each word, and its dataclass of flags."""
    wanted = parameters(function)
    names = [name for name, kind in wanted.items() if kind is str]
    kinds = [kind for kind in wanted.values() if hasattr(kind, "__dataclass_fields__")]
    with pointing_to(prog, "it"):
        free, values = read_words(words, flags_of(*kinds))
        most, least = len(names), len(names) - len(function.__defaults__ or ())
        if not least <= len(free) <= most or not all(map(str.strip, free)):
            takes = " ".join(name.upper() for name in names) or "no word"
            came = " ".join(map(shown, free)) or "nothing"
            raise InputError(f"{prog.removeprefix('cure-fast ')}: expected {takes}, got {came}.")
        return [*free, *(kind(**values) for kind in kinds)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    # Read when torch is loaded. By default a waiting OpenMP thread spins for milliseconds and keeps
    # its core from whoever else computes: see docs/log.md for the measurement.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path that the terminal's character set lacks is printed with escapes.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # Commands with a state to save catch signals themselves, and poll for them.
        with StopSignals() as stop, stop.at_once():
            try:
                dispatch(words or ["--help"])
            finally:
                write_out()
    except CureFastError as error:
        return fail(error)
    except Interrupted:
        return fail(StoppedError("interrupted."))
    except OSError as error:
        only_prints = not words or words[0] in PRINTING or not HELP.isdisjoint(words)
        if isinstance(error, BrokenPipeError) and only_prints:
            # The reader of our output has gone (`| head`): nothing is left to say.
            discard(sys.stdout)
            return 0
        path = f"{shown(str(error.filename))[1:-1]}: " if error.filename else ""
        advice = ADVICE.get(error.errno or 0, "Name another path, or mend this one.")
        return fail(InputError(f"{path}{error.strerror or error}. {advice}"))
    except Exception as error:
        if is_out_of_memory(error):
            advice = "Try a smaller --batch-size or --eval-batch-size, or --amp bf16."
            return fail(MemoryExhaustedError(f"{error} {advice}"))
        raise
    return 0


def write_out() -> None:
    """Write what standard output still holds, unless its reader has gone: the work is done."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # Else Python would try again at its exit, and answer with a code of its own.
        discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise


def fail(error: CureFastError) -> int:
    """Print the error in a line and return its exit code."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
    line = LONG_WORD.sub(lambda found: f"{found[0][:SHOWN]}...", line)
    tell(f"cure-fast: {line}")
    return error.code
