"""The command line: ``cure-fast train | compare | eval | report | export | data | list | ...``.

cyclopts reads the words, writes help, and says what is wrong with them. Which flags the commands of
CONFIGURED have depends on what is named. Heavy imports wait inside, so that help is quick.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import App

import cure_fast
from cure_fast import distributed
from cure_fast.cli.data import data_pack, data_write
from cure_fast.cli.flags import PLAIN, application, in_a_line, parameters, pointing_to, split_flags
from cure_fast.config import Config
from cure_fast.config.arguments import (
    AnalyzeArgs,
    AuditChecks,
    EvalArgs,
    ExportArgs,
)
from cure_fast.config.checks import SHOWN, find, shown
from cure_fast.console import discard, say, tell
from cure_fast.errors import (
    CureFastError,
    InputError,
    MemoryExhaustedError,
    NeedsTorchError,
    StoppedError,
    is_out_of_memory,
)
from cure_fast.signals import Interrupted, StopSignals
from cure_fast.training.opening import opening

if TYPE_CHECKING:
    from rich.console import Console

    from cure_fast.training.compare import Comparison

HELP = {"-h", "--help"}
# Commands whose output is all that they do: a reader that has had enough of it is no failure.
PRINTING = {"list", "show", "doctor", "completion", "--version"}
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
ABOUT = f"""\
Train image classifiers that stay accurate and resist attacks.
Start with `cure-fast train quickstart`.

