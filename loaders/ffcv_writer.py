"""Writes a .beton file and reads it back: the child process of :mod:`.beton`.

    python -m cure_fast.loaders.ffcv_writer IMAGES.npy LABELS.npy OUT.beton

prints the checksum of what FFCV reads from the finished file, image by image in order. It ends
early when its standard input does.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ffcv_reader import import_ffcv, open_epoch, open_reader
from .image_set import content_checksum

# FFCV's smallest page; a file takes at least two, so small sets stay small.
MIN_PAGE_BYTES = 1 << 21
IMAGES_PER_PAGE = 16
READ_BATCH = 256


class Samples:
    """(image, label) by index, as FFCV's writer asks for them."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.images[index], int(self.labels[index])


def write_samples(samples: Samples, path: Path) -> None:
    """Write ``samples`` in raw mode, in this process.

    FFCV's own writer starts processes and never ends when one of them raises, and it leaves
    shared memory behind when it is killed. Without processes an exception is an exception, and
    the same samples give the same bytes.

    Args:
        samples: images of one size.
        path: file to write.
    """
    import_ffcv()
    from ffcv.fields import IntField, RGBImageField  # pyright: ignore[reportMissingImports]
    from ffcv.writer import DatasetWriter, MemoryAllocator, Value  # pyright: ignore[reportMissingImports]

    class InProcessWriter(DatasetWriter):
        def _write_common(
            self, num_samples: int, queue_content: Any, work_fn: Any, extra_worker_args: Any
        ) -> None:
            self.num_samples = num_samples
            self.prepare()
            shared = self.metadata_sm
            self.metadata_sm: Any = SimpleNamespace(buf=bytearray(shared.size))
            shared.close()
            shared.unlink()
            allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
            todo, allocations = SimpleQueue(), SimpleQueue()
            for chunk in [*queue_content, None]:
                todo.put(chunk)
            work_fn(
                todo,
                self.metadata_sm,
                self.metadata_type,
                self.fields,
                allocator,
                Value("Q", 0),
                allocations,
                *extra_worker_args,
            )
            self.finalize(allocations.get())

    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    size = _page_bytes(samples.images[0].nbytes)
    writer = InProcessWriter(str(path), fields, page_size=size, num_workers=1)
    writer.from_indexed_dataset(samples)


def _page_bytes(image_bytes: int) -> int:
    """Return a power of two that holds some images, so that little of a page stays empty."""
    return max(MIN_PAGE_BYTES, 1 << (image_bytes * IMAGES_PER_PAGE - 1).bit_length())


def read_samples(path: Path) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Yield images (uint8 [n, H, W, 3]) and labels (int64 [n]) that FFCV reads, in order.

    Both are written over when the next are asked for.
    """
    reader = open_reader(path, batch_size=READ_BATCH, threads=1)
    with open_epoch(reader, np.arange(reader.reader.num_samples, dtype=np.int64)) as batches:
        yield from batches


def compared(
    path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64]
) -> Iterator[NDArray[np.uint8]]:
    """Yield the images that FFCV reads; end the process at one that is not as it was given."""
    start = 0
    for read_images, read_labels in read_samples(path):
        place = slice(start, start + len(read_images))
        shape = images[place].shape
        if read_images.shape != shape:
            sys.exit(f"wrote images {list(shape)}, read {list(read_images.shape)} back")
        same = (read_images == images[place]).all(axis=(1, 2, 3)) & (read_labels == labels[place])
        if not same.all():
            wrong = start + np.flatnonzero(~same)[0]
            sys.exit(f"sample {wrong} was read back with other pixels or label")
        yield read_images
        start = place.stop
    if start != len(images):
        sys.exit(f"wrote {len(images)} images, read {start} back")


def main(arguments: list[str]) -> None:
    """Write, read back, compare with the source sample by sample, print the checksum."""
    images_file, labels_file, out = arguments
    images, labels = np.load(images_file, mmap_mode="r"), np.load(labels_file)
    write_samples(Samples(images, labels), Path(out))
    print(content_checksum(images.shape, compared(Path(out), images, labels), labels))


def end_with_the_parent() -> None:
    """Leave at once when standard input ends, which the parent holds open while it lives."""

    def watch() -> None:
        while os.read(0, 1):
            continue
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with_the_parent()
    main(sys.argv[1:])
