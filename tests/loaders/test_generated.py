"""Generated images: the file that holds them, and the batches that they are mixed into."""

from __future__ import annotations

import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cure_fast.cli.main import main
from cure_fast.errors import InputError
from cure_fast.loaders import Mix, generated_hash, make_loader, read_generated
from cure_fast.loaders.choose import KINDS

SHARE, BATCH, OWN = 0.7, 16, 67


def save(path: Path, images, *, compressed: bool = False, **arrays) -> str:
    write = np.savez_compressed if compressed else np.savez
    write(path, image=images.images, label=images.labels, **arrays)
    return f"npz:{path}"


def read(name, training, tmp_path, checksum=None):
    return read_generated(name, training, checksum=checksum, cache=tmp_path / "cache")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_is_mapped_and_not_read(make_images, tmp_path, capsys, compressed) -> None:
    made, training = make_images(50, seed=1), make_images(20)
    name = save(tmp_path / "made.npz", made, compressed=compressed)
    for _ in range(2):
        found = read(name, training, tmp_path)
        assert isinstance(found.images, np.memmap) and found.classes == training.classes
        assert (found.images == made.images).all() and (found.labels == made.labels).all()
    # Said once, as it is done once.
    assert capsys.readouterr().out.count("unpacking") == compressed


def test_a_checksum_is_of_what_the_file_holds(make_images, tmp_path) -> None:
    made, training = make_images(50, seed=1), make_images(20)
    name = save(tmp_path / "made.npz", made)
    own = generated_hash(name)
    packed = save(tmp_path / "packed.npz", made, compressed=True)
    assert len(own) == 16 and generated_hash(packed) == own
    other = save(tmp_path / "other.npz", make_images(50, seed=2))
    read(packed, training, tmp_path, checksum=own)
    with pytest.raises(InputError, match=f"--aux-hash {own}, got {generated_hash(other)}"):
        read(other, training, tmp_path, checksum=own)


def damaged(path: Path, made) -> str:
    np.savez(path, image=made.images, label=made.labels)
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("image.npy").header_offset
    content = bytearray(path.read_bytes())
    content[place + 30 + len("image.npy") + 20] ^= 255  # the format's magic, behind the zip's entry
    path.write_bytes(content)
    return f"npz:{path}"


def test_wrong_files_are_refused_in_a_line(make_images, tmp_path) -> None:
    made, training = make_images(50, seed=1), make_images(20)
    (tmp_path / "text.npz").write_text("Buy milk.")
    np.savez(tmp_path / "names.npz", images=made.images, labels=made.labels)
    np.savez(tmp_path / "objects.npz", image=np.array([{}]), label=made.labels)
    np.savez(tmp_path / "floats.npz", image=made.images / 255, label=made.labels)
    np.savez(tmp_path / "few.npz", image=made.images, label=made.labels[:40])
    np.savez(tmp_path / "large.npz", image=made.images, label=made.labels + 1)
    cases = {
        "missing.npz": "No such file",
        "text.npz": "not a zip file",
        "names.npz": "it has no image, but images, labels",
        "objects.npz": "objects",
        "floats.npz": "uint8",
        "few.npz": "expected 50 labels",
        "large.npz": "expected labels from 0 to 2, got 3",
    }
    names = {f"npz:{tmp_path / file}": told for file, told in cases.items()}
    names[damaged(tmp_path / "bits.npz", made)] = "expected an .npz"
    names[save(tmp_path / "size.npz", make_images(50, 12))] = "expected images of 8 pixels"
    other = save(tmp_path / "other.npz", made, classes=np.array(["bee", "ape", "cat"]))
    names[other] = "expected the classes ape, bee, cat in this order, got bee, ape, cat"
    for name, told in names.items():
        with pytest.raises(InputError, match=told) as caught:
            read(name, training, tmp_path)
        assert "\n" not in str(caught.value)


def loader(kind, request, images, generated, share=SHARE, batch_size=BATCH, **options):
    cache = request.getfixturevalue("cache") if kind in ("ffcv", "auto") else Path("unused")
    defaults = {"device": torch.device("cpu"), "seed": 3, "crop_padding": 0, "flip": False}
    return make_loader(
        kind,
        images,
        batch_size=batch_size,
        mix=Mix(generated, share),
        workers=2 if kind == "torch" else None,
        cache=cache,
        **{**defaults, **options},
    )


def batches_of(loader, epoch, **options):
    with loader.epoch(epoch, **options) as batches:
        return list(batches)


@pytest.fixture
def generated(make_images, tmp_path):
    """40 generated images, of which a batch of 16 takes 11, so a pass is of 3 batches."""
    return read(save(tmp_path / "made.npz", make_images(40, seed=1)), make_images(OWN), tmp_path)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "auto"])
