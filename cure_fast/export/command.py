"""``cure-fast export``: from a run folder or file of weights to a verified file."""

from __future__ import annotations

from pathlib import Path

from cure_fast.config.arguments import ExportArgs
from cure_fast.console import say
from cure_fast.errors import InputError
from cure_fast.export.source import Source, read_source
from cure_fast.export.to_onnx import check_packages, export_onnx
from cure_fast.export.to_robustbench import (
    check_fits,
    check_package,
    export_robustbench,
    info_file,
)
from cure_fast.export.to_safetensors import export_safetensors
from cure_fast.export.verify import trial_images
from cure_fast.files import user_path

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "robustbench": ".pt"}
# Folder of exported files, in the run folder or beside the file of weights.
FOLDER = "export"


def export_model(target: Path, args: ExportArgs) -> None:
    """Export the best model of a run, or a file of weights, and print what was verified.

    A run may be training meanwhile: its files are replaced whole, and this is its best epoch
    so far.

    Raises:
        InputError: if it cannot be exported so, the file exists, or it computes something else.
    """
    if args.layout != "plain" and args.format != "robustbench":
        raise InputError(
            f"--layout: only for --format robustbench, got --format {args.format}. Leave it out."
        )
    source = read_source(target)
    if args.format == "onnx":
        check_packages()
    elif args.format == "robustbench":
        check_package()
    out = place(source, args)
    trial = trial_images(source, args.data_root)
    notes: list[str] = []
    if source.config is not None and source.results is None:
        notes.append("the run has no results.json: this is the best epoch so far")
    if args.format == "robustbench":
        check_fits(source, args.layout, tuple(trial.images.shape[2:]))
    _make_folder(out.parent)
    if args.format == "robustbench":
        difference, more = export_robustbench(source, trial.images, out, layout=args.layout)
        notes += more
    else:
        write = export_onnx if args.format == "onnx" else export_safetensors
        difference = write(source, trial.images, out)
    say(f"exported: {out}")
    if args.format == "robustbench":
        say(f"model info: {info_file(out)}")
    say(f"verified: equal predictions on {trial.told}; logits differ by at most {difference:.2g}")
    for note in notes:
        say(f"note: {note}")


def place(source: Source, args: ExportArgs) -> Path:
    """Return the file to write.

    Raises:
        InputError: if it has another ending than the format, or must not be replaced.
    """
    suffix = SUFFIXES[args.format]
    if args.out is None:
        out = source.path.parent / FOLDER / f"{source.path.stem}{suffix}"
    else:
        out = user_path(args.out, "--out")
    if out.suffix != suffix:
        raise InputError(
            f"--out: expected a file name ending in {suffix} for --format {args.format}, got "
            f"{str(args.out)!r}. Leave it out for {FOLDER}/{source.path.stem}{suffix}."
        )
    if out.resolve() == source.path.resolve():
        raise InputError(f"--out {out}: this is the file to export. Name another.")
    written = [out, info_file(out)] if args.format == "robustbench" else [out]
    for file in written:
        if file.is_dir():
            raise InputError(f"--out {file}: expected a file name, this is a folder. Name a file.")
        if file.exists() and not args.force:
            raise InputError(
                f"--out {file}: exists. Add --force to replace it, or name another file."
            )
    return out


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out: cannot make the folder {folder} ({error.strerror}). Name a file in a folder "
            "that you may write to."
        ) from error
