"""Finished attacks are kept and reused for exactly what they measured, and for nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cure_fast
from cure_fast.errors import InputError, StoppedError
from cure_fast.evaluation.attack_result import read_state, write_state
from cure_fast.evaluation.autoattack import autoattack_settings, run_autoattack
from cure_fast.evaluation.evaluate import evaluate
from cure_fast.evaluation.measurement import Measurement
from cure_fast.evaluation.model_state import layers_hash
from cure_fast.evaluation.trust import Guard

pytestmark = pytest.mark.usefixtures("one_thread")

ATTACKS = ["natural", "fgsm", "pgd5", "cw5"]
COMMON: dict[str, Any] = {
    "num_classes": 4,
    "attacks": ATTACKS,
    "eps": 0.04,
    "step_size": None,
    "batch_size": 7,
    "device": "cpu",
    "seed": 0,
}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


def without_time(results):
    return {n: r.to_dict() | {"seconds": None} for n, r in results.items()}


def test_a_second_call_does_not_touch_the_model(linear, data, tmp_path):
    model = linear()
    images, labels = data(model)
    first = evaluate(model, images, labels, state_dir=tmp_path, **COMMON)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{a}.json" for a in ATTACKS)
    calls = model.calls
    # The batch size does not decide these results, so it may change.
    second = evaluate(model, images, labels, state_dir=tmp_path, **dict(COMMON, batch_size=24))
    assert second == first and model.calls == calls
    more = evaluate(
        model, images, labels, state_dir=tmp_path, **dict(COMMON, attacks=["pgd5", "pgd6"])
    )
    assert more["pgd5"] == first["pgd5"] and model.calls > calls


@pytest.mark.parametrize("last_call", [1, 5, 9, 14, 20, 30, 40])
def test_a_stopped_evaluation_continues(linear, data, tmp_path, last_call):
    model = linear()
    images, labels = data(model)
    unbroken = evaluate(model, images, labels, **COMMON)
    model.calls = 0
    stop = lambda: model.calls >= last_call  # noqa: E731
    with pytest.raises(StoppedError, match="stopped by a signal"):
        evaluate(model, images, labels, state_dir=tmp_path, stop=stop, **COMMON)
    assert model.calls == last_call
    done = {p.stem for p in tmp_path.iterdir()}
    assert done < set(ATTACKS)
    continued = evaluate(model, images, labels, state_dir=tmp_path, **COMMON)
    assert without_time(continued) == without_time(unbroken)


def other_weights(model, images, labels):
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    return images, labels


def other_buffer(model, images, labels):
    model.register_buffer("mean", torch.zeros(3), persistent=False)
    return images, labels


def other_layers(model, images, labels):
    model.extra = torch.nn.ReLU()
    return images, labels


def other_image(model, images, labels):
    images = images.clone()
    images[3, 0, 0, 0] ^= 1
    return images, labels


def other_label(model, images, labels):
    labels = labels.clone()
    labels[2] = (labels[2] + 1) % 4
    return images, labels


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_weights, "weights"),
        (other_buffer, "weights"),
        (other_layers, "layers"),
        (other_image, "images"),
        (other_label, "labels"),
        (lambda model, x, y: (x[1:], y[1:]), "images"),
    ],
)
def test_state_of_another_model_or_set_is_refused(linear, data, tmp_path, change, named):
    model = linear()
    images, labels = data(model)
    common: dict[str, Any] = COMMON | {"attacks": ["pgd5"], "state_dir": tmp_path}
    evaluate(model, images, labels, **common)
    before = (tmp_path / "pgd5.json").read_text()
    images, labels = change(model, images, labels)
    with pytest.raises(InputError, match=rf"other .*{named} \(.*Delete .*pgd5\.json or .* folder"):
        evaluate(model, images, labels, **common)
    assert (tmp_path / "pgd5.json").read_text() == before


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"eps": 0.05, "step_size": 0.004}, r"eps \(0\.04 there, 0\.05 here\)"),
        ({"step_size": 0.005}, r"step_size \(0\.02 there, 0\.005 here\)"),
        ({"seed": 1}, r"seed \(0 there, 1 here\)"),
    ],
)
def test_state_of_other_settings_is_refused(linear, data, tmp_path, settings, named):
    model = linear()
    images, labels = data(model)
    common: dict[str, Any] = COMMON | {"attacks": ["pgd5"], "state_dir": tmp_path}
    evaluate(model, images, labels, **common)
    with pytest.raises(InputError, match=named):
        evaluate(model, images, labels, **common | settings)


@pytest.mark.parametrize("key", ["torch", "cure_fast", "pyautoattack", "version"])
def test_state_of_another_version_is_refused(tmp_path, key):
    settings = autoattack_settings(eps=0.04, num_classes=4, batch_size=6, seed=0)
    identity = {"torch": "2.11", "cure_fast": "0.1.0", **settings}
    path = tmp_path / "aa.json"
    write_state(path, {"identity": identity | {key: "1.0"}, "progress": {}})
    with pytest.raises(InputError, match=rf"stored with other {key} \(1\.0 there, .* here\)"):
        read_state(path, identity)


def test_identity_holds_the_versions(linear, data, tmp_path, short_autoattack):
    model = linear()
    images, labels = data(model, 4)
    evaluate(model, images, labels, **COMMON | {"attacks": ["pgd1", "aa"], "state_dir": tmp_path})
    for name in ("pgd1", "aa"):
        identity = json.loads((tmp_path / f"{name}.json").read_text())["identity"]
        assert identity["torch"] == torch.__version__
        assert identity["cure_fast"] == cure_fast.__version__
    assert identity["version"] == "standard" and identity["pyautoattack"] == "0.2.0"


SETTINGS = {
    "slope": lambda model: setattr(model[2], "negative_slope", -5.0),
    "eps of BatchNorm": lambda model: setattr(model[1], "eps", 0.1),
    "stride": lambda model: setattr(model[0], "stride", (3, 3)),
    "padding": lambda model: setattr(model[0], "padding", (2, 2)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_state_of_other_settings_of_a_layer_is_refused(data, tmp_path, name):
    """Weights, names and types are those of the stored result, and the shapes fit."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=2, padding=1),
        torch.nn.BatchNorm2d(4),
        torch.nn.LeakyReLU(0.01),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
    )
    images, labels = data(model)
    common: dict[str, Any] = COMMON | {"attacks": ["natural"], "state_dir": tmp_path}
    first = evaluate(model, images, labels, **common)
    assert evaluate(model, images, labels, **common) == first
    SETTINGS[name](model)
    with pytest.raises(InputError, match=r"stored with other layers \("):
        evaluate(model, images, labels, **common)