{EXIT_CODES}"""


def train(recipe: str, *, resume: bool = False, override: bool = False) -> None:
    """Train, attack and report. `cure-fast train RECIPE --help` shows the recipe's own values.

    Args:
        recipe: Name of a recipe (see `cure-fast list`), or a run folder or configuration file
            (.toml, .json) to take the settings of.
        resume: Continue the run: the one in --out, or the newest of this recipe, method, policies
            and seed.
        override: With --resume: continue although flags differ from what the run was made with.
    """


def compare(recipe: str, *, methods: str, seeds: int = 3, jobs: int | None = None) -> None:
    """Train methods under one recipe with several seeds, and write tables of what they reached.

    Takes the flags of train too, for all of them. Called again it goes on where it stopped.
    `cure-fast compare RUN RUN ... [--out DIR]` writes tables of runs that are finished, without
    --methods; with `--reproducibility FILE` a page of the papers' rows that they reproduce.

    Args:
        recipe: Name of a recipe (see `cure-fast list`), a run folder or a configuration file.
        methods: Entries with commas between: METHOD[+POLICY...] and flags of its own, such as
            "cure,trades+piat,trades --beta 5"; a value that holds commas is in quotes.
        seeds: Number of seeds, 1 or more: 0, 1, 2 and so on.
        jobs: Runs at once, 1 or more, each in a process of its own; None takes one per GPU where
            there are several, else 1.
    """


def sweep(
    recipe: str, *, grid: str, seeds: int = 1, jobs: int | None = None, list: bool = False
) -> None:
    """Train one recipe with each combination of some flags' values, and write a table of all.

    Takes the flags of train too, for all runs. Called again it goes on where it stopped.

    Args:
        recipe: Name of a recipe (see `cure-fast list`), a run folder or a configuration file.
        grid: Flags and their values, such as "lr=0.05,0.1;method=cure,trades;seed=0,1"; a value
            that holds commas is in quotes.
        seeds: Number of seeds, 1 or more: 0, 1, 2 and so on; or the grid names them.
        jobs: Runs at once, 1 or more, each in a process of its own; None takes one per GPU where
            there are several, else 1.
        list: Print the commands of the runs that are not finished, for a scheduler; called without
            it then, sweep writes the table.
    """


def show(recipe: str, *, toml: bool = False, json: bool = False) -> None:
    """Print what a recipe and flags come to; takes the same flags as train.

    Args:
        recipe: Name of a recipe (see `cure-fast list`), a run folder or a configuration file.
        toml: Print it as a configuration file, which `cure-fast train FILE.toml` takes.
        json: Print it as JSON.
    """


def evaluate(target: str, args: EvalArgs) -> None:
    """Attack the model of a run, or a file of weights, on the test images; always float32.

    Args:
        target: Run folder, or a file of weights (.safetensors, or a .pt of plain tensors).
        args: How to attack; what is left out is the run's own, or what a file says of itself.
    """
    from cure_fast.cli.evaluate import evaluate_file, evaluate_folder

    path = Path(target)
    if path.is_dir():
        evaluate_folder(path, args)
    else:
        evaluate_file(path, args)


def analyze(*targets: str, args: AnalyzeArgs) -> None:
    """Show why networks are robust: figures and numbers of runs or files of weights.

    Args:
        targets: Name of an analysis, and then run folders or files of weights.
        args: What to look at, and how.
    """
    raise AssertionError("what analyze does depends on the analysis that is named")


def audit(target: str, settings: AuditChecks, args: AnalyzeArgs) -> None:
    """Check whether the accuracy under attack of a run or file of weights can be believed.

    Each check has a verdict and what it rests on; that all of them pass proves no robustness.

    Args:
        target: Run folder or file of weights.
        settings: What to check.
        args: What to look at, and how.
    """
    from cure_fast.cli.audit import audit_target

    audit_target(Path(target), settings, args)


def study(
    name: str, recipe: str = "quickstart", *, seeds: int = 1, jobs: int | None = None
) -> None:
    """Train the runs of a study under one budget, and draw what they recorded.

    Takes the flags of train too, for all runs. Called again it goes on where it stopped.

    Args:
        name: Name of a study.
        recipe: Name of a recipe (see `cure-fast list`), a run folder or a configuration file.
        seeds: Number of seeds, 1 or more: 0, 1, 2 and so on.
        jobs: Runs at once, 1 or more, each in a process of its own; None takes one per GPU where
            there are several, else 1.
    """
    raise AssertionError("what study does depends on the study that is named")


def report(run: str) -> None:
    """Write report.html of a run again.

    Args:
        run: Run folder.
    """
    from cure_fast.report import rewrite_report

    say(f"report: {rewrite_report(Path(run))}")


def export(target: str, args: ExportArgs) -> None:
    """Export the model of a run, or a file of weights, for other programs; verified when written.

    Args:
        target: Run folder, or a .safetensors file that cure-fast wrote.
        args: Which format, and where to.
    """
    from cure_fast.export.command import export_model

    export_model(Path(target), args)


def list_all(topic: str = "", *, json: bool = False) -> None:
    """List recipes, methods, policies, models, data sets and attacks.

    Args:
        topic: One of these alone, as recipes, methods, policies, models, data or attacks, with more
            on it: of methods the paper, passes per step, published result and needs.
        json: Print it as JSON.
    """
    from cure_fast.cli.listing import listing

    print(listing(topic, as_json=json))


def doctor(*, json: bool = False) -> None:
    """Check versions, GPU, Triton and FFCV, and say how to mend what is missing.

    Args:
        json: Print it as JSON.
    """
    from cure_fast.cli.doctor import doctor as check

    sys.exit(check(as_json=json))


def completion(shell: str) -> None:
    """Print a script that completes commands and flags, for bash, zsh or fish.

    Save it where the shell looks for such, for instance
    `cure-fast completion bash > ~/.local/share/bash-completion/completions/cure-fast`.

    Args:
        shell: bash, zsh or fish.
    """
    from cure_fast.recipes import find_recipe

    find("SHELL", {name: name for name in ("bash", "zsh", "fish")}, shell)
    script = tree(find_recipe("quickstart")).generate_completion(shell=shell)  # pyright: ignore[reportArgumentType]
    print(script)


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "compare": compare,
    "sweep": sweep,
    "eval": evaluate,
    "analyze": analyze,
    "audit": audit,
    "study": study,
    "report": report,
    "export": export,
    "data write": data_write,
    "data pack": data_pack,
    "list": list_all,
    "show": show,
    "doctor": doctor,
    "completion": completion,
}
# Commands that several processes share.
SHARING = ("train", "eval", "analyze", "audit")
# Commands that take a recipe, and each field of the configuration as a flag.
CONFIGURED = ("train", "compare", "sweep", "show")


def tree(config: Config | None = None) -> App:
    """Return all commands; the flags of a configuration are those of ``config``, or left out."""
    app = App(name="cure-fast", help=ABOUT, version=cure_fast.__version__, **PLAIN)
    data = App(name="data", help="Write data sets ahead of training.", version_flags=[], **PLAIN)
    app.command(data)
    for name, function in COMMANDS.items():
        place = data if name.startswith("data ") else app
        fields = config if name in CONFIGURED else None
        place.command(application(name.split()[-1], function, config=fields))
    return app


def dispatch(words: Sequence[str]) -> Callable[[], object] | None:
    """Return what ``words`` ask for, read and checked; None where that was help, which is printed.

    Raises:
        InputError: for words that are wrong.
    """
    if any("\0" in word for word in words):
        raise InputError("expected words without null characters, got one; leave it out.")
    if problem := distributed.launch_problem():
        raise InputError(problem)
    if (number := distributed.started()) > 1 and words[0] not in SHARING:
        raise InputError(
            f"{words[0]}: expected one process, got {number} of a launcher such as torchrun. Only "
            f"{', '.join(SHARING)} share their work: start it without."
        )
    if words[0] == "compare" and (found := of_runs(words[1:])):
        return found
    if words[0] in CONFIGURED:
        return prepare_configured(words[0], words[1:])
    if words[0] == "analyze":
        return prepare_analysis(words[1:])
    if words[0] == "study":
        return prepare_study(words[1:])
    known = next((n for n in COMMANDS if list(words[: len(n.split())]) == n.split()), "")
    prog, rest = f"cure-fast {known}".rstrip(), words[len(known.split()) :]
    with pointing_to(prog, "it" if known else "the commands"):
        # All of them are needed to say which one an unknown one is like.
        app = application(prog, COMMANDS[known]) if known else tree()
        with in_a_line():
            run, bound, _ = app.parse_args(rest, console=console_for(words))
        return run(*bound.args, **bound.kwargs)


def console_for(words: Sequence[str]) -> Console | None:
    """Return where help is printed, where that is asked for."""
    if not HELP & set(words):
        return None
    from rich.console import Console

    class HelpConsole(Console):
        """Leaves a reader that has gone to :func:`main`, where rich would end the program."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    return HelpConsole()


