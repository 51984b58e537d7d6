"""The command line: ``cure-fast train | eval | report | data | list | show | doctor``.

Exit codes: 0 done, 2 bad input, 3 diverged, 4 out of memory, 75 stopped and resumable.
Heavy imports wait inside the commands, so that help is quick.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import get_args, get_origin

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from cure_fast.arguments import DataWriteArgs, EvalArgs
from cure_fast.checks import format_pixel, parse_fraction
from cure_fast.config import Config
from cure_fast.errors import CureFastError, InputError, MemoryExhaustedError

EXIT_CODES = (
    "Exit codes: 0 done, 2 bad input, 3 diverged, 4 out of memory, 75 stopped and resumable."
)


def registry() -> tyro.constructors.ConstructorRegistry:
    """Return tyro rules of this project: numbers may be fractions, lists have commas."""
    rules = tyro.constructors.ConstructorRegistry()

    @rules.primitive_rule
    def number(info: tyro.constructors.PrimitiveTypeInfo):
        if info.type is not float:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="NUMBER",
            instance_from_str=lambda words: parse_fraction(words[0]),
            is_instance=lambda value: isinstance(value, int | float),
            str_from_instance=lambda value: [show_number(value)],
        )

    @rules.primitive_rule
    def commas(info: tyro.constructors.PrimitiveTypeInfo):
        if get_origin(info.type) is not tuple or get_args(info.type)[-1] is not Ellipsis:
            return None
        item = str if get_args(info.type)[0] is str else parse_fraction
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="A,B,...",
            instance_from_str=lambda words: tuple(
                item(w) for w in words[0].replace(" ", "").split(",") if w
            ),
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: [",".join(map(str, value))],
        )

    return rules


def show_number(value: float) -> str:
    """Return a short text: as a fraction of 255 where the decimals would not end."""
    return format_pixel(value) if len(f"{value:.9g}") > 8 else f"{value:g}"


def resolve_config(recipe: str, flags: Sequence[str], prog: str) -> Config:
    """Return the recipe's configuration, or a run folder's, changed by the flags.

    ``--method`` is looked up first, because it decides which settings are flags.
    """
    from pathlib import Path

    from cure_fast.methods import find_method, select_method
    from cure_fast.recipes import RECIPES, find_recipe, with_out
    from cure_fast.runs import load_config

    if (Path(recipe) / "config.json").exists():
        config = with_out(load_config(Path(recipe)), recipe)
    else:
        config = find_recipe(recipe)
    method = flag_value(flags, "--method")
    if method is not None:
        config = select_method(config, method)
    about = inspect.getdoc(RECIPES[recipe]) if recipe in RECIPES else f"The run in {recipe}."
    config = tyro.cli(
        OmitArgPrefixes[Config],  # pyright: ignore[reportInvalidTypeArguments]
        default=config,
        args=list(flags),
        prog=prog,
        description=f"{about}\n\nEvery field of the configuration is a flag. With train, --resume "
        f"continues the run in --out, or the newest of this recipe, method and seed. {EXIT_CODES}",
        registry=registry(),
    )
    find_method(config.method).check(config)
    return config


def flag_value(flags: Sequence[str], name: str) -> str | None:
    """Return the last value given to a flag, written ``--flag value`` or ``--flag=value``."""
    found = None
    for position, word in enumerate(flags):
        if word == name and position + 1 < len(flags):
            found = flags[position + 1]
        elif word.startswith(name + "="):
            found = word.split("=", 1)[1]
    return found


def train(recipe: Positional[str], resume: bool = False) -> None:
    """Train, attack and report. `cure-fast train RECIPE --help` lists all flags.

    Args:
        recipe: Name of a recipe (see `cure-fast list`), or a run folder to take the settings of.
        resume: Continue the run: the one in --out, or the newest of this recipe, method and seed.
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
        args: How to attack.
    """
    from pathlib import Path

    from cure_fast.evaluation_job import evaluate_file, evaluate_folder

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
    from pathlib import Path

    from cure_fast.report import write_report

    print(f"report: {write_report(Path(run))}")


def data_write(data: Positional[str], args: OmitArgPrefixes[DataWriteArgs]) -> None:
    """Write the training images of a data set as a checked FFCV file, ahead of training.

    Training reads the file of its own training split: with the same flags as here it finds this
    one, and with others it writes its own on first use.

    Args:
        data: Data set: cifar10, cifar100, svhn, digits or folder:PATH.
        args: Which images, and where to.
    """
    from cure_fast.listing import write_data

    write_data(data, args)


def list_all() -> None:
    """List recipes, methods, models, data sets and attacks."""
    from cure_fast.listing import print_all

    print_all()


def doctor() -> None:
    """Check versions, GPU, Triton and FFCV, and say how to mend what is missing."""
    from cure_fast.doctor import doctor as check

    sys.exit(check())


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "eval": evaluate,
    "report": report,
    "data": data_write,
    "list": list_all,
    "show": show,
    "doctor": doctor,
}


def dispatch(words: Sequence[str]) -> None:
    """Run the command that ``words`` name."""
    if len(words) > 1 and words[0] in ("train", "show") and not words[1].startswith("-"):
        command, recipe, flags = words[0], words[1], list(words[2:])
        resume = command == "train" and "--resume" in flags
        flags = [flag for flag in flags if not (command == "train" and flag == "--resume")]
        config = resolve_config(recipe, flags, f"cure-fast {command} {recipe}")
        if command == "show":
            from cure_fast.listing import print_config

            print_config(config)
        else:
            from cure_fast.job import train as run_job

            run_job(config, resume=resume)
        return
    tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        args=list(words),
        prog="cure-fast",
        description="Train image classifiers that stay accurate and resist attacks. "
        f"Start with `cure-fast train quickstart`. {EXIT_CODES}",
        registry=registry(),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    # Read when torch is loaded. By default a waiting OpenMP thread spins for milliseconds and keeps
    # its core from whoever else computes: see docs/log.md for the measurement.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:2] == ["data", "write"]:
        del words[1]
    try:
        dispatch(words or ["--help"])
        sys.stdout.flush()
    except CureFastError as error:
        return fail(error)
    except KeyboardInterrupt:
        print("cure-fast: interrupted; what was saved can be continued", file=sys.stderr)
        return 75
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        return fail(InputError(f"{what}{error.strerror or error}."))
    except Exception as error:
        if is_out_of_memory(error):
            return fail(
                MemoryExhaustedError(
                    f"{error} Try a smaller --batch-size or --eval-batch-size, or --amp bf16."
                )
            )
        raise
    return 0


def fail(error: CureFastError) -> int:
    """Print the error in a line and return its exit code."""
    print(f"cure-fast: {error}", file=sys.stderr)
    return error.code


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the error says that memory ran out, on the GPU or the host."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
