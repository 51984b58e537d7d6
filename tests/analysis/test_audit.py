"""The audit passes an honest network, and catches each of the known ways to fool oneself."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import cure_fast
from cure_fast.analysis.audit.case import CHECKS, overall
from cure_fast.analysis.audit.network import difference
from cure_fast.analysis.audit.published import HIGHEST, highest_for
from cure_fast.cli.main import main
from cure_fast.errors import InputError
from cure_fast.loaders import read_dataset
from small import Convolutional, Linear
from tiny_command import tiny_words

CLASSES, COUNT, EPS = 3, 72, 24 / 255
QUICK = {"steps": 8, "queries": 30, "planted": 6, "eps": EPS}


def coloured(count, seed):
    """Images whose class is their strongest colour, some by little, in noise; and their labels."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    strength = 0.04 + 0.3 * torch.rand(count, 1, 1, generator=draw)
    images = 0.5 + 0.06 * torch.randn(count, 3, 6, 6, generator=draw)
    images[torch.arange(count), labels] += strength
    return (255 * images.clamp(0, 1)).round() / 255, labels


@pytest.fixture(scope="module")
def data():
    return coloured(COUNT, 1)


@pytest.fixture(scope="module")
def honest():
    """A small convolutional network that was trained on such images."""
    model, (images, labels) = Convolutional(CLASSES).double(), coloured(300, 2)
    for step in range(50):
        loss = nn.functional.cross_entropy(model(images.double()), labels)
        found = torch.autograd.grad(loss, [*model.parameters()])
        with torch.no_grad():
            for parameter, slope in zip(model.parameters(), found, strict=True):
                # Not by the sign of what is rounding, as of a bias that BatchNorm takes out again:
                # it is another one on each processor, and so is the network.
                parameter -= 0.03 * (1 - step / 50) * slope.sign() * (slope.abs() > 1e-9)
    return model.float().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished tiny run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = tiny_words("--cache", str(folder.parent / "cache"), out=str(folder))
    words[words.index("--limit") + 1] = "360"
    assert main(words) == 0
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    test = read_dataset("digits", tmp_path_factory.mktemp("data"), "test")
    return test.images[:60], test.labels[:60]


