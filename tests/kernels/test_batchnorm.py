from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cure_fast.kernels.batchnorm import fold_batchnorm, fold_batchnorm_ref
from cure_fast.kernels.tables import TensorList

BOTH = ("triton", "reference")
# A chunk is 1024 weights: less than one, one and a rest with channels that straddle two chunks,
# chunks within one channel, whole chunks only.
SHAPES = [(3, 2, 1, 1), (8, 15, 3, 3), (2, 600, 2, 1), (4, 512), (1, 5, 3, 3), (300, 1, 1, 1)]
Layers = dict[str, list]


def draw(
    shapes=SHAPES, dtype: torch.dtype = torch.float32, *, channels_last: bool = False, seed: int = 0
) -> Layers:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = [random(*shape) for shape in shapes]
    if channels_last:
        form = torch.channels_last
        weights = [w.to(memory_format=form) if w.ndim == 4 else w for w in weights]
    channels = [shape[0] for shape in shapes]
    return {
        "weights": weights,
        "biases": [random(n) for n in channels],
        "bn_weights": [random(n) for n in channels],
        "bn_biases": [random(n) for n in channels],
        "running_means": [random(n) for n in channels],
        "running_vars": [random(n).square() for n in channels],
        "out_weights": [torch.empty_like(w, dtype=dtype) for w in weights],
        "out_biases": [torch.empty(n, dtype=dtype) for n in channels],
    }


def outputs(layers: Layers) -> list[Tensor]:
    return [*layers["out_weights"], *layers["out_biases"]]


def folded(layers: Layers, eps: object = 1e-5) -> list[Tensor]:
    """Return what the reference makes of ``layers``, whose outputs stay as they are."""
    own = {
        name: [torch.empty_like(t) for t in layers[name]] for name in ("out_weights", "out_biases")
    }
    fold_batchnorm_ref(**(layers | own), eps=eps)
    return outputs(own)