def test_a_place_in_memory_is_no_setting():
    class Calling(torch.nn.Module):
        def extra_repr(self) -> str:
            return f"<function f at {id(self):#x}>, 3 times"

    keep = [Calling(), Calling()]
    assert len({module.extra_repr() for module in keep}) == 2
    assert len({layers_hash(module) for module in keep}) == 1


@settings(deadline=None, max_examples=60)
@given(data=st.data(), state=JSON)
def test_any_change_of_a_state_is_seen(data, state):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "pgd5.json"
        identity = {"attack": "pgd5", "eps": 0.04}
        write_state(path, {"identity": identity, "result": state})
        assert read_state(path, identity)["result"] == state
        whole = path.read_bytes()
        cut = data.draw(st.integers(0, len(whole) - 3))
        place = data.draw(st.integers(0, len(whole) - 1))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="Delete"):
            read_state(path, identity)
        path.write_bytes(flipped)
        # White space may change without a change of meaning; all else is refused.
        if strict(whole) != strict(flipped):
            with pytest.raises(InputError, match="Delete"):
                read_state(path, identity)


def strict(text: bytes) -> Any:
    """Return what the JSON says, or None where it says nothing."""
    try:
        return json.loads(text)
    except ValueError:
        return None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"result": {}}', '{"identity": 3}'])
