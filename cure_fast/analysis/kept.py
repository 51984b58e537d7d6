"""Parts of an analysis: computed one after the other, and kept for a later call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import cure_fast
from cure_fast import distributed
from cure_fast.config.values import digest
from cure_fast.errors import StoppedError
from cure_fast.evaluation.model_state import tensor_hash
from cure_fast.files import write_json
from cure_fast.progress import Part, Progress

T = TypeVar("T")


def identity_of(own: Mapping[str, Any], *tensors: Tensor) -> str:
    """Return 16 hexadecimal digits of all that decides what an analysis finds."""
    told = {
        **own,
        "sources": sources_hash(),
        "tensors": [tensor_hash(tensor) for tensor in tensors],
        "cure_fast": cure_fast.__version__,
        "torch": torch.__version__,
    }
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sources_hash() -> str:
    """Return a hash of this package's own files: what an analysis finds hangs on all of them."""
    found = hashlib.sha256()
    package = Path(cure_fast.__file__).parent
    # In a checkout two of its folders are links, which a walk leaves out.
    for place in (package, package / "kernels", package / "loaders"):
        for path in sorted(place.rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()


def dealt(parts: Mapping[str, Callable[[], T]], turn: Sequence[str]) -> dict[str, T]:
    """Return what the parts give, of which each process computes one by itself."""

    def compute_own() -> dict[str, T]:
        own = distributed.own(turn)
        with distributed.apart():
            return {name: parts[name]() for name in own}

    return {name: value for found in distributed.each(compute_own) for name, value in found.items()}


def together(parts: Mapping[str, Callable[[], T]], name: str) -> dict[str, T]:
    """Return what a part gives; processes share attacks, and all take what the first one has."""
    value = parts[name]()
    return {name: distributed.first(lambda: value)}


@dataclass
class Kept:
    """Finished parts, in a file where there is a path.

    Attributes:
        path: the file; its name holds what decides the parts.
        stop: asked before each part; true ends the analysis.
        progress: what is told of the parts.
        computed: parts that were computed here, and not read.
    """

    path: Path | None = None
    stop: Callable[[], bool] | None = None
    progress: Progress = field(default_factory=Progress)
    computed: int = 0

    def each(self, parts: Mapping[str, Callable[[], T]], title: str = "") -> dict[str, T]:
        """Return what each part gives, by its name, computed where it is not kept.

        Several processes take the parts in turn; a part that is alone they compute together.

        Raises:
            StoppedError: after a signal; what is finished is kept.
        """
        stored: dict[str, T] = distributed.first(self.read)
        missing = [name for name in parts if name not in stored]
        work = f"{title} {len(self.progress.parts)}"
        self.progress.plan(work, Part("analysis", (1.0,), len(missing)))
        with self.progress.work(work, title) as round_:
            size = distributed.processes() if len(missing) > 1 else 1
            for at in range(0, len(missing), size):
                if distributed.any_true(self.stop is not None and self.stop()):
                    raise StoppedError("stopped by a signal")
                turn = missing[at : at + size]
                stored |= dealt(parts, turn) if size > 1 else together(parts, turn[0])
                self.computed += len(turn)
                if distributed.writes():
                    self.write(stored)
                round_.advance(len(turn), f" {turn[-1]}")
        return {name: stored[name] for name in parts}

    def read(self) -> dict[str, Any]:
        """Return what the file holds; a damaged one counts as none, as it can be made again."""
        if self.path is not None:
            with suppress(OSError, ValueError, TypeError, KeyError):
                found = json.loads(self.path.read_text(encoding="utf-8"))
                parts, own = found["parts"], found["digest"]
                if digest(parts) == own:
                    return parts
        return {}

    def write(self, parts: Mapping[str, Any]) -> None:
        """Write all parts so far."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"digest": digest(parts), "parts": parts})