class Fake(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = copy.deepcopy(base)


class QuantisedInput(Fake):
    def forward(self, x):
        return self.base((x * 16).round() / 16)


class RoundedLogits(Fake):
    def forward(self, x):
        return (self.base(x) * 50).round() / 50


class SignOfInput(Fake):
    def forward(self, x):
        return self.base(0.5 + 0.2 * torch.sign(x - 0.55))


class RandomLayer(Fake):
    def forward(self, x):
        return self.base(x + 0.02 * torch.randn_like(x))


class Softmax(Fake):
    def forward(self, x):
        return self.base(x).softmax(1)


class NanLogits(Fake):
    def forward(self, x):
        bright = x.mean((1, 2, 3)) > 0.58
        return self.base(x).masked_fill(bright[:, None], torch.nan)


class AlwaysTraining(Fake):
    def train(self, mode=True):
        return super().train(True)

    def forward(self, x):
        return self.base(x)


class BatchStatistics(Fake):
    def forward(self, x):
        norm = self.base.bn1
        shown = self.base.conv1(x)
        shown = nn.functional.batch_norm(shown, None, None, norm.weight, norm.bias, training=True)
        return self.base.linear(torch.relu(self.base.conv2(torch.relu(shown))).mean((2, 3)))


class HalfSaturated(Fake):
    def forward(self, x):
        return (self.base(x) * 1000).half().float()


class Constant(Fake):
    def forward(self, x):
        return 0 * self.base(x) + torch.tensor([1.0, 0.0, 0.0])


class Abstaining(Fake):
    def forward(self, x):
        smooth = nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        rough = (x - smooth).abs().mean((1, 2, 3), keepdim=True).flatten(1)
        return torch.cat([self.base(x), 1000 * (rough - 0.065)], 1)


class OthersGradient(Fake):
    def forward(self, x):
        other = x.flatten(1) @ torch.linspace(-1, 1, 108 * CLASSES).sin().view(108, CLASSES)
        return self.base(x).detach() + other - other.detach()


@pytest.mark.parametrize(
    ("fake", "check", "told"),
    [
        (QuantisedInput, "gradients", "gradient of the margin is exactly zero"),
        (RoundedLogits, "gradients", "gradient of the margin is exactly zero"),
        (SignOfInput, "gradients", "gradient of the margin is exactly zero"),
        (RandomLayer, "answers", "two passes over the same images differ"),
        (Softmax, "gradients", "look like probabilities"),
        (NanLogits, "answers", "logits are not finite"),
        (AlwaysTraining, "answers", "running_mean"),
        (BatchStatistics, "answers", "with the other images of the batch"),
        (HalfSaturated, "gradients", "softmax is saturated"),
        (Constant, "classes", "class 0 is answered for each of 72 images"),
        (Abstaining, "classes", "class 3, which no label has, is answered for"),
        (OthersGradient, "gradients", "away from differences of the margin"),
    ],
)
def test_a_fake_network_is_caught(honest, data, fake, check, told):
    result = cure_fast.audit(fake(honest), *data, checks=["answers", check], **QUICK)
    assert not result.holds_up and told in result.failed[check].lower()
    assert result.verdict.startswith("does not hold up")


def test_an_honest_network_holds_up(honest, data):
    state = {name: tensor.clone() for name, tensor in honest.state_dict().items()}
    train, _ = coloured(300, 2)
    result = cure_fast.audit(honest, *data, train_images=train, **QUICK)
    assert result.failed == {} and result.holds_up
    verdicts = {row["check"]: row["verdict"] for row in result.rows}
    assert [*verdicts] == [*CHECKS]
    absent = {name for name, verdict in verdicts.items() if verdict == "not applicable"}
    assert absent == {"counts", "selection", "published"}
    assert "doubtful" not in verdicts.values(), result.rows
    assert all(torch.equal(state[name], tensor) for name, tensor in honest.state_dict().items())
    # The radius is one at which some are broken and some are not.
    left = {told["attack"]: told["accuracy"] for told in result.numbers["attacks"]}
    assert 10 < left["cw8"] < left["natural"] - 10
    assert result.figure().get_size_inches()[0] == pytest.approx(7)


def test_a_linear_network_of_doubles_holds_up_in_l2(images):
    # Of two classes, whose margin is linear too.
    model = Linear(classes=2).double().eval()
    labels = model(torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255).argmax(1)
    result = cure_fast.audit(model, images, labels, **{**QUICK, "eps": 0.5, "norm": "l2"})
    assert result.failed == {}
    (told,) = (row["evidence"] for row in result.rows if row["check"] == "gradients")
    # Its gradient is the same everywhere.
    assert "cosine of 1.00" in told and "ball's edge by 0%" in told


def test_attacks_that_stand_still_miss_what_is_planted(images, labels):
    weak = {**QUICK, "step_size": 1e-5, "checks": ["planted", "curve"]}
    result = cure_fast.audit(Linear().eval(), images, labels, **weak)
    assert "0 of 6 planted images are found" in result.failed["planted"]
    # And nothing falls where everything has to.
    assert "the whole range" in result.failed["curve"]


def test_test_images_in_training_are_caught(honest, data):
    images, labels = data
    train = torch.cat([coloured(200, 3)[0], images[[4]]])
    checks = ["overlap"]
    leaked = cure_fast.audit(honest, images, labels, train_images=train, checks=checks, **QUICK)
    assert leaked.failed == {"overlap": "1 of 72 test images are among 201 training images."}
    clean = cure_fast.audit(honest, images, labels, train_images=train[:-1], checks=checks, **QUICK)
    assert clean.holds_up


def test_an_implausible_accuracy_is_caught(honest, data):
    """Colours resist an eps of 8/255; of CIFAR-10 no network has nearly so much right."""
    told = {"data": "cifar10", "checks": ["published"], **QUICK, "eps": 8 / 255}
    easy = coloured(200, 5)
    right = honest(easy[0]).argmax(1) == easy[1]
    strong = right & (honest(easy[0]).topk(2, 1).values @ torch.tensor([1.0, -1.0]) > 2)
    result = cure_fast.audit(honest, easy[0][strong], easy[1][strong], **told)
    assert "implausible" in result.failed["published"]
    assert "73.71 % (Bartoldson" in result.failed["published"]


def test_published_figures_are_of_the_ball_or_a_smaller_one():
    assert highest_for("cifar10", "linf", 0.031) is HIGHEST[0]
    assert highest_for("cifar10", "linf", 4 / 255) is None
    assert highest_for("cifar10", "l2", 0.5) is HIGHEST[1]
    assert highest_for("digits", "linf", 0.1) is None
    assert all(row.alone < row.any < 100 for row in HIGHEST)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"test_images": 60}, "says that there are 60 test images; the set has 360"),
        ({"correct": 350}, "shares of the classes do not add up"),
        ({"correct": 400}, "400 of 360 images"),
        ({"correct": 198, "by_class": []}, "natural accuracy is 55.0 % in results.json"),
    ],
)
def test_counts_of_a_run_are_held_against_its_images(run, digits, tmp_path, change, told):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    path = copied / "results.json"
    record = json.loads(path.read_text())
    record["test_images"] = change.pop("test_images", record["test_images"])
    for result in record["models"]["trained"]["attacks"].values():
        result.update(change)
    path.write_text(json.dumps(record))
    result = cure_fast.audit(copied, *digits, checks=["counts"], steps=4)
    if told is None:
        assert result.failed == {}
    else:
        assert told in result.failed["counts"].lower()