def test_every_loader_mixes_the_same_images_in(request, make_images, generated, kind) -> None:
    images = make_images(OWN)
    feed = loader(kind, request, images, generated)
    assert (feed.num_images, feed.batches_per_epoch, feed.set_size) == (OWN, 5, OWN + 40)
    assert "11 of the 16 images of a batch are of 40 generated ones" in feed.reason
    both = np.concatenate([images.images, generated.images])
    labels = np.concatenate([images.labels, generated.labels])
    for epoch in (0, 4):
        batches = batches_of(feed, epoch)
        assert [int((b.index >= OWN).sum()) for b in batches] == [11, 11, 11, 11, 2]
        for batch in batches:
            index = batch.index.numpy()
            assert len(set(index)) == len(index)
            pixels = both[index].astype(np.float32) / np.float32(255)
            assert (batch.x.permute(0, 2, 3, 1).numpy() == pixels).all()
            assert (batch.y.numpy() == labels[index]).all()
        for start in (2, 4, 5):
            rest = batches_of(feed, epoch, start_batch=start)
            assert [b.index.tolist() for b in rest] == [b.index.tolist() for b in batches[start:]]


def test_loaders_mix_and_augment_alike(request, make_images, generated) -> None:
    for augment in ("crop-flip", "idbh-weak"):
        options = {"augment": augment, "crop_padding": 2, "flip": True}
        found = [
            [b.x.numpy().tobytes() for b in batches_of(loader(k, request, *sets, **options), 1)]
            for sets in [(make_images(OWN), generated)]
            for k in ("resident", "torch", "ffcv")
        ]
        assert found[0] == found[1] == found[2]


def test_a_pass_over_the_generated_images_has_none_twice(request, make_images, generated) -> None:
    feed = loader("resident", request, make_images(OWN), generated, share=0.5)
    epochs = [batches_of(feed, epoch) for epoch in range(3)]
    taken = [b.index[b.index >= OWN].tolist() for batches in epochs for b in batches]
    # Passes of five batches of 8, the last of each epoch having less.
    for start in (0, 5, 10):
        seen = [place for places in taken[start : start + 5] for place in places]
        assert len(seen) == len(set(seen)) == 34
    assert taken[:5] != taken[5:10]
    own = [sorted(int(i) for b in batches for i in b.index if i < OWN) for batches in epochs]
    assert all(len(places) == len(set(places)) == OWN - 34 for places in own) and own[0] != own[1]


def test_shares_that_no_batch_can_have(request, make_images, generated) -> None:
    images = make_images(OWN)
    with pytest.raises(InputError, match=r"--aux-share.*got 0\.01 of 16"):
        loader("resident", request, images, generated, share=0.01)
    with pytest.raises(InputError, match=r"--aux: expected at least 45 generated images"):
        loader("resident", request, images, generated, batch_size=64)
    # As BatchNorm could not train on a batch of one, a batch of generated images alone is none.
    feed = loader("torch", request, images, generated, share=0.99)
    assert [int((b.index < OWN).sum()) for b in batches_of(feed, 0)] == [1] * 5


def test_a_folder_is_packed_image_by_image(tmp_path, make_images) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 12, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        place = tmp_path / "made" / ("ape", "bee", "cat")[number % 3] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
    out = tmp_path / "out" / "made.npz"
    assert main(["data", "pack", str(tmp_path / "made"), str(out), "--image-size", "8"]) == 0
    found = read(f"npz:{out}", make_images(20), tmp_path)
    assert found.labels.tolist() == [0, 0, 1, 1, 2]
    assert (found.images == pixels[[0, 3, 1, 4, 2], 2:10]).all()
    with np.load(out) as stored:
        assert stored["classes"].tolist() == ["ape", "bee", "cat"]
    assert [path.name for path in out.parent.iterdir()] == ["made.npz"]


def test_memory_is_that_of_a_batch(tmp_path, make_images, request) -> None:
    """Of 300 MB of images a step takes its own alone: the address space is there, no pages."""
    count, path = 100_000, tmp_path / "many.npz"
    with zipfile.ZipFile(path, "w") as archive:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, 32, 32, 3)}
        with archive.open("image.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(count // 1000):
                file.write(bytes(1000 * 32 * 32 * 3))
        with archive.open("label.npy", "w") as file:
            np.lib.format.write_array(file, np.zeros(count, np.int64))
    training = make_images(64, 32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    feed = loader("resident", request, training, read(f"npz:{path}", training, tmp_path))
    assert len(batches_of(feed, 0)) == 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ffcv", "resident", "torch"])
def test_gpu_batches_are_those_of_the_cpu(request, make_images, generated, kind) -> None:
    sets, options = (make_images(OWN), generated), {"crop_padding": 2, "flip": True}
    plain = batches_of(loader("torch", request, *sets, **options), 1)
    on_gpu = batches_of(loader(kind, request, *sets, **options, device=torch.device("cuda")), 1)
    for one, other in zip(on_gpu, plain, strict=True):
        assert one.x.device.type == one.y.device.type == one.index.device.type == "cuda"
        assert torch.equal(one.x.cpu(), other.x) and torch.equal(one.y.cpu(), other.y)
        assert torch.equal(one.index.cpu(), other.index)
