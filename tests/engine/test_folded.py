from __future__ import annotations

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cure_fast.engine.folded import FoldedNetwork
from cure_fast.engine.trace import UnsupportedNetworkError
from cure_fast.evaluation.model_state import state_hashes
from cure_fast.models import MODELS, ImageClassifier, build_model

pytestmark = pytest.mark.usefixtures("one_thread")

ENTRIES = [(name, stem) for name, info in MODELS.items() for stem in info.stems]
NORMALIZE = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
ROUNDOFF = 2**-8  # of bfloat16
# Relative. About 100 layers of some 100 roundings each, of 1.1e-16 and 6e-8, if errors added up; in
# float32 they do not, and a ReLU that flips within rounding would show in the gradient far above.
BOUND = {torch.float64: 1e-12, torch.float32: 1e-4}


@torch.no_grad()
def move(model):
    """Give the model other weights and statistics, some scales zero or negative, in place."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.weight[::3].neg_()
                module.weight[1::4] = 0
                # Mostly above 0, so that some of a few channels get through a ReLU.
                module.bias.uniform_(-0.5, 1)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.mul_(torch.empty_like(module.weight).uniform_(0.5, 1.5))
            if module.bias is not None:
                module.bias.uniform_()
    return model


def moved(name="resnet-small", dtype=torch.float32, *, width=None, normalize=NORMALIZE, **options):
    width = width or (1 if name.startswith("wrn") else 4)
    model = build_model(name, num_classes=7, width=width, normalize=normalize, **options)
    return move(model.to(dtype))


def images(dtype=torch.float32, size=8, count=2):
    return torch.rand(count, 3, size, size, dtype=dtype).to(memory_format=torch.channels_last)


def logits_and_gradient(network, x, cotangent):
    x = x.detach().clone().requires_grad_()
    logits = network(x)
    (gradient,) = torch.autograd.grad((logits * cotangent).sum(), x)
    return logits.detach(), gradient


def evaluated(model, x, cotangent):
    mode = model.training
    found = logits_and_gradient(model.eval(), x, cotangent)
    model.train(mode)
    return found


def difference(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_computes(network, model, dtype, bound, **options):
    x, cotangent = images(dtype, **options), torch.randn(2, 7, dtype=dtype)
    logits, gradient = logits_and_gradient(network, x, cotangent)
    expected = evaluated(model, x, cotangent)
    assert logits.dtype == gradient.dtype == dtype
    assert expected[0].norm() > 0.1 and expected[1].norm() > 1e-6  # not dead
    assert difference(logits, expected[0]) < bound
    assert difference(gradient, expected[1]) < bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "stem"), ENTRIES)
def test_logits_and_gradients_of_every_model(name, stem, dtype):
    model = moved(name, dtype, stem=stem)
    assert_computes(FoldedNetwork(model, dtype=None), model, dtype, BOUND[dtype], size=16)


def pairs(*names):
    return [(name, name.replace("conv", "bn")) for name in names]


RESNET_SMALL = [
    *pairs("conv1", "layer1.0.conv1", "layer1.0.conv2"),
    *pairs("layer2.0.conv1", "layer2.0.conv2"),
    ("layer2.0.shortcut.0", "layer2.0.shortcut.1"),
    *pairs("layer3.0.conv1", "layer3.0.conv2"),
    ("layer3.0.shortcut.0", "layer3.0.shortcut.1"),
]
STAGES = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
BLOCKS = [f"block{group}.layer.{block}" for group in (1, 2, 3) for block in (0, 1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "width", "folded", "unfolded"),
    [
        ("resnet-small", 4, RESNET_SMALL, []),
        (
            "preactresnet18",
            4,
            [(f"{block}.conv1", f"{block}.bn2") for block in STAGES],
            [*(f"{block}.bn1" for block in STAGES), "bn"],
        ),
        # With a convolution as shortcut, the first block reads the stem by its BatchNorm alone.
        (
            "wrn28-10",
            2,
            [("conv1", "block1.layer.0.bn1"), *((f"{b}.conv1", f"{b}.bn2") for b in BLOCKS)],
            [*(f"{block}.bn1" for block in BLOCKS[1:]), "bn1"],
        ),
        # At width 1 it has none: the stem goes into the sum too.
        (
            "wrn28-10",
            1,
            [(f"{block}.conv1", f"{block}.bn2") for block in BLOCKS],
            [*(f"{block}.bn1" for block in BLOCKS), "bn1"],
        ),
    ],
)
def test_which_batchnorms_fold(name, width, folded, unfolded):
    model = moved(name, torch.float64, width=width)
    network = FoldedNetwork(model, dtype=None)
    assert sorted(network.folded) == sorted(folded)
    assert list(network.unfolded) == unfolded
    assert_computes(network, model, torch.float64, 1e-12)


@pytest.mark.parametrize(
    ("name", "folded"), [("resnet18", 20), ("resnet34", 36), ("resnet50", 53), ("resnet101", 104)]
)
def test_every_batchnorm_of_a_resnet_folds(name, folded):
    network = FoldedNetwork(moved(name), dtype=None)
    assert (len(network.folded), len(network.unfolded)) == (folded, 0)


def places(network):
    return [t.data_ptr() for t in network.evaluation.state_dict().values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["resnet-small", "preactresnet18"])
def test_refresh_takes_over_weights_and_statistics_at_the_same_addresses(name, dtype):
    model = moved(name, dtype)
    network = FoldedNetwork(model, dtype=None, pad_channels=8)
    addresses = places(network)
    x, cotangent = images(dtype, size=16), torch.randn(2, 7, dtype=dtype)
    before = logits_and_gradient(network, x, cotangent)
    move(model)
    assert torch.equal(logits_and_gradient(network, x, cotangent)[0], before[0])
    network.refresh()
    assert_computes(network, model, dtype, BOUND[dtype], size=16)
    assert difference(network(x), before[0]) > 0.1
    assert places(network) == addresses


def test_refresh_refuses_tensors_that_were_replaced():
    model = moved()
    network = FoldedNetwork(model, dtype=None)
    model.conv1.weight = nn.Parameter(model.conv1.weight.detach().clone())
    with pytest.raises(RuntimeError, match="other tensors than when it was folded"):
        network.refresh()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_alone_and_takes_no_gradient(training):
    model = moved("preactresnet18").train(training)
    model.layer1[0].bn2.eval()
    modes = [module.training for module in model.modules()]
    hashes, state = state_hashes(model), torch.get_rng_state()
    network = FoldedNetwork(model, dtype=torch.bfloat16, pad_channels=4)
    assert torch.equal(torch.get_rng_state(), state)
    x = images(size=16).requires_grad_()
    network(x).sum().backward()
    network.refresh()
    assert [module.training for module in model.modules()] == modes
    assert state_hashes(model) == hashes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in network.evaluation.parameters())
    assert not network(x.detach()).requires_grad


@pytest.mark.parametrize("normalize", [NORMALIZE, None])
@pytest.mark.parametrize("name", ["resnet-small", "preactresnet18"])
def test_padding_changes_nothing(name, normalize):
    model = moved(name, torch.float64, normalize=normalize)
    x, cotangent = images(torch.float64, size=16), torch.randn(2, 7, dtype=torch.float64)
    plain = logits_and_gradient(FoldedNetwork(model, dtype=None), x, cotangent)
    for multiple, channels in ((1, 3), (3, 3), (4, 4), (8, 8)):
        network = FoldedNetwork(model, dtype=None, pad_channels=multiple)
        weight = next(m for m in network.evaluation.modules() if isinstance(m, nn.Conv2d)).weight
        assert weight.shape[1] == channels
        assert not weight[:, 3:].any()
        for found, expected in zip(logits_and_gradient(network, x, cotangent), plain, strict=True):
            assert difference(found, expected) < 1e-12


@pytest.mark.parametrize("name", ["resnet18", "preactresnet18", "wrn28-10"])
def test_bfloat16_stays_near_the_float32_fold(name):
    model = moved(name, width=4)
    x, cotangent = images(size=16), torch.randn(2, 7)
    expected = logits_and_gradient(FoldedNetwork(model, dtype=None), x, cotangent)
    network = FoldedNetwork(model, dtype=torch.bfloat16, pad_channels=8)
    found = logits_and_gradient(network, x, cotangent)
    assert found[0].dtype == found[1].dtype == torch.float32
    # 50 roundings (weights and features of 17 to 25 layers), if independent, make 7; twice that.
    assert difference(found[0], expected[0]) < 14 * ROUNDOFF
    assert difference(found[0], expected[0]) > ROUNDOFF / 16  # bfloat16 was used
    # A ReLU whose input rounds across zero turns its gradient on or off, so directions alone.
    assert F.cosine_similarity(found[1].flatten(), expected[1].flatten(), dim=0) > 0.9


def test_half_precisions_round_where_autocast_does():
    model = moved("preactresnet18").eval()
    network = FoldedNetwork(model, dtype=torch.bfloat16)
    rounded, seen = [], []
    for owner, dtypes in ((model, rounded), (network.evaluation, seen)):
        for module in owner.modules():
            if not list(module.children()) and module is not model.normalize:
                module.register_forward_hook(
                    lambda m, args, out, to=dtypes: to.append((out.shape, out.dtype))
                )
    model.compute_dtype = torch.bfloat16
    with torch.no_grad():
        x = images(size=16)
        assert model(x).dtype == network(x).dtype == torch.float32
    assert {dtype for _, dtype in rounded} == {torch.bfloat16}
    assert seen[0] == (x.shape, torch.float32)
    assert {dtype for _, dtype in seen[1:]} == {torch.bfloat16}
    assert len(seen) - 1 == len(rounded) - len(network.folded)


def test_weights_are_channels_last_in_the_working_dtype():
    model = moved("resnet50").to(memory_format=torch.contiguous_format)
    network = FoldedNetwork(model, dtype=torch.bfloat16, pad_channels=8)
    for name, parameter in network.evaluation.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last), name
    model.to(memory_format=torch.channels_last)
    other = FoldedNetwork(model, dtype=torch.bfloat16, pad_channels=8)
    for found, expected in zip(
        network.evaluation.parameters(), other.evaluation.parameters(), strict=True
    ):
        assert torch.equal(found, expected)
        assert found.any()


class Custom(ImageClassifier):
    def __init__(self, layers, forward):
        super().__init__(1)
        self.layers = nn.ModuleDict(layers)
        self.linear = nn.Linear(4, 7)
        self.compute = forward

    def logits(self, x):
        return self.linear(self.compute(self.layers, x).mean(dim=(2, 3)))


def conv(channels=3, **options):
    return nn.Conv2d(channels, 4, 3, padding=1, **options)


def norms(*eps):
    return [nn.BatchNorm2d(4, eps=value) for value in eps]


def one_convolution_before_two(layers, x):
    out = layers["conv"](x)
    return layers["bn"](out) + layers["other"](out)


def bare(layers, x):
    for layer in layers.values():
        x = layer(x)
    return x


CASES = {
    "biases": ({"conv": conv(), "bn": nn.BatchNorm2d(4, eps=1e-3)}, bare, 1),
    "plain BatchNorm folded": ({"conv": conv(), "bn": nn.BatchNorm2d(4, affine=False)}, bare, 1),
    "plain BatchNorm kept": (
        {"conv": conv(), "relu": nn.ReLU(), "bn": nn.BatchNorm2d(4, affine=False)},
        bare,
        0,
    ),
    "eps of several": (
        dict(zip("abcde", [conv(), *norms(0.5), conv(4, groups=2), *norms(2.0, 1.0)], strict=True)),
        bare,
        2,
    ),
    "two readers": (
        {"conv": conv(), "bn": nn.BatchNorm2d(4), "other": nn.BatchNorm2d(4)},
        one_convolution_before_two,
        0,
    ),
    "no BatchNorm": ({"conv": conv(), "relu": nn.ReLU()}, bare, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_other_networks(case, dtype):
    layers, forward, folded = CASES[case]
    model = Custom(copy.deepcopy(layers), forward)
    for layer in layers:
        if hasattr(model.layers[layer], "reset_parameters"):  # they were built before the seed
            model.layers[layer].reset_parameters()
    model = move(model.to(dtype))
    network = FoldedNetwork(model, dtype=None, pad_channels=8)
    assert len(network.folded) == folded
    assert_computes(network, model, dtype, BOUND[dtype])


def test_a_convolution_called_twice_folds_each_batchnorm_of_its_own():
    square = nn.Conv2d(3, 3, 3, padding=1)
    layers = {"conv": square, "bn": nn.BatchNorm2d(3), "other": nn.BatchNorm2d(3)}

    def forward(layers, x):
        x = F.relu(layers["bn"](layers["conv"](x)))
        return layers["other"](layers["conv"](x))

    model = Custom(layers, forward)
    model.linear = nn.Linear(3, 7)
    model = move(model.double())
    network = FoldedNetwork(model, dtype=None, pad_channels=4)
    assert network.folded == (("layers.conv", "layers.bn"), ("layers.conv", "layers.other"))
    assert_computes(network, model, torch.float64, 1e-12)


def test_what_cannot_be_folded_is_refused_by_name():
    def refusal(layers, *, pad_channels=1, **options):
        model = Custom(layers, bare)
        for name, value in options.items():
            setattr(model, name, value)
        with pytest.raises(UnsupportedNetworkError) as raised:
            FoldedNetwork(model, dtype=None, pad_channels=pad_channels)
        return str(raised.value)

    assert "GroupNorm" in refusal({"conv": conv(), "norm": nn.GroupNorm(2, 4)})
    stateless = nn.BatchNorm2d(4, track_running_stats=False)
    assert "layers.bn has no running statistics" in refusal({"conv": conv(), "bn": stateless})
    assert "no running statistics" in refusal({"conv": conv(), "relu": nn.ReLU(), "bn": stateless})
    assert "torch.float64 on cpu" in refusal({"conv": conv().double()})
    assert "torch.bfloat16" in refusal(
        {"conv": conv().bfloat16()}, linear=nn.Linear(4, 7).bfloat16()
    )
    assert "normalisation by ReLU" in refusal({"conv": conv()}, normalize=nn.ReLU())
    padded = {"bn": nn.BatchNorm2d(3), "conv": conv()}
    assert "they go into layers.bn" in refusal(padded, pad_channels=8)


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="pad_channels: expected at least 1, got 0"):
        FoldedNetwork(moved(), dtype=None, pad_channels=0)
    with pytest.raises(ValueError, match=r"dtype: .* torch\.bfloat16 or .* got torch\.float64"):
        FoldedNetwork(moved(), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"got torch\.bfloat16"):
        FoldedNetwork(moved(dtype=torch.float64), dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_compiled_evaluation_computes_the_same_and_follows_refresh(dtype):
    model = moved("resnet-small", width=2)
    plain = FoldedNetwork(model, dtype=dtype, pad_channels=4)
    compiled = FoldedNetwork(model, dtype=dtype, pad_channels=4, compiled=True)
    x, cotangent = images(), torch.randn(2, 7)
    # Compiled, features stay float32 between operations that are fused.
    bound = 1e-5 if dtype is None else 14 * ROUNDOFF
    for _ in range(2):
        expected = logits_and_gradient(plain, x, cotangent)
        found = logits_and_gradient(compiled, x, cotangent)
        assert found[0].dtype == torch.float32
        assert difference(found[0], expected[0]) < bound
        if dtype is None:
            assert difference(found[1], expected[1]) < bound
        move(model)
        plain.refresh()
        compiled.refresh()
