"""FFCV 1.0.2 behind guards: its import, and an epoch that ends, fails and stops as it should.

Each guard answers a fault that was reproduced in 1.0.2:

* ``import ffcv`` and ``ffcv.loader.Loader`` set torch's number of threads: saved and restored.
* ``import ffcv`` spends 3 to 4 s in compiling a numba dictionary that holds two entries.
* An exception in the producer thread leaves the consumer waiting for ever: it is handed over.
* Leaving the loop early leaks the producer thread and its buffers: :func:`open_epoch` ends it.
* ``drop_last`` is on by default; ``num_workers`` above the usable cores raises; a traversal order
  of one's own is refused; its augmentation cannot be seeded: none of them is used, the order is
  given per epoch.
* Batches are views of a ring of slots: see :func:`open_epoch`.
"""

from __future__ import annotations

import importlib.metadata
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .torch_loader import usable_cores

WAIT_S = 0.05


def import_ffcv() -> None:
    """Import FFCV without its side effects.

    Raises:
        ImportError: where it is absent or does not load (OSError for a missing library).
    """
    with _torch_threads():
        typed: Any = import_module("numba.typed")
        # FFCV keeps {"jpg": 0, "raw": 1} in it and reads it from Python alone.
        compiled_dict = typed.Dict
        typed.Dict = dict
        try:
            import_module("ffcv.loader")
        finally:
            typed.Dict = compiled_dict


def ffcv_problem() -> str:
    """Return why FFCV cannot be used, or an empty string where it can."""
    try:
        version = ffcv_version()
    except importlib.metadata.PackageNotFoundError:
        return "FFCV is not installed (pip install 'cure-fast[ffcv]')"
    try:
        import_ffcv()
    except (ImportError, OSError) as error:
        return f"FFCV {version} does not import ({error}); cure-fast doctor says what mends it"
    return ""


def ffcv_version() -> str:
    """Return the installed version (``ffcv.__version__`` says 0.0.3rc1 in 1.0.2).

    Raises:
        importlib.metadata.PackageNotFoundError: where FFCV is not installed.
    """
    return importlib.metadata.version("ffcv")


@contextmanager
def _torch_threads() -> Iterator[None]:
    """Restore torch's number of threads after the block."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def open_reader(path: Path, *, batch_size: int, threads: int) -> Any:
    """Return FFCV's loader of a file that our own writer made and whose hash was checked.

    Args:
        path: the .beton file; FFCV's C code trusts what is in it.
        batch_size: images per batch.
        threads: threads that copy images, at least 1; no more than the usable cores are taken.
    """
    import_ffcv()
    from ffcv.fields.basics import IntDecoder  # pyright: ignore[reportMissingImports]
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder  # pyright: ignore[reportMissingImports]
    from ffcv.loader import Loader  # pyright: ignore[reportMissingImports]

    with _torch_threads():
        # The order, and with it the last batch, is given to open_epoch.
        return Loader(
            str(path),
            batch_size=batch_size,
            num_workers=max(1, min(threads, usable_cores())),
            os_cache=True,
            pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
        )


@contextmanager
def open_epoch(
    reader: Any, order: NDArray[np.int64]
) -> Iterator[Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]]:
    """Read the images at ``order`` (int64 [N]) in batches; leaving the context ends the thread.

    Yields:
        (images uint8 [n, H, W, 3], labels int64 [n]) per batch. Both are views of a slot that is
        written again as soon as the next batch is asked for.

    Args:
        reader: what :func:`open_reader` returned.
        order: index of each image in the file.

    Raises:
        RuntimeError: from the iterator, when FFCV's pipeline failed.
    """
    epoch = _new_epoch(reader, order)
    try:
        yield _batches(epoch)
    finally:
        epoch.release()


def _batches(epoch: Any) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    for images, labels in epoch:
        yield images, labels[:, 0]  # FFCV's labels are [n, 1]
    if epoch.error is not None:
        raise RuntimeError(f"FFCV's pipeline failed: {epoch.error!r}") from epoch.error


def _new_epoch(reader: Any, order: NDArray[np.int64]) -> Any:
    """Return FFCV's iterator over ``order``, with its thread's loop replaced, and started."""
    from ffcv.loader.epoch_iterator import EpochIterator  # pyright: ignore[reportMissingImports]
    from ffcv.pipeline.compiler import set_num_threads  # pyright: ignore[reportMissingImports]

    class Epoch(EpochIterator):
        error: BaseException | None = None

        def run(self) -> None:
            try:
                # numba's alone, for this thread: FFCV's own loop sets torch's number as well.
                set_num_threads(reader.num_workers)
                slots = reader.batches_ahead + 2
                for number, indices in enumerate(self.iter_ixes):
                    slot = number % slots
                    if not self._put((slot, self.run_pipeline(number, indices, slot, None))):
                        return
            except BaseException as error:
                self.error = error
            self._put(None)

        def _put(self, item: object) -> bool:
            """Hand ``item`` to the consumer; False when it has left."""
            while not self.terminate_event.is_set():
                try:
                    self.output_queue.put(item, timeout=WAIT_S)
                    return True
                except queue.Full:
                    continue
            return False

        def release(self) -> None:
            """End the thread and close FFCV's file."""
            self.terminate_event.set()
            self.join()
            self.close()

    indices: Any = order
    return Epoch(reader, indices)