def test_counts_of_a_part_of_the_images_are_doubtful_and_no_failure(run, digits, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    record = json.loads((copied / "results.json").read_text())
    for result in record["models"]["trained"]["attacks"].values():
        share = result["correct"] / result["count"]
        result.update(count=60, correct=round(60 * share), by_class=[])
    (copied / "results.json").write_text(json.dumps(record))
    (row,) = cure_fast.audit(copied, *digits, checks=["counts"], steps=4).rows
    assert row["verdict"] == "doubtful" and "No result is of all 360 test images" in row["evidence"]


def test_a_record_under_attack_is_held_against_the_same_attack(run, digits, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    path = copied / "results.json"
    record = json.loads(path.read_text())
    attacks = record["models"]["trained"]["attacks"]
    assert attacks["pgd2"]["correct"] < 30
    attacks["pgd2"].update(correct=90, by_class=[])
    path.write_text(json.dumps(record))
    result = cure_fast.audit(copied, *digits, checks=["counts"], steps=4)
    assert "Accuracy under PGD-2 is 25.0 %" in result.failed["counts"]


def test_a_run_is_audited_from_the_command_line(run, capsys):
    words = ["audit", str(run), "--limit", "24", "--steps", "4", "--queries", "5", "--planted", "2"]
    assert main(words) == 0
    out = capsys.readouterr().out
    place = run / "analysis"
    for ending in ("svg", "png", "pdf", "json", "csv"):
        assert (place / f"audit.{ending}").stat().st_size > 60
    numbers = json.loads((place / "audit.json").read_text())
    assert f"audit: {numbers['verdict']}" in out
    evidence = {row["check"]: row["evidence"] for row in numbers["rows"]}
    assert [*evidence] == [*CHECKS] and "in a new process" in evidence["rescoring"]
    assert "0 are test images" in evidence["selection"]
    assert "0 of 360 test images are among 96 training images" in evidence["overlap"]
    assert 'id="analysis-audit"' in (run / "report.html").read_text()
    # What takes long is kept, so that the same command goes on from there.
    (path,) = (place / "parts").glob("audit-*.json")
    kept = {"check answers", "check planted", "check rescoring", "natural at 0.15", "cw4 at 0.15"}
    assert kept <= json.loads(path.read_text())["parts"].keys()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "expected"),
        ("nowhere", "nowhere: expected a run folder or a file of weights"),
        ("RUN --checks order,ordr", "--checks: expected one of answers"),
        ("RUN --steps 3", "--steps: expected a number at least 4"),
        ("RUN --width 3", "--width: only for a file of weights"),
    ],
)
def test_wrong_words_are_a_line_and_write_nothing(words, told, run, capsys):
    before = sorted(run.rglob("*"))
    assert main(["audit", *words.replace("RUN", str(run)).split()]) == 2
    _, err = capsys.readouterr()
    assert told in err and err.count("\n") == 1
    assert sorted(run.rglob("*")) == before


def test_what_python_hands_over_is_checked(honest, data):
    with pytest.raises(InputError, match="expected one of answers"):
        cure_fast.audit(honest, *data, checks=["nothing"])
    with pytest.raises(InputError, match=r"expected values in \[0, 1\]"):
        cure_fast.audit(honest, 2 * data[0], data[1])


def test_the_verdict_is_of_the_checks_that_could_be_made():
    passed, failed, doubt, absent = "passed", "failed", "doubtful", "not applicable"
    assert overall({"a": passed, "b": absent}) == "holds up: 1 of 1 checks passed"
    assert overall({"a": passed, "b": doubt}) == "holds up: 1 of 2 checks passed, 1 in doubt (b)"
    assert overall({"a": passed, "b": failed}) == "does not hold up: 1 of 2 checks failed (b)"
    assert overall({"a": absent}) == "nothing is known: no check passed"


def test_differences_of_a_line_are_its_slope(images):
    """For a linear margin they agree, and double the slope is as far away as half of it is long."""
    model = Linear(classes=2).double()
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    y = torch.zeros(len(x), dtype=torch.int64)
    weight = (model.layer.weight[1] - model.layer.weight[0]).detach()
    slope = weight.expand(len(x), -1).reshape(x.shape)
    assert difference(model, x, y, slope, 0) < 1e-9
    assert difference(model, x, y, 2 * slope, 0) == pytest.approx(0.5)
    assert np.isclose(difference(model, x, y, -slope, 0), 2)
