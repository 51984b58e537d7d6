"""Parts of an analysis: computed one after the other, and kept for a later call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import cure_fast
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

        Raises:
            StoppedError: after a signal; what is finished is kept.
        """
        stored: dict[str, T] = self.read()
        missing = [name for name in parts if name not in stored]
        work = f"{title} {len(self.progress.parts)}"
        self.progress.plan(work, Part("analysis", (1.0,), len(missing)))
        with self.progress.work(work, title) as round_:
            for name in missing:
                if self.stop is not None and self.stop():
                    raise StoppedError("stopped by a signal")
                stored[name] = parts[name]()
                self.computed += 1
                self.write(stored)
                round_.advance(1, f" {name}")
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
