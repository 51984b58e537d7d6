"""Restarts, targets and saved images of the attacks with steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cure_fast.config.attack_names import parse_attack
from cure_fast.errors import InputError, StoppedError
from cure_fast.evaluation.evaluate import evaluate
from cure_fast.evaluation.measurement import Measurement, Round
from cure_fast.evaluation.trust import Guard

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON: dict[str, Any] = {
    "eps": 0.06,
    "step_size": None,
    "batch_size": 7,
    "device": "cpu",
    "seed": 0,
}


def started_at(model, images, labels, now, family="pgd"):
    """Return where a round starts, [N, C, H, W]: an attack whose steps have no length."""
    task = Measurement(
        guard=Guard(model, num_classes=10),
        images=images,
        labels=labels,
        device=torch.device("cpu"),
        **{k: v for k, v in COMMON.items() if k in ("eps", "batch_size", "seed")},
        step_size=0.0,
    )
    indices = torch.arange(len(images))
    x, y = task.load(indices)
    return task.perturb(parse_attack(f"{family}1"), x, y, indices, now)


def test_each_restart_and_target_has_a_start_of_its_own_and_the_first_is_the_plain_one(
    conv_net, data
):
    model = conv_net().eval()
    images, labels = data(model, 6)
    rounds = [Round(), Round(0, 0), Round(1), Round(2), Round(0, 1), Round(1, 1)]
    starts = [started_at(model, images, labels, now) for now in rounds]
    assert torch.equal(starts[0], starts[1])
    for k, one in enumerate(starts[1:]):
        assert all(not torch.equal(one, other) for other in starts[k + 2 :])


def test_restarts_are_the_worst_case_over_their_starts(conv_net, data):
    model = conv_net()
    images, labels = data(model, 40, wrong=4)
    # Steps so short that much depends on the start.
    common = COMMON | {"num_classes": 10, "attacks": ["pgd2", "cw2"], "step_size": 0.005}
    few, more = (evaluate(model, images, labels, **common, restarts=n) for n in (1, 6))
    for name in ("pgd2", "cw2"):
        assert few[name].settings | {"restarts": 6} == more[name].settings
        assert more[name].correct < few[name].correct
    with pytest.raises(InputError, match="restarts: expected at least 1, got 0"):
        evaluate(model, images, labels, **common, restarts=0)


def test_a_targeted_attack_finds_the_optimum_over_all_classes(linear, data):
    """Of a linear model: the logit of one class less another's has the same slope everywhere."""
    model = linear(4, 1)
    images, labels = data(model, 24, wrong=3)
    expected = int(model.robust(images, labels, 0.03).sum())
    common = COMMON | {"eps": 0.03, "num_classes": 4, "attacks": ["pgd25-t"]}
    result = evaluate(model, images, labels, **common)["pgd25-t"]
    assert result.correct == expected and 3 < expected < 18
    assert result.settings["target_classes"] == 3 and result.reliable


def test_an_interrupted_round_goes_on_where_it_was(conv_net, data, tmp_path):
    images, labels = data(conv_net(), 21, wrong=2)
    common = COMMON | {"num_classes": 10, "attacks": ["pgd3", "pgd3-t"], "restarts": 2}
    whole = evaluate(conv_net(), images, labels, **common)
    calls, limit = 0, 60

    def stop():
        nonlocal calls
        calls += 1
        return calls > limit

    passes = 0
    for _ in range(20):
        try:
            found = evaluate(conv_net(), images, labels, **common, state_dir=tmp_path, stop=stop)
            break
        except StoppedError:
            passes, calls = passes + 1, 0
    assert passes >= 2
    assert {n: r.correct for n, r in found.items()} == {n: r.correct for n, r in whole.items()}


@pytest.mark.parametrize("attack", ["fgsm", "pgd3", "pgd3-t", "aa"])
def test_saved_images_are_what_was_measured(linear, data, tmp_path, short_square, attack):
    model = linear(4, 2)
    images, labels = data(model, 20, wrong=3)
    natural = images.numpy().astype(np.float32) / 255
    common = COMMON | {"eps": 0.04, "num_classes": 4, "attacks": ["natural", attack]}
    common |= {"batch_size": 20, "state_dir": tmp_path}
    saved: dict[str, np.ndarray] = {}
    results = evaluate(model, images, labels, **common, on_images=saved.__setitem__)
    assert list(saved) == [attack] and saved[attack].dtype == np.float32
    kept = np.array(saved[attack])
    assert np.abs(kept - natural).max() <= 0.04 + 1e-6 and 0 <= kept.min() <= kept.max() <= 1
    assert (kept[:3] == natural[:3]).all()
    again = torch.from_numpy(kept).permute(0, 3, 1, 2)
    right = int((model(again).argmax(dim=1) == labels).sum())
    assert right == results[attack].correct < results["natural"].correct
    # They are kept with the result, and made again where they are damaged or were not asked for.
    for damage in (None, lambda file: file.write_bytes(b"no array"), lambda file: file.unlink()):
        if damage is not None:
            damage(tmp_path / f"{attack}.images.npy")
        before = model.calls
        found = evaluate(model, images, labels, **common, on_images=saved.__setitem__)
        assert found[attack].correct == results[attack].correct
        assert (saved[attack] == kept).all()
        assert (model.calls == before) == (damage is None)
