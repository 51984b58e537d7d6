from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cure_fast.classifier import block_first_convs
from cure_fast.errors import InputError
from cure_fast.models import MODELS, build_model

pytestmark = pytest.mark.usefixtures("one_thread")

# Counts published for ten classes: state-dict keys, parameters.
PUBLISHED = {
    "resnet18": (122, 11_173_962),
    "resnet34": (218, 21_282_122),
    "resnet50": (320, 23_520_842),
    "resnet101": (626, 42_512_970),
    "preactresnet18": (107, 11_172_170),
    "wrn34-10": (191, 46_160_474),
    "wrn32-10": (191, 46_160_474),
    "wrn28-10": (155, 36_479_194),
    # Those of ImageNet, less what stem and classifier have less.
    "densenet121": (727, 7_978_856 - 990 * 1025 - (49 - 9) * 3 * 64),
    "mobilenetv2": (314, 3_504_872 - 990 * 1281),
    "vit-base": (152, 86_567_656 - 990 * 769 - (256 - 16) * 3 * 768 - (196 - 64) * 768),
    "deit-small": (152, 22_050_664 - 990 * 385 - (256 - 16) * 3 * 384 - (196 - 64) * 384),
    "convit-base": (180, 86_540_040 - 990 * 769 - (256 - 16) * 3 * 768 - (196 - 64) * 768),
}
# Widths that keep the tests small.
HEADS = {"vit-base": 12, "deit-small": 6, "convit-base": 16}
NARROW = {name: 1 if name.startswith("wrn") else HEADS.get(name, 4) for name in MODELS}
# One per class of network and block; the others differ in depth alone.
KINDS = ("resnet18", "resnet50", "preactresnet18", "wrn28-10", "resnet-small")
OTHER_KINDS = ("densenet121", "mobilenetv2", "vit-tiny", "convit-base")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def described(name, **options):
    """Return the model without memory behind its weights."""
    with torch.device("meta"):
        return build_model(name, num_classes=10, **options)


def narrow(name, *, num_classes=10, **options):
    return build_model(name, num_classes=num_classes, width=NARROW[name], **options)