def same_bits(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_reference_takes_the_same_arguments():
    assert inspect.signature(fold_batchnorm) == inspect.signature(fold_batchnorm_ref)


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_folded_layer_does_what_layer_and_batchnorm_do(monkeypatch, kernels, channels_last):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    layers = draw(channels_last=channels_last)
    fold_batchnorm(**layers, eps=1e-3)
    for i, weight in enumerate(layers["weights"]):
        x = torch.randn(2, *weight.shape[1:], dtype=torch.float64)
        apply = F.linear if weight.ndim == 2 else F.conv2d
        of = {name: tensors[i].double() for name, tensors in layers.items()}
        before = apply(x, of["weights"], of["biases"])
        after = F.batch_norm(
            before,
            of["running_means"],
            of["running_vars"],
            of["bn_weights"],
            of["bn_biases"],
            eps=1e-3,
        )
        found = apply(x, of["out_weights"], of["out_biases"])
        # Weights carry 3 float32 roundings of 6e-8; outputs add up to 1200 terms of scale 30.
        torch.testing.assert_close(found, after, rtol=1e-6, atol=1e-4)
        assert layers["out_weights"][i].stride() == weight.stride()


@pytest.mark.parametrize("kernels", BOTH)
def test_it_follows_its_formula_in_numpy(monkeypatch, kernels):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    layers = draw()
    fold_batchnorm(**layers, eps=1e-5)
    for i in range(len(SHAPES)):
        w, b, gain, shift, mean, var = (
            tensors[i].double().numpy()
            for tensors in [
                *(layers[name] for name in ("weights", "biases", "bn_weights", "bn_biases")),
                *(layers[name] for name in ("running_means", "running_vars")),
            ]
        )
        scale = gain / np.sqrt(var + 1e-5)
        wanted = np.einsum("o...,o->o...", w, scale)
        # Three roundings for the scale and one for the product.
        np.testing.assert_allclose(layers["out_weights"][i], wanted, rtol=4 * 2**-24)
        # The sum cancels: its error is that of its terms.
        terms = np.abs(shift) + (np.abs(b) + np.abs(mean)) * np.abs(scale)
        error = np.abs(layers["out_biases"][i].numpy() - (shift + (b - mean) * scale))
        assert (error <= 6 * 2**-24 * terms).all()


@given(
    shapes=st.lists(
        st.one_of(
            st.tuples(st.integers(1, 9), st.integers(1, 40)),
            st.tuples(*[st.integers(1, 9), st.integers(1, 64), *[st.integers(1, 3)] * 2]),
        ),
        min_size=1,
        max_size=4,
    ),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    channels_last=st.booleans(),
    biases=st.sampled_from(["all", "none", "some"]),
    affine=st.sampled_from(["all", "none", "some"]),
    eps=st.one_of(st.floats(1e-6, 1), st.just("numbers"), st.just("tensor")),
    lists=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_kernel_has_the_bits_of_the_reference(
    triton_kernels, shapes, dtype, channels_last, biases, affine, eps, lists, seed
):
    layers = draw(shapes, dtype, channels_last=channels_last, seed=seed)
    for which, names in ((biases, ["biases"]), (affine, ["bn_weights", "bn_biases"])):
        for name in names:
            if which == "none":
                layers[name] = None
            elif which == "some":
                layers[name] = [t if i % 2 else None for i, t in enumerate(layers[name])]
    if isinstance(eps, str):
        each = [10.0 ** -(i + 1) for i in range(len(shapes))]
        eps = torch.tensor(each) if eps == "tensor" else each
    wanted = folded(layers, eps)
    given_lists = {
        name: TensorList(tensors) if lists and tensors is not None else tensors
        for name, tensors in layers.items()
    }
    fold_batchnorm(**given_lists, eps=eps)
    assert same_bits(outputs(layers), wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_of_chunk_in_every_dtype(triton_kernels, shape, dtype):
    layers = draw([shape], dtype)
    fold_batchnorm(**layers, eps=1e-5)
    if dtype == torch.bfloat16:
        # Triton's interpreter cuts the lower bits off, where a GPU rounds to nearest.
        exact = draw([shape])
        exact["out_weights"], exact["out_biases"] = exact["weights"], exact["biases"]
        wanted = [(w.view(torch.int32) >> 16 << 16).view(torch.float32) for w in folded(exact)]
        assert same_bits([t.float() for t in outputs(layers)], wanted)
    else:
        assert same_bits(outputs(layers), folded(layers))


def test_the_reference_rounds_to_nearest():
    layers = draw([(2, 40)], torch.bfloat16)
    exact = draw([(2, 40)])
    for found, wanted in zip(folded(layers), folded(exact), strict=True):
        assert found.dtype == torch.bfloat16
        # Half of the 2**-7 between two neighbours.
        torch.testing.assert_close(found.float(), wanted, rtol=2**-8, atol=0)


@pytest.mark.parametrize("kernels", BOTH)
def test_outputs_of_several_dtypes(monkeypatch, kernels):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    layers = draw([(3, 4), (2, 5)])
    for name in ("out_weights", "out_biases"):
        layers[name][1] = layers[name][1].half()
    wanted = folded(layers)
    fold_batchnorm(**layers, eps=1e-5)
    assert same_bits(outputs(layers), wanted)


@pytest.mark.parametrize("kernels", BOTH)
def test_addresses_that_are_no_multiples_of_16_bytes(monkeypatch, kernels):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    layers = draw([(2, 700)])
    layers["weights"] = [torch.randn(1401)[1:].view(2, 700)]
    layers["out_weights"] = [torch.zeros(1403)[3:].view(2, 700)]
    wanted = folded(layers)
    fold_batchnorm(**layers, eps=1e-5)
    assert same_bits(outputs(layers), wanted)


@pytest.mark.parametrize("kernels", BOTH)
def test_nothing_beyond_the_outputs_is_written(monkeypatch, kernels):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    layers = draw([(5, 7), (300, 1)])
    memory = {}
    for name in ("out_weights", "out_biases"):
        for i, tensor in enumerate(layers[name]):
            held = memory[name, i] = torch.full((tensor.numel() + 2048,), 7.0)
            layers[name][i] = held[1024 : 1024 + tensor.numel()].view(tensor.shape)
    fold_batchnorm(**layers, eps=1e-5)
    for held in memory.values():
        assert (held[:1024] == 7).all() and (held[-1024:] == 7).all()
        assert (held[1024:-1024] != 7).all()


@pytest.mark.parametrize("kernels", BOTH)
def test_it_folds_into_the_weights_themselves(monkeypatch, kernels):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    layers = draw()
    wanted = folded(layers)
    layers["out_weights"], layers["out_biases"] = layers["weights"], layers["biases"]
    fold_batchnorm(**layers, eps=1e-5)
    assert same_bits(outputs(layers), wanted)


@pytest.mark.parametrize("kernels", BOTH)
def test_weights_in_another_memory_format_than_their_outputs(monkeypatch, kernels):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    layers = draw([(3, 4, 3, 3), (2, 5)])
    layers["out_weights"][0] = layers["out_weights"][0].to(memory_format=torch.channels_last)
    wanted = folded(layers)
    fold_batchnorm(**layers, eps=1e-5)
    assert same_bits(outputs(layers), wanted)
    if kernels == "triton":
        with pytest.raises(ValueError, match="expected strides"):
            fold_batchnorm(**(layers | {"weights": TensorList(layers["weights"])}), eps=1e-5)


@pytest.mark.parametrize("kernels", BOTH)
def test_parameters_that_require_gradients(monkeypatch, kernels):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    layers = draw([(3, 4)])
    wanted = folded(layers)
    for name in ("weights", "biases", "bn_weights", "bn_biases"):
        layers[name] = [torch.nn.Parameter(t) for t in layers[name]]
    fold_batchnorm(**layers, eps=1e-5)
    assert same_bits(outputs(layers), wanted)
    assert not any(t.requires_grad for t in outputs(layers))


@pytest.mark.parametrize("kernels", BOTH)
def test_no_layers(monkeypatch, kernels):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    nothing = fold_batchnorm([], None, [], None, [], [], eps=1e-5, out_weights=[], out_biases=[])
    assert nothing is None


def test_a_second_call_with_tensor_lists_builds_no_tables(monkeypatch, triton_kernels):
    layers = {name: TensorList(tensors) for name, tensors in draw([(3, 4), (2, 5)]).items()}
    fold_batchnorm(**layers, eps=torch.full((2,), 1e-5))

    def refuse(*args: object) -> None:
        raise AssertionError("a table was built, which a CUDA graph does not allow")

    monkeypatch.setattr("cure_fast.kernels.tables.upload", refuse)
    monkeypatch.setattr("cure_fast.kernels.device.numbers.upload", refuse)
    for eps in (1e-5, [1e-5, 1e-5], torch.full((2,), 1e-5)):
        for tensor in outputs(layers):
            tensor.zero_()
        fold_batchnorm(**layers, eps=eps)
        assert same_bits(outputs(layers), folded(layers))


def test_numbers_that_differ_cannot_be_sent_in_a_capture(monkeypatch, triton_kernels):
    layers = {name: TensorList(tensors) for name, tensors in draw([(3, 4), (2, 5)]).items()}
    fold_batchnorm(**layers, eps=1e-5)
    monkeypatch.setattr("cure_fast.kernels.device.numbers.is_capturing", lambda device: True)
    fold_batchnorm(**layers, eps=[1e-5, 1e-5])
    with pytest.raises(RuntimeError, match=r"eps: .*Pass a float32 tensor \[2\] on cpu"):
        fold_batchnorm(**layers, eps=[1e-5, 1e-3])


@pytest.mark.parametrize("kernels", BOTH)
def test_eps_on_the_device_may_lie_in_any_way(monkeypatch, kernels):
    """A column of a matrix, and one number expanded."""
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    layers = draw([(3, 4), (2, 5)])
    column = torch.tensor([[0.0, 99.0], [3.0, 99.0]])[:, 0]
    for eps, alike in ((column, [0.0, 3.0]), (torch.tensor(0.5).expand(2), 0.5)):
        fold_batchnorm(**layers, eps=eps)
        assert same_bits(outputs(layers), folded(layers, alike))


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("kind", [int, np.float32, np.float64, np.int64])
def test_eps_may_be_an_integer_or_numpys(monkeypatch, kernels, kind):
    """An integer is compiled into the kernel, and NumPy's numbers have no type there."""
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    layers = draw([(3, 4), (2, 5)])
    for eps in (kind(1), [kind(1), kind(2)]):
        fold_batchnorm(**layers, eps=eps)
        wanted = [float(e) for e in eps] if isinstance(eps, list) else 1.0
        assert same_bits(outputs(layers), folded(layers, wanted))


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize(
    "name", ["biases", "bn_weights", "bn_biases", "running_means", "running_vars"]
)
def test_numbers_per_channel_may_have_gaps(monkeypatch, kernels, name):
    monkeypatch.setenv("CURE_FAST_KERNELS", kernels)
    layers = draw([(3, 4), (2, 5)])
    wanted = folded(layers)
    layers[name] = [torch.stack((t, t + 1), dim=1)[:, 0] for t in layers[name]]
    fold_batchnorm(**layers, eps=1e-5)
    assert same_bits(outputs(layers), wanted)


def test_layers_of_one_dtype_take_one_launch(monkeypatch, triton_kernels):
    from cure_fast.kernels.device import batchnorm

    launches = []
    launch_each = batchnorm.launch_each
    monkeypatch.setattr(
        batchnorm, "launch_each", lambda given: (launches.extend(given), launch_each(given))
    )
    fold_batchnorm(**draw(), eps=1e-5)
    assert len(launches) == 1


def replaced(name: str, value: object) -> Layers:
    return draw([(2, 3), (4, 5)]) | {name: value}


V, W = torch.zeros(2), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("layers", "eps", "error", "gist"),
    [
        (replaced("weights", W), 0.1, TypeError, "weights: expected a list"),
        (replaced("weights", [W]), 0.1, ValueError, "out_weights: expected 1"),
        (replaced("weights", [W, W]), 0.1, ValueError, r"out_weights\[1\]: expected shape \[2, 3"),
        (replaced("weights", [W.double(), torch.zeros(4, 5)]), 0.1, TypeError, r"weights\[0\].*64"),
        (
            replaced("out_weights", [W.double(), torch.zeros(4, 5)]),
            0.1,
            TypeError,
            "out_weights.*64",
        ),
        (replaced("biases", [V]), 0.1, ValueError, "biases: expected 2 entries"),
        (replaced("biases", torch.zeros(2, 2)), 0.1, TypeError, "biases: expected a list"),
        (replaced("bn_weights", [V, V]), 0.1, ValueError, r"bn_weights\[1\]: expected shape \[4\]"),
        (replaced("bn_biases", [V.half(), None]), 0.1, TypeError, r"bn_biases\[0\].*float32"),
        (replaced("running_means", [V, V]), 0.1, ValueError, r"running_vars\[1\]: .*\[2\]"),
        (
            replaced("running_vars", [V.half(), torch.zeros(4)]),
            0.1,
            TypeError,
            r"running_vars\[0\]",
        ),
        (replaced("running_means", [V, None]), 0.1, TypeError, r"running_means\[1\]: .*NoneType"),
        (replaced("out_biases", [V]), 0.1, ValueError, "out_biases: expected a list of 2"),
        (
            replaced("out_biases", [V.half(), torch.zeros(4)]),
            0.1,
            TypeError,
            r"out_biases\[0\].*32",
        ),
        (replaced("running_vars", [V, torch.zeros(4, device="meta")]), 0.1, ValueError, "meta"),
        (replaced("biases", [V, torch.zeros(4, device="meta")]), 0.1, ValueError, "meta"),
        (draw([(2, 3)]), -1.0, ValueError, "eps: .*-1"),
        (draw([(2, 3)]), [0.1, 0.1], ValueError, "eps: .*2"),
        (draw([(2, 3)]), torch.zeros(2), ValueError, r"eps: .*\[1\].*\[2\]"),
        (draw([(2, 3)]), torch.zeros(1).double(), ValueError, "eps: .*float64"),
    ],
)
def test_wrong_arguments_are_named(layers, eps, error, gist):
    with pytest.raises(error, match=gist):
        fold_batchnorm(**layers, eps=eps)


def test_output_channels_that_do_not_lie_outermost_are_refused():
    layers = draw([(2, 3)])
    layers["out_weights"] = [torch.zeros(3, 2).T]
    with pytest.raises(ValueError, match=r"out_weights\[0\]: .*outermost.*channels_last"):
        fold_batchnorm(**layers, eps=0.1)


def test_an_empty_or_flat_weight_is_refused():
    layers = draw([(2, 3)])
    for shape, gist in (((2, 0), "1 to"), ((2,), r"weights\[0\]: expected shape \[O, I")):
        layers["weights"], layers["out_weights"] = [torch.zeros(shape)], [torch.zeros(shape)]
        with pytest.raises(ValueError, match=gist):
            fold_batchnorm(**layers, eps=0.1)