def prepare_configured(command: str, words: Sequence[str]) -> Callable[[], object] | None:
    """Return what a command with a recipe is to do, whose flags hang on what is named."""
    from cure_fast.cli.configure import base_config, read_config
    from cure_fast.recipes import recipe_called

    prog = f"cure-fast {command}"
    switches = {k: v for k, v in parameters(COMMANDS[command]).items() if k != "recipe"}
    # `train --resume RUN` is what one writes who thinks of the switch first.
    alone = {f"--{name}" for name, kind in switches.items() if kind is bool}
    first = list(takewhile(alone.__contains__, words))
    recipe, *rest = [*words[len(first) :], *first] or [""]
    named = recipe and not recipe.startswith("-")
    if HELP & set(words):
        base = recipe if named else "quickstart"
        known = recipe_called(base)
        about = f"{prog} {recipe}: {known.about}\n\n{EXIT_CODES}" if named and known else EXIT_CODES
        config = base_config(base, rest, prog)
        app = application(prog, COMMANDS[command], config=config, about=about)
        app.help_print([], console=console_for(words))
        return None
    if not named:
        came = f"got {shown(recipe)} first" if recipe else "got nothing"
        raise InputError(
            f"{command}: expected the name of a recipe or a run folder before the flags, {came}, "
            f"such as: {prog} quickstart. `cure-fast list` shows the recipes."
        )
    prog = f"{prog} {recipe}"
    if command == "compare":
        from cure_fast.cli.compare import read_comparison

        return partial(run_comparison, read_comparison(recipe, rest, switches))
    if command == "sweep":
        from cure_fast.cli.sweep import print_commands, read_sweep

        comparison, commands = read_sweep(recipe, rest, switches)
        if commands is not None:
            return partial(print_commands, comparison, commands)
        return partial(run_comparison, comparison)
    config, given = read_config(recipe, rest, prog, switches)
    if command == "show":
        if given.get("toml") and given.get("json"):
            raise InputError("--toml: expected it or --json, got both. Leave one out.")
        return partial(print_shown, config, base_config(recipe, rest, prog), recipe, rest, given)
    return Training(config, **given)


def of_runs(words: Sequence[str]) -> Callable[[], object] | None:
    """Return the comparison of the finished runs that are named; None where none are."""
    from cure_fast.cli.compare import compare_runs, names_runs

    if HELP & set(words) or not names_runs(words):
        return None
    prog = "cure-fast compare"
    app = application(prog, compare_runs)
    with pointing_to(prog, "it"), in_a_line():
        run, bound, _ = app.parse_args(words)
        return run(*bound.args, **bound.kwargs)


def named_first(
    command: str, one: str, many: str, known: Mapping[str, Any], words: Sequence[str]
) -> Any:
    """Return what the first word names; None where that was help on all of them, which is printed.

    Args:
        command: such as ``analyze``.
        one: what its first word names, such as ``an analysis``.
        many: several of these.
        known: by name, each with a title and a source.
        words: what follows the command.

    Raises:
        InputError: for another word, or none.
    """
    named = bool(words) and not words[0].startswith("-")
    if HELP & set(words) and not named:
        width = max(map(len, known))
        lines = [f"{name:<{width}}  {it.title} ({it.source})" for name, it in known.items()]
        about = "\n\n".join([f"{many.capitalize()}:", *lines])
        app = application(f"cure-fast {command}", COMMANDS[command], about=about)
        app.help_print([], console=console_for(words))
        return None
    with pointing_to(f"cure-fast {command}", f"the {many}"):
        if not named:
            came = f"got {shown(words[0])} first" if words else "got nothing"
            raise InputError(f"{command}: expected the name of {one} before all else, {came}.")
        return find("NAME", known, words[0])


