"""The record of results as it is read again: a damaged one is refused, never replaced."""

from __future__ import annotations

import json

import pytest

from cure_fast.errors import InputError
from cure_fast.evaluation.record import stored_record

ATTACK = {
    "attack": "natural",
    "correct": 1,
    "count": 2,
    "seconds": 0.1,
    "settings": {},
    "warnings": [],
    "reliable": True,
    "precision": "float32",
}


def record(**attack):
    return {"models": {"trained": {"title": "t", "attacks": {"natural": ATTACK | attack}}}}


def test_a_record_comes_back_and_none_is_none(tmp_path):
    path = tmp_path / "results.json"
    assert stored_record(path) is None
    path.write_text(json.dumps(record()), encoding="utf-8")
    assert stored_record(path) == record()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"models": []}',
        '{"models": {"trained": {}}}',
        '{"models": {"trained": {"attacks": {"natural": {}}}}}',
        "[" * 100_000,
        "\udcff",
    ],
    ids=range(10),
)
def test_a_damaged_record_is_refused_and_kept(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"results\.json: .*damaged") as refused:
        stored_record(path)
    assert "\n" not in str(refused.value) and path.read_bytes() == before
