"""``cure-fast export``: from a run folder or file of weights to a verified file."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from cure_fast.config.arguments import ExportArgs
from cure_fast.console import say
from cure_fast.errors import InputError
from cure_fast.export import to_robustbench
from cure_fast.export.source import Source, describe, read_source
from cure_fast.export.to_onnx import check_packages, export_onnx
from cure_fast.export.verify import check_equal, trial_images
from cure_fast.files import replacing, user_path
from cure_fast.models.building import load_model
from cure_fast.models.weights import save_weights

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "robustbench": ".pt"}


def export_model(target: Path, args: ExportArgs) -> None:
    """Export the best model of a run, or a file of weights, and print what was verified.

    A run may be training: its files are replaced whole, and this is its best epoch so far.
    """
    robustbench = args.format == "robustbench"
    if args.layout != "plain" and not robustbench:
        raise InputError(
            f"--layout: only for --format robustbench, got --format {args.format}. Leave it out."
        )
    source = read_source(target)
    if args.format == "onnx":
        check_packages()
    elif robustbench:
        to_robustbench.check_package()
    out = place(source, args)
    images, told = trial_images(source, args.data_root)
    notes: list[str] = []
    if source.config is not None and source.results is None:
        notes.append("the run has no results.json: this is the best epoch so far")
    if robustbench:
        to_robustbench.check_fits(source, args.layout, tuple(images.shape[2:]))
    _make_folder(out.parent)
    if robustbench:
        write = to_robustbench.export_robustbench
        difference, more = write(source, images, out, layout=args.layout)
        notes += more
    else:
        write = export_onnx if args.format == "onnx" else export_safetensors
        difference = write(source, images, out)
    say(f"exported: {out}")
    if "epoch" in source.metadata:
        network = source.metadata.get("network", "model")
        of = "" if network == "model" else f" of the {network} network"
        say(f"weights: epoch {source.metadata['epoch']}{of}")
    if robustbench:
        say(f"model info: {to_robustbench.info_file(out)}")
    say(f"verified: equal predictions on {told}; logits differ by at most {difference:.2g}")
    for note in notes:
        say(f"note: {note}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out: cannot make the folder {folder} ({error.strerror}). Name a file in a folder "
            "that you may write to."
        ) from error


def export_safetensors(source: Source, images: Tensor, out: Path) -> float:
    """Write ``out``, whole and verified or not at all; see :func:`check_equal` for the rest."""
    with replacing(out) as temporary:
        save_weights(source.model, temporary, describe(source))
        written = load_model(temporary, trusted=source.metadata["model"]).eval()
        return check_equal(source.model, written, images)


def place(source: Source, args: ExportArgs) -> Path:
    """Return the file to write; refuse another ending than the format's, and what is there."""
    suffix = SUFFIXES[args.format]
    usual = f"export/{source.path.stem}{suffix}"
    out = source.path.parent / usual if args.out is None else user_path(args.out, "--out")
    if out.suffix != suffix:
        raise InputError(
            f"--out: expected a file name ending in {suffix} for --format {args.format}, got "
            f"{str(args.out)!r}. Leave it out for {usual}."
        )
    if out.resolve() == source.path.resolve():
        raise InputError(f"--out {out}: this is the file to export. Name another.")
    info = [to_robustbench.info_file(out)] if args.format == "robustbench" else []
    for file in [out, *info]:
        if file.is_dir():
            raise InputError(f"--out {file}: expected a file name, this is a folder. Name a file.")
        if file.exists() and not args.force:
            raise InputError(
                f"--out {file}: exists. Add --force to replace it, or name another file."
            )
    return out
