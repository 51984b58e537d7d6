"""What RobustBench's leaderboard wants to know of a model, from what the run has measured."""

from __future__ import annotations

from typing import Any

from cure_fast.config.checks import format_pixel
from cure_fast.errors import InputError
from cure_fast.export.source import Source
from cure_fast.methods import METHODS

# What only the authors can say.
FOR_AUTHORS = ("link", "name", "authors", "venue")


def model_info(source: Source, architecture: str) -> tuple[dict[str, Any], list[str]]:
    """Return the entry of a model for RobustBench's ``model_info``, and what is missing in it.

    An accuracy is there only where it was measured on all test images, in float32 and without a
    warning, and belongs to the exported weights.

    Args:
        source: what is exported.
        architecture: its name as RobustBench writes it.

    Raises:
        InputError: if ``results.json`` or the file's description has been damaged.
    """
    try:
        return _entry(source, architecture)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{source.path}: its description or the results.json beside it is damaged "
            f"({type(error).__name__}: {error}). `cure-fast eval RUN` writes results.json again "
            "once it has been moved away."
        ) from error


def _entry(source: Source, architecture: str) -> tuple[dict[str, Any], list[str]]:
    results = source.results or {}
    eps = results.get("eps", source.metadata.get("eps"))
    method = METHODS.get(source.metadata.get("method", ""))
    given_start = source.config is not None and source.config.model.init_from is not None
    info: dict[str, Any] = {
        "link": "",
        "name": method.label if method else "",
        "authors": "",
        # Weights that someone gave may come from more images than the data set has.
        "additional_data": None if given_start or source.config is None else False,
        "number_forward_passes": 1,
        "dataset": source.metadata["data"],
        "venue": "Unpublished",
        "architecture": architecture,
        "eps": None if eps is None else format_pixel(float(eps)),
    }
    notes = [f"fill in {', '.join(FOR_AUTHORS)} in the JSON file"]
    if info["additional_data"] is None:
        notes.append("additional_data is null: say whether the start saw other images")
    natural, why = _accuracy(source, "natural")
    if natural is None:
        notes.append(f"clean_acc is left out: {why}")
    else:
        info["clean_acc"] = natural
    robust, why = _accuracy(source, "aa")
    if robust is None:
        notes.append(
            f"autoattack_acc and reported are left out: {why}; "
            "`cure-fast eval RUN --attacks natural,aa --limit all --aa-limit all` measures them"
        )
    else:
        info |= {"reported": robust, "autoattack_acc": robust, "unreliable": False}
    return info, notes


def _accuracy(source: Source, attack: str) -> tuple[str | None, str]:
    """Return an accuracy in percent with two decimals, or None and why it can't be given."""
    if source.results is None:
        return None, "there is no results.json beside the weights"
    entry = source.results.get("models", {}).get("trained", {})
    if entry.get("weights") != source.sha256:
        return None, "results.json is of other weights"
    result = entry.get("attacks", {}).get(attack)
    if result is None:
        return None, f"{attack} was not run"
    total = source.results.get("test_images")
    if result["count"] != total:
        return None, f"{attack} was run on {result['count']:,} of {total:,} test images"
    if not result["reliable"]:
        return None, f"the result of {attack} is unreliable ({'; '.join(result['warnings'])})"
    if result["precision"] != "float32":
        return None, f"{attack} was run in {result['precision']}, not in float32"
    return f"{result['accuracy']:.2f}", ""