def with_statistics(model):
    """Return the model with BatchNorm values that a swapped or missing one would show."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, model.get_buffer(f"{name}.running_var")):
                tensor.uniform_(0.5, 2)
            for tensor in (module.bias.data, model.get_buffer(f"{name}.running_mean")):
                tensor.normal_()
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name):
    model = described(name)
    keys, parameters = PUBLISHED[name]
    assert len(model.state_dict()) == keys
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "tensors", "weights"), [("resnet18", 8, 4_718_592), ("wrn34-10", 15, 21_680_640)]
)
def test_first_convolutions_of_blocks_are_what_the_public_code_masks(name, tensors, weights):
    model = described(name)
    parameters = dict(model.named_parameters())
    names = block_first_convs(model)
    assert len(names) == tensors
    assert sum(parameters[n].numel() for n in names) == weights
    stem = {f"{n}.weight" for n in model.stem_names}
    assert not stem & set(names)


def test_key_names_are_the_fields():
    basic = list(described("resnet18").state_dict())
    assert basic[:2] == ["conv1.weight", "bn1.weight"]
    assert {"layer2.0.shortcut.0.weight", "layer2.0.shortcut.1.running_var"} <= set(basic)
    assert basic[-2:] == ["linear.weight", "linear.bias"]
    pre_activated = list(described("preactresnet18").state_dict())
    assert {"bn.running_mean", "layer4.0.shortcut.0.weight"} <= set(pre_activated)
    wide = list(described("wrn34-10").state_dict())
    assert {"block1.layer.0.bn1.weight", "block3.layer.4.conv2.weight"} <= set(wide)
    shortcuts = [f"block{number}.layer.0.convShortcut.weight" for number in (1, 2, 3)]
    assert [name for name in wide if "hortcut" in name] == shortcuts
    assert wide[-3:] == ["bn1.num_batches_tracked", "fc.weight", "fc.bias"]


@pytest.mark.parametrize("name", MODELS)
def test_stem_and_classifier_names_are_modules_at_both_ends(name):
    model = described(name)
    parameters = [parameter for parameter, _ in model.named_parameters()]
    stem = [p for p in parameters if p.rpartition(".")[0] in model.stem_names]
    tokens = [p for p in parameters if p in ("net.cls_token", "net.pos_embed")]
    assert tokens + stem == parameters[: len(tokens + stem)]
    assert stem[0] == f"{model.stem_names[0]}.weight"
    assert model.get_parameter(stem[0]).shape[1] == 3
    classifier = model.get_submodule(model.classifier_name)
    assert isinstance(classifier, torch.nn.Linear)
    assert parameters[-1] == f"{model.classifier_name}.bias"


def test_wrn32_is_wrn34():
    shapes = [
        {key: value.shape for key, value in described(name).state_dict().items()}
        for name in ("wrn32-10", "wrn34-10", "wrn28-10")
    ]
    assert shapes[0] == shapes[1] != shapes[2]


def test_small_resnet_has_seven_convolutions_and_two_shortcuts():
    model = build_model("resnet-small", num_classes=10)
    convolutions = {n: p for n, p in model.named_parameters() if p.ndim == 4}
    widths = [p.shape[0] for n, p in convolutions.items() if "shortcut" not in n]
    assert widths == [16, 16, 16, 32, 32, 64, 64]
    assert [n for n in convolutions if "shortcut" in n] == [
        "layer2.0.shortcut.0.weight",
        "layer3.0.shortcut.0.weight",
    ]


@pytest.mark.parametrize("name", MODELS)
def test_logits_for_each_image_size(name):
    for size in (8, 16, 32):
        model = narrow(name, num_classes=7, image_size=size).eval()
        with torch.no_grad():
            logits = model(torch.rand(2, 3, size, size))
        assert logits.shape == (2, 7)
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()


@settings(max_examples=15, deadline=None)
@given(
    width=st.integers(1, 6),
    num_classes=st.integers(2, 12),
    height=st.integers(1, 40),
    ratio=st.sampled_from((1, 2)),
    count=st.integers(1, 3),
)
def test_small_resnet_takes_any_width_classes_and_size(width, num_classes, height, ratio, count):
    model = build_model("resnet-small", num_classes=num_classes, width=width).eval()
    with torch.no_grad():
        logits = model(torch.rand(count, 3, height, ratio * height))
    assert logits.shape == (count, num_classes)
    assert model.get_parameter("linear.weight").shape == (num_classes, 4 * width)


@pytest.mark.parametrize("name", [n for n, info in MODELS.items() if "imagenet" in info.stems])
def test_imagenet_stem_shrinks_the_image_four_times(name):
    sizes = []
    for stem, kernel in (("cifar", 3), ("imagenet", 7)):
        model = narrow(name, stem=stem).eval()
        model.get_submodule("layer1").register_forward_pre_hook(
            lambda _module, inputs: sizes.append(tuple(inputs[0].shape[2:]))
        )
        with torch.no_grad():
            assert model(torch.rand(1, 3, 32, 32)).shape == (1, 10)
        stem_weights = model.get_parameter("conv1.weight")
        assert stem_weights.shape == (NARROW[name], 3, kernel, kernel)
    assert sizes == [(32, 32), (8, 8)]


@pytest.mark.parametrize("name", KINDS)
def test_weights_and_features_are_channels_last(name):
    model = narrow(name, normalize=(MEAN, STD))
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            assert tensor.is_contiguous(memory_format=torch.channels_last)
    layouts = []
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(
                lambda _module, _inputs, out: layouts.append(
                    out.is_contiguous(memory_format=torch.channels_last)
                )
            )
    images = torch.rand(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        model(images)
    assert layouts and all(layouts)


@pytest.mark.parametrize("name", [*KINDS, *OTHER_KINDS])
def test_logits_of_an_image_do_not_depend_on_its_batch(name):
    model = with_statistics(narrow(name, image_size=16)).double().eval()
    images = torch.rand(5, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [*KINDS, *OTHER_KINDS])
def test_copy_after_a_forward_is_equal_and_its_own(name):
    model = narrow(name, image_size=16)
    images = torch.rand(4, 3, 16, 16)
    model(images).sum().backward()
    twin = copy.deepcopy(model)
    model.eval()
    twin.eval()
    with torch.no_grad():
        before = twin(images)
        assert torch.equal(model(images), before)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(images), before)
        assert not torch.equal(model(images), before)


@pytest.mark.parametrize("name", [*KINDS, *OTHER_KINDS])
def test_two_forwards_then_one_backward(name):
    model = narrow(name, image_size=16).double()
    first, second = torch.rand(2, 3, 3, 16, 16, dtype=torch.float64)
    kept = first.clone()
    both = torch.autograd.grad(
        model(first).square().sum() + model(second).square().sum(), list(model.parameters())
    )
    assert torch.equal(first, kept)
    apart = [
        torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
        for images in (first, second)
    ]
    for grad, one, other in zip(both, *apart, strict=True):
        torch.testing.assert_close(grad, one + other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_computes_in_half_and_answers_in_float32(name):
    model = narrow(name).eval()
    images = torch.rand(2, 3, 16, 16)
    seen = set()
    model.get_submodule("conv1").register_forward_hook(
        lambda _module, _inputs, out: seen.add(out.dtype)
    )
    with torch.no_grad():
        exact = model(images)
        model.compute_dtype = torch.bfloat16
        logits = model(images)
        model.compute_dtype = None
        with torch.autocast("cpu", torch.bfloat16):
            outer = model(images)
    assert seen == {torch.float32, torch.bfloat16}
    assert logits.dtype == outer.dtype == torch.float32
    torch.testing.assert_close(logits, exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


def convolved(weights, name, x, stride=1):
    weight = weights[f"{name}.weight"]
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def activated(weights, name, x):
    mean, variance, scale, shift = (
        weights[f"{name}.{part}"][:, None, None]
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / (variance + 1e-5).sqrt() * scale + shift).clamp(min=0)


def pre_activated_network(weights, stages, depths, *, shortcut, last, classifier, x):
    """Return the logits of a pre-activation network straight from its weights."""
    x = convolved(weights, "conv1", x)
    for index, (stage, depth) in enumerate(zip(stages, depths, strict=True)):
        for number in range(depth):
            block = f"{stage}.{number}"
            stride = 2 if index and not number else 1
            inner = activated(weights, f"{block}.bn1", x)
            skipped = x
            if f"{block}.{shortcut}.weight" in weights:
                skipped = convolved(weights, f"{block}.{shortcut}", inner, stride)
            inner = convolved(weights, f"{block}.conv1", inner, stride)
            inner = convolved(weights, f"{block}.conv2", activated(weights, f"{block}.bn2", inner))
            x = inner + skipped
    features = activated(weights, last, x).flatten(2).mean(2)
    return features @ weights[f"{classifier}.weight"].T + weights[f"{classifier}.bias"]


@pytest.mark.parametrize("name", ["preactresnet18", "wrn34-10", "wrn28-10"])
def test_pre_activation_networks_against_a_transcription(name):
    width = {"preactresnet18": 3}.get(name, 2)
    model = with_statistics(build_model(name, num_classes=5, width=width)).double().eval()
    images = torch.rand(3, 3, 12, 12, dtype=torch.float64)
    if name == "preactresnet18":
        layout = {"shortcut": "shortcut.0", "last": "bn", "classifier": "linear"}
        stages, depths = [f"layer{number}" for number in (1, 2, 3, 4)], (2, 2, 2, 2)
    else:
        layout = {"shortcut": "convShortcut", "last": "bn1", "classifier": "fc"}
        stages = [f"block{number}.layer" for number in (1, 2, 3)]
        depths = (5, 5, 5) if name == "wrn34-10" else (4, 4, 4)
    with torch.no_grad():
        expected = pre_activated_network(model.state_dict(), stages, depths, **layout, x=images)
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def test_wide_resnet_starts_from_a_normal_by_fan_out():
    model = build_model("wrn28-10", num_classes=10, width=4)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4 and parameter.numel() > 10_000:
            fan_out = parameter.shape[0] * parameter.shape[2] * parameter.shape[3]
            assert parameter.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03), name
    assert not model.get_parameter("fc.bias").any()


def test_same_seed_same_weights():
    stems = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        stems.append(build_model("resnet-small", num_classes=4).get_parameter("conv1.weight"))
    assert torch.equal(stems[0], stems[1])
    assert not torch.equal(stems[0], stems[2])


def test_normalisation_is_the_first_layer_and_not_in_the_state_dict():
    plain = build_model("resnet-small", num_classes=4).eval()
    # NumPy's float64 must not widen the images.
    mean, std = (list(np.array(values)) for values in (MEAN, STD))
    layer = build_model("resnet-small", num_classes=4, normalize=(mean, std))
    layer.load_state_dict(plain.state_dict(), strict=True)
    layer.eval()
    images = torch.rand(3, 3, 8, 8)
    expected = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        logits = layer(images)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, plain(expected))


@pytest.mark.parametrize("name", ["resnet-small", "preactresnet18"])
def test_traced_whole_for_compilation(name):
    model = narrow(name).eval()
    images = torch.rand(2, 3, 8, 8)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(whole(images), model(images))


def test_unknown_name_lists_the_names_and_the_closest():
    with pytest.raises(InputError, match=r"resnet18.*wrn34-10.*Did you mean resnet18\?"):
        build_model("ResNet-18", num_classes=10)
    with pytest.raises(InputError, match=r"got 'zebra'\.$"):
        build_model("zebra", num_classes=10)


@pytest.mark.parametrize("name", ["preactresnet18", "wrn34-10"])
def test_imagenet_stem_on_a_model_without_one(name):
    with pytest.raises(InputError, match=r"--stem: expected cifar .*imagenet is for resnet18"):
        described(name, stem="imagenet")


@pytest.mark.parametrize("width", [0, -1])
def test_width_below_one(width):
    with pytest.raises(InputError, match=r"--width: expected .* at least 1"):
        build_model("resnet-small", num_classes=10, width=width)


def test_one_class():
    with pytest.raises(InputError, match="at least 2, got 1"):
        build_model("resnet-small", num_classes=1)


@pytest.mark.parametrize(
    "normalize",
    [((0.5,), (0.5,)), (MEAN, (0.5, 0.5, 0.0)), (MEAN, (0.5, 0.5)), ((0, 0, math.nan), STD)],
)
def test_unusable_normalisation(normalize):
    with pytest.raises(InputError, match="three positive deviations"):
        build_model("resnet-small", num_classes=10, normalize=normalize)