def test_damaged_state_is_refused(linear, data, tmp_path, content):
    model = linear()
    images, labels = data(model)
    (tmp_path / "pgd5.json").write_text(content)
    with pytest.raises(InputError, match=r"not a stored evaluation.*Delete"):
        evaluate(model, images, labels, **dict(COMMON, attacks=["pgd5"], state_dir=tmp_path))


@pytest.fixture
def autoattack(linear, data, short_autoattack):
    """Return a function that runs a short AutoAttack in two batches, from and to a progress."""
    model = linear(4).eval().requires_grad_(False)
    images, labels = data(model, 14, wrong=2)
    task = Measurement(
        guard=Guard(model, num_classes=4),
        images=images,
        labels=labels,
        device=torch.device("cpu"),
        eps=0.04,
        step_size=0.01,
        batch_size=6,
        seed=0,
    )
    settings = autoattack_settings(eps=0.04, num_classes=4, batch_size=6, seed=0)

    def run(progress, save):
        with torch.no_grad():
            return run_autoattack(
                task.guard,
                task.load,
                task.natural[0],
                settings=settings,
                progress=progress,
                save=save,
            )

    return run


def test_autoattack_continues_from_every_point(autoattack):
    stored = []
    unbroken = autoattack(None, lambda progress: stored.append(json.dumps(progress)))
    assert 0 < int(unbroken.robust.sum()) < 12
    counts = list(unbroken.robust_after.values())
    assert counts[0] < 12 and counts == sorted(counts, reverse=True)
    # One point after each batch of each attack, and one after each attack.
    assert len(stored) >= 8 + 1
    # Three points for each attack: these meet each kind, after a first batch, a last batch and an
    # attack, each within another attack.
    assert len(stored) == 12
    for point in (0, 4, 8, 9):
        text, later = stored[point], []
        continued = autoattack(json.loads(text), later.append)
        assert torch.equal(continued.robust, unbroken.robust), point
        assert continued.robust_after == unbroken.robust_after
        assert continued.warnings == unbroken.warnings
        assert len(later) == len(stored) - point - 1
        assert continued.seconds >= json.loads(text)["seconds"]


def test_autoattack_killed_between_attacks_continues(linear, data, tmp_path, short_autoattack):
    model = linear()
    images, labels = data(model, 16)
    common: dict[str, Any] = COMMON | {"attacks": ["aa"], "batch_size": 16}
    unbroken = evaluate(model, images, labels, **common)["aa"]
    path = tmp_path / "aa.json"

    def stop() -> bool:
        return path.exists() and len(json.loads(path.read_text())["progress"]["after"]) == 2

    with pytest.raises(StoppedError):
        evaluate(model, images, labels, state_dir=tmp_path, stop=stop, **common)
    progress = json.loads(path.read_text())["progress"]
    assert list(progress["after"]) == ["apgd-ce", "apgd-t"]
    model.calls = 0
    continued = evaluate(model, images, labels, state_dir=tmp_path, **common)["aa"]
    assert without_time({"aa": continued}) == without_time({"aa": unbroken})
    assert continued.seconds > progress["seconds"]
    with pytest.raises(InputError, match=r"batch_size \(16 there, 4 here\)"):
        evaluate(model, images, labels, state_dir=tmp_path, **dict(common, batch_size=4))


def test_limit_of_autoattack_takes_the_first_images(linear, data, tmp_path, short_autoattack):
    model = linear()
    images, labels = data(model, 16, wrong=2)
    common: dict[str, Any] = COMMON | {"attacks": ["natural", "aa"]}
    results = evaluate(model, images, labels, aa_limit=6, state_dir=tmp_path, **common)
    assert results["natural"].count == 16 and results["aa"].count == 6
    assert results["aa"].correct == int(model.robust(images[:6], labels[:6], 0.04).sum())
    # The images beyond the limit are not part of it.
    fewer = evaluate(
        model, images[:6], labels[:6], state_dir=tmp_path, **dict(common, attacks=["aa"])
    )
    assert fewer["aa"] == results["aa"]