def prepare_analysis(words: Sequence[str]) -> Callable[[], object] | None:
    """Return the analysis that is named, to be run with what follows; None where that was help."""
    from cure_fast.analysis import ANALYSES
    from cure_fast.cli.analyze import analyze_function

    analysis = named_first("analyze", "an analysis", "analyses", ANALYSES, words)
    if analysis is None:
        return None
    titles = {"settings": f"Analysis {analysis.name}", "args": "What is looked at, and how"}
    about = f"{analysis.title} ({analysis.source}). {analysis.about}"
    prog = f"cure-fast analyze {analysis.name}"
    app = application(prog, analyze_function(analysis), about=about, titles=titles)
    return read_or_help(app, prog, words[1:])


def read_or_help(app: App, prog: str, words: Sequence[str]) -> Callable[[], object] | None:
    """Return what an application makes of words; None where that was help, which is printed."""
    if HELP & set(words):
        app.help_print([], console=console_for(words))
        return None
    with pointing_to(prog, "it"), in_a_line():
        run, bound, _ = app.parse_args(words)
        return run(*bound.args, **bound.kwargs)


def prepare_study(words: Sequence[str]) -> Callable[[], object] | None:
    """Return the study that is named, with its runs; None where that was help, which is printed."""
    from cure_fast.cli.configure import base_config
    from cure_fast.cli.study import STUDIES, alone_function, of_runs, read_study, run_runs

    found = named_first("study", "a study", "studies", STUDIES, words)
    if found is None:
        return None
    prog, rest, recipe = f"cure-fast study {found.name}", [*words[1:]], "quickstart"
    about = f"{found.title} ({found.source}). {found.about}"
    if found.entries is None:
        titles = {"settings": f"Study {found.name}"}
        app = application(prog, alone_function(found), about=about, titles=titles)
        return read_or_help(app, prog, rest)
    if rest and not rest[0].startswith("-"):
        recipe = rest.pop(0)
    if HELP & set(rest):
        config = base_config(recipe, [*rest, "--method", found.method], prog)
        app = application(prog, of_runs, config=config, about=about)
        return read_or_help(app, prog, rest)
    comparison, base = read_study(found, recipe, rest)
    return partial(run_runs, found, comparison, base)


def run_comparison(comparison: Comparison) -> None:
    """Train and evaluate what is compared."""
    from cure_fast.training.compare import compare

    compare(comparison)


@dataclass(frozen=True)
class Training:
    """The training of what was configured."""

    config: Config
    resume: bool = False
    override: bool = False

    def __call__(self) -> None:
        """Do it."""
        from cure_fast.training.job import train

        train(self.config, resume=self.resume, override=self.override)


def print_shown(
    config: Config, base: Config, recipe: str, words: Sequence[str], given: Mapping[str, bool]
) -> None:
    """Print a configuration as it was asked for."""
    from cure_fast.cli.listing import config_json, print_config
    from cure_fast.recipes import published_recipe, recipe_called
    from cure_fast.training.choices import starting_point
    from cure_fast.training.config_file import as_toml

    if given.get("toml"):
        # A run's folder is its own, and a file stands by itself.
        own = recipe if recipe_called(recipe) else ""
        if config.run.out == recipe:
            config = replace(config, run=replace(config.run, out=None))
        print(as_toml(config, starting_point(own), own))
    elif given.get("json"):
        print(config_json(config))
    else:
        regime, _ = split_flags(words, {"regime": str})
        official = "published" in regime.values() or published_recipe(recipe) is not None
        print_config(config, base, official)


def is_light(words: Sequence[str]) -> bool:
    """Return whether a command needs no torch."""
    return words[0] in ("list", "completion") or (words[0] == "show" and "--toml" in words)


def main(
    argv: Sequence[str] | None = None, *, turn: Literal["first", "second", "only"] = "only"
) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the words after the program's name; None takes those of this process.
        turn: ``first`` answers ahead of torch and announces what needs it, ``second`` does that.

    Raises:
        NeedsTorchError: at the first turn, if there is something to do that needs torch.
    """
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
                prepared = dispatch(words or ["--help"])
                if turn != "second" and isinstance(prepared, Training) and distributed.is_first():
                    say(opening(prepared.config))
                if turn == "first" and prepared is not None and not is_light(words):
                    raise NeedsTorchError
                if prepared is not None:
                    prepared()
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
        return fail(InputError(f"{path}{error.strerror or error}. {advice}"), error)
    except Exception as error:
        if is_out_of_memory(error):
            advice = "Try a smaller --batch-size or --eval-batch-size."
            return fail(MemoryExhaustedError(f"{error} {advice}"), error)
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


def fail(error: CureFastError, cause: Exception | None = None) -> int:
    """Print the error in a line, unless another process does, and return its exit code."""
    before = distributed.speaker(cause or error)
    if before is None:
        return error.code
    line = before + "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
    line = LONG_WORD.sub(lambda found: f"{found[0][:SHOWN]}...", line)
    tell(f"cure-fast: {line}")
    return error.code
