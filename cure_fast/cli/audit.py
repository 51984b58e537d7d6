"""``cure-fast audit``: whether the accuracy of a run or file under attack can be believed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cure_fast import distributed
from cure_fast.analysis.audit import AuditSettings, audit_of, checks_of, known_of
from cure_fast.analysis.shape import Result
from cure_fast.cli.analyze import open_one, run_analysis
from cure_fast.config.arguments import AnalyzeArgs, AuditChecks
from cure_fast.console import say
from cure_fast.files import user_path
from cure_fast.models.weights import resized_to


def audit_target(path: Path, settings: AuditChecks, args: AnalyzeArgs) -> None:
    """Audit the network of a run or file; write its figure and numbers, and print its verdicts."""
    # Before images are read.
    checks_of(settings)
    opened, own = open_one(path, args), AuditSettings(**vars(settings))
    data, size = opened.config.data, args.image_size
    if not path.is_dir():
        data = replace(data, image_size=size or resized_to(path, opened.metadata))
    known = known_of(
        data,
        user_path(args.data_root or data.data_root, "--data-root"),
        test=opened.test,
        split=path.is_dir(),
    )
    result = run_analysis(audit_of(known), [path], own, args, [opened])
    if distributed.is_first():
        print_verdicts(result)


def print_verdicts(result: Result) -> None:
    """Print the checks as a table, and the verdict of the audit."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"audit of {result.numbers['subjects'][0]['name']}")
    for name in ("check", "verdict", "evidence"):
        table.add_column(name)
    for row in result.rows:
        table.add_row(row["check"], row["verdict"], row["evidence"].replace("[", r"\["))
    console = Console()
    # Captured, because rich ends the program where the reader of its output has gone.
    with console.capture() as captured:
        console.print(table)
    say(captured.get().rstrip("\n"))
    say(f"audit: {result.numbers['verdict']}")
