from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cure_fast.errors import InputError
from cure_fast.loaders import ImageSet, split_train


def numbered(labels: list[int], classes: int) -> ImageSet:
    """Images of one pixel that hold their own index."""
    count = len(labels)
    index = np.arange(count, dtype=np.uint32)
    pixels = np.stack([index % 256, index // 256, index * 0], axis=1).astype(np.uint8)
    return ImageSet(
        name="numbered",
        images=pixels.reshape(count, 1, 1, 3),
        labels=np.array(labels, np.int64),
        classes=tuple(f"c{i}" for i in range(classes)),
        source="a test",
    )


def indices(part: ImageSet) -> list[int]:
    return (part.images[:, 0, 0, 0] + 256 * part.images[:, 0, 0, 1].astype(int)).tolist()


@st.composite
def splits(draw):
    sizes = draw(st.lists(st.integers(2, 30), min_size=2, max_size=6))
    labels = draw(st.permutations([c for c, n in enumerate(sizes) for _ in range(n)]))
    total, classes = sum(sizes), len(sizes)
    val = draw(st.integers(classes, total - classes))
    train = draw(st.none() | st.integers(classes, total - val))
    return sizes, numbered(labels, classes), train, val, draw(st.integers(0, 2**63 - 1))


def as_even_as_possible(counts, available) -> bool:
    """No class could give one more so that a class with two more gives one less."""
    return all(
        counts[a] >= counts[b] - 1 or counts[a] == available[a]
        for a in range(len(counts))
        for b in range(len(counts))
    )


@given(splits())
def test_split_properties(case) -> None:
    sizes, whole, train_images, val_images, seed = case
    train, val = split_train(whole, train_images=train_images, val_images=val_images, seed=seed)
    a, b = indices(train), indices(val)
    assert not set(a) & set(b)
    assert len(set(b)) == len(b) == val_images
    assert (
        len(set(a)) == len(a) == (len(whole) - val_images if train_images is None else train_images)
    )
    assert a == sorted(a) and b == sorted(b)
    for part, chosen in ((train, a), (val, b)):
        assert (part.labels == whole.labels[chosen]).all()
        assert (np.bincount(part.labels, minlength=len(sizes)) >= 1).all()
    in_val = np.bincount(val.labels, minlength=len(sizes))
    assert as_even_as_possible(in_val, np.array(sizes) - 1)
    if train_images is not None:
        in_train = np.bincount(train.labels, minlength=len(sizes))
        assert as_even_as_possible(in_train, np.array(sizes) - in_val)


@given(splits())
def test_split_is_a_function_of_its_arguments(case) -> None:
    sizes, whole, train_images, val_images, seed = case
    options = {"val_images": val_images, "seed": seed}
    train, val = split_train(whole, train_images=train_images, **options)
    again, val_again = split_train(whole, train_images=train_images, **options)
    assert indices(train) == indices(again) and indices(val) == indices(val_again)
    _, val_of_fewer = split_train(whole, train_images=len(sizes), **options)
    assert indices(val_of_fewer) == indices(val)


def test_seeds_differ() -> None:
    whole = numbered([0, 1] * 50, 2)
    drawn = [
        indices(split_train(whole, train_images=None, val_images=20, seed=seed)[1])
        for seed in range(5)
    ]
    assert len(set(map(tuple, drawn))) == 5


@pytest.mark.parametrize(
    ("train_images", "val_images", "flag"),
    [
        (None, 2, "--val-images: expected 3 to 27 .*, got 2"),
        (None, 28, "--val-images: expected 3 to 27 .*, got 28"),
        (2, 10, "--train-images: expected 3 to 20 .*, got 2"),
        (21, 10, "--train-images: expected 3 to 20 .*, got 21"),
    ],
)
def test_impossible_counts(train_images, val_images, flag) -> None:
    with pytest.raises(InputError, match=flag):
        split_train(
            numbered([0, 1, 2] * 10, 3), train_images=train_images, val_images=val_images, seed=0
        )


def test_class_with_one_image() -> None:
    with pytest.raises(InputError, match=r"at least two .*, got 1 of c1"):
        split_train(numbered([0, 0, 0, 1], 2), train_images=None, val_images=2, seed=0)


def test_bad_labels_are_seen_first() -> None:
    whole = numbered([0, 1] * 5, 2)
    whole = replace(whole, labels=whole.labels + 1)
    with pytest.raises(InputError, match="from 0 to 1, got 2 for image 1"):
        split_train(whole, train_images=None, val_images=2, seed=0)
