"""The tape against torch.autograd on the model itself, in float64 and in lower precisions."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cure_fast.engine.tape import Tape
from cure_fast.engine.trace import UnsupportedNetworkError
from cure_fast.models import ImageClassifier, block_first_convs
from tape_cases import (
    BOUND,
    CLASSES,
    NETWORKS,
    STATISTICS,
    Counting,
    Odd,
    assert_same,
    assert_same_buffers,
    autograd,
    images,
    low,
    network,
    off,
    own,
)

aten = torch.ops.aten


def check(
    model: ImageClassifier, x: Tensor, wanted: Sequence[Collection[str] | None]
) -> list[dict[str, Tensor]]:
    twin = copy.deepcopy(model)
    cotangents = torch.randn(len(wanted), len(x), CLASSES, dtype=torch.float64)
    logits, expected = autograd(twin, own(twin), x, cotangents)
    tape = Tape(model, own(model))
    record = tape.forward(x)
    assert off(record.logits, logits) < BOUND
    assert_same_buffers(model, twin)
    found = tape.backward(record, cotangents, wanted)
    assert_same(found, expected, wanted)
    for gradients in found:
        assert list(gradients) == [name for name in own(model) if name in gradients]
    return found


@pytest.mark.parametrize(("name", "stem"), NETWORKS)
def test_gradients_of_every_network_are_those_of_autograd(name, stem):
    model = network(name, stem)
    check(model, images(), [None, block_first_convs(model)])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", ["resnet-small", "preactresnet18", "wrn28-10"])
def test_any_number_of_cotangents_goes_back_at_once(name, count):
    check(network(name, normalize=STATISTICS), images(height=9), [None] * count)


@pytest.mark.parametrize("size", [(8, 8), (7, 20), (33, 5)])
def test_images_of_any_shape(size):
    check(network(), images(3, *size), [None, None])
    check(network("resnet18", "imagenet"), images(3, *size), [None, None])


@settings(max_examples=20)
@given(st.data(), st.sampled_from(["resnet-small", "preactresnet18"]))
def test_any_subsets_of_parameters(data, name):
    torch.manual_seed(0)
    model = network(name)
    subset = st.none() | st.sets(st.sampled_from(list(own(model))), max_size=4)
    check(model, images(2, 8, 8), data.draw(st.lists(subset, min_size=1, max_size=4)))


def test_no_names_give_no_gradients_and_cost_nothing():
    model = network()
    tape = Tape(model, own(model))
    record = tape.forward(images())
    cotangents = torch.ones(2, 4, CLASSES, dtype=torch.float64)
    with Counting() as counting:
        found = tape.backward(record, cotangents, [(), []])
    assert found == [{}, {}]
    assert counting.calls == []


@pytest.mark.parametrize("name", ["resnet-small", "preactresnet18"])
def test_running_statistics_are_those_of_two_forward_passes_of_the_model(name):
    # The same ATen operation on the same inputs, hence the same bits.
    model = network(name, normalize=STATISTICS)
    twin = copy.deepcopy(model)
    tape = Tape(model, own(model))
    before = copy.deepcopy(model.state_dict())
    for x in (images(), images(6, 8, 9)):
        assert torch.equal(tape.forward(x).logits, twin(x))
        assert_same_buffers(model, twin)
    moved = [key for key, value in model.state_dict().items() if not value.equal(before[key])]
    assert len(moved) == 3 * sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_each_forward_pass_obeys_the_modes_of_the_batchnorms_then():
    model, x = network("resnet18"), images()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    tape = Tape(model, own(model))
    cotangents = torch.randn(2, len(x), CLASSES, dtype=torch.float64)
    for frozen in (norms[1::3], [], norms):
        for module in norms:
            module.train(module not in frozen)
        twin = copy.deepcopy(model)
        logits, expected = autograd(twin, own(twin), x, cotangents)
        record = tape.forward(x)
        assert off(record.logits, logits) < BOUND
        assert_same_buffers(model, twin)
        wanted = [None, block_first_convs(model)]
        assert_same(tape.backward(record, cotangents, wanted), expected, wanted)


@pytest.mark.parametrize("name", ["resnet-small", "preactresnet18"])
def test_bf16_weights(name):
    # Per cotangent the operations and roundings are those of autograd; only the batch of a
    # convolution's input gradient differs, which may change the order of a float32 sum and so
    # turn a rounding to bf16 (2^-9) here and there: a few of those, on the largest entry.
    model = network(name, normalize=STATISTICS)
    weights, x = low(model, torch.bfloat16), images().float()
    twin = copy.deepcopy(model)
    cotangents = torch.randn(2, len(x), CLASSES)
    logits, expected = autograd(twin, weights, x, cotangents, torch.bfloat16)
    tape = Tape(model, weights)
    record = tape.forward(x)
    assert record.logits.dtype == torch.float32
    assert torch.equal(record.logits, logits)
    assert_same_buffers(model, twin)
    found = tape.backward(record, cotangents, [None, None])
    assert_same(found, expected, [None, None], 2**-6)
    for gradients in found:
        assert {n: g.dtype for n, g in gradients.items()} == {
            n: w.dtype for n, w in weights.items()
        }


def test_weights_are_read_at_each_forward_pass():
    model, x = network(), images()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    tape = Tape(model, weights)
    tape.forward(x)
    for weight in weights.values():
        weight.mul_(0.9).add_(0.01)
    twin = copy.deepcopy(model)
    cotangents = torch.randn(1, len(x), CLASSES, dtype=torch.float64)
    logits, expected = autograd(twin, weights, x, cotangents)
    record = tape.forward(x)
    assert off(record.logits, logits) < BOUND
    assert_same(tape.backward(record, cotangents, [None]), expected, [None])


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_lie_in_memory_as_their_weights_do(order, dtype):
    model = network("resnet50").to(memory_format=order)
    weights = own(model) if dtype == torch.float64 else low(model, dtype)
    x = images(2, 8, 8).to(next(model.parameters()).dtype)
    tape = Tape(model, weights)
    record = tape.forward(x)
    (found,) = tape.backward(record, torch.randn_like(record.logits)[None], [None])
    assert {n: g.stride() for n, g in found.items()} == {n: w.stride() for n, w in weights.items()}
    assert found["layer1.0.conv2.weight"].is_contiguous(memory_format=order)


def convolution_gradients(counting: Counting) -> list[tuple[tuple[bool, ...], int]]:
    """For each call, which of input, weight and bias it gave, and for how many images."""
    return [(tuple(args[-1]), len(args[0])) for args in counting.of(aten.convolution_backward)]


def test_input_gradients_of_convolutions_are_computed_once_for_all_cotangents():
    model, x = network(), images()
    tape = Tape(model, own(model))
    record = tape.forward(x)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    cotangents = torch.randn(3, len(x), CLASSES, dtype=torch.float64)
    with Counting() as counting:
        tape.backward(record, cotangents, [None] * 3)
    calls = convolution_gradients(counting)
    assert calls.count(((True, False, False), 3 * len(x))) == len(convs) - 1
    assert calls.count(((False, True, False), len(x))) == 3 * len(convs)
    assert len(calls) == 4 * len(convs) - 1
    relus = counting.of(aten.threshold_backward)
    assert [len(args[0]) for args in relus] == [len(x)] * 3 * 7


def test_only_what_is_wanted_is_computed():
    model, x = network(), images()
    tape = Tape(model, own(model))
    record = tape.forward(x)
    first = block_first_convs(model)
    cotangents = torch.randn(4, len(x), CLASSES, dtype=torch.float64)
    with Counting() as counting:
        tape.backward(record, cotangents, [first, None, [], ["linear.bias"]])
    calls = convolution_gradients(counting)
    # The first block's first convolution needs no input gradient for ``first``, the stem for none;
    # the other seven serve both cotangents that pass the linear layer.
    assert calls.count(((True, False, False), 2 * len(x))) == 7
    assert calls.count(((True, False, False), len(x))) == 1
    assert calls.count(((False, True, False), len(x))) == len(first) + 9
    assert len(calls) == 7 + 1 + len(first) + 9
    # All BatchNorms for the second cotangent, all but the stem's for the first.
    assert len(counting.of(aten.native_batch_norm_backward)) == 9 + 8


def test_nothing_is_read_back_from_the_device_or_copied_to_it():
    model, x = network("resnet18", "imagenet"), images()
    tape = Tape(model, own(model))
    cotangents = torch.randn(2, len(x), CLASSES, dtype=torch.float64)
    with Counting() as counting:
        tape.backward(tape.forward(x), cotangents, [None, ["linear.weight"]])
    assert len(counting.of(aten.convolution)) == 20
    waiting = (aten._local_scalar_dense, aten.nonzero, aten.lift_fresh, aten.index, aten.equal)
    assert [operation for operation in waiting if counting.of(operation)] == []


def test_a_record_serves_several_backward_passes_and_leaves_no_trace():
    model, x = network(normalize=STATISTICS), images()
    tape = Tape(model, own(model))
    record = tape.forward(x)
    logits, buffers = record.logits.clone(), copy.deepcopy(dict(model.named_buffers()))
    cotangents = torch.randn(2, len(x), CLASSES, dtype=torch.float64)
    given_cotangents = cotangents.clone()
    once, again = (tape.backward(record, cotangents, [None, None]) for _ in range(2))
    for ours, theirs in zip(once, again, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in own(model))
        assert not any(gradient.requires_grad for gradient in ours.values())
    assert torch.equal(record.logits, logits) and not record.logits.requires_grad
    assert torch.equal(cotangents, given_cotangents)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    assert [name for name, weight in own(model).items() if weight.grad is not None] == []


def test_records_of_several_passes_stay_apart_and_free_their_activations():
    model = network()
    tape = Tape(model, own(model))
    x, other = images(), images(3)
    cotangents = torch.randn(1, len(x), CLASSES, dtype=torch.float64)
    record = tape.forward(x)
    alone = tape.backward(record, cotangents, [None])
    held = tensors()
    second = tape.forward(other)
    both = tape.backward(record, cotangents, [None])
    assert all(torch.equal(alone[0][name], both[0][name]) for name in own(model))
    del second, both
    assert tensors() == held


def test_a_forward_pass_frees_what_no_backward_pass_reads():
    model, made, left = network(), [], []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket is aten.native_batch_norm:
                made.append(weakref.ref(out[0]))
            if func.overloadpacket is aten.addmm:
                left.append(sum(ref() is not None for ref in made))
            return out

    tape = Tape(model, own(model))
    with Watching():
        tape.forward(images())
    assert len(made) == 9 and left == [0]


def tensors() -> int:
    gc.collect()
    return sum(type(thing) is Tensor for thing in gc.get_objects())


def test_layers_with_every_option():
    model = Odd().double()
    model.to(memory_format=torch.channels_last)
    reached = {n for n in own(model) if not n.startswith(("unused.", "aside."))}
    (found, _) = check(model, images(3, 9, 11), [None, ["conv2.bias", "hidden.weight"]])
    assert set(found) == reached
    tape = Tape(model, own(model))
    record = tape.forward(images(3, 9, 11))
    with pytest.raises(ValueError, match=r"wanted: .*'aside\.bias'"):
        tape.backward(record, record.logits[None], [["aside.bias"]])


Change = Callable[[Odd], None]


def by(**modules: nn.Module) -> Change:
    return lambda model: [model.add_module(name, new) for name, new in modules.items()] and None


def computing(logits: Callable[[Odd, Tensor], Tensor]) -> Change:
    return lambda model: setattr(model, "logits", lambda x: logits(model, x))


def refused() -> Iterator[tuple[str, Change]]:
    """Gist of the message, and what is changed."""
    yield "Dropout", by(same=nn.Dropout())
    yield "conv1 pads", by(conv1=nn.Conv2d(3, 4, 3, padding="same"))
    yield "conv2 pads", by(conv2=nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))
    yield "bn1 is a BatchNorm", by(bn1=nn.BatchNorm2d(4, momentum=None))
    yield "bn1 is a BatchNorm", by(bn1=nn.BatchNorm2d(4, affine=False))
    yield "bn1 is a BatchNorm", by(bn1=nn.BatchNorm2d(4, track_running_stats=False))
    yield "pool returns indices", by(pool=nn.MaxPool2d(2, return_indices=True))
    yield "constant operand or an option", computing(lambda m, x: m.conv1(x + 1.0))
    yield (
        "constant operand or an option",
        computing(lambda m, x: m.conv1(torch.add(x, x, alpha=2))),
    )
    yield "overwrites", computing(lambda m, x: m.bn1(y := m.conv1(x)) + m.relu(y))
    yield "overwrites", computing(lambda m, x: F.relu(y := m.conv1(x), inplace=True) + y)
    yield "uses a layer twice", computing(lambda m, x: m.conv2(m.conv2(m.conv1(x))))
    yield "has no convolution", computing(lambda m, x: m.linear(x.mean(dim=(2, 3))))


@pytest.mark.parametrize(("gist", "change"), list(refused()))
def test_a_network_that_no_tape_knows_is_refused(gist, change):
    model = Odd()
    change(model)
    with pytest.raises(UnsupportedNetworkError, match=gist):
        Tape(model, own(model))


@pytest.mark.parametrize(
    ("gist", "logits"),
    [
        ("linear layers of", lambda m, x: m.hidden(m.conv1(x))),
        ("sums of", lambda m, x: m.conv2(y := m.conv1(x)) + m.pool(y)),
    ],
)
def test_shapes_that_no_tape_knows_are_refused_at_the_forward_pass(gist, logits):
    model = Odd()
    computing(logits)(model)
    tape = Tape(model, own(model))
    with pytest.raises(UnsupportedNetworkError, match=gist):
        tape.forward(torch.rand(2, 3, 6, 8))


def test_what_does_not_fit_the_network_is_refused():
    model, x = network(), images()
    weights = own(model)
    tape = Tape(model, weights)
    record = tape.forward(x)
    ones = torch.ones_like(record.logits)
    with pytest.raises(ValueError, match=r"cotangents: expected \[2, 4, 5\]"):
        tape.backward(record, ones[None], [None, None])
    with pytest.raises(ValueError, match=r"wanted: .*'conv9\.weight'"):
        tape.backward(record, ones[None], [["conv9.weight"]])
    with pytest.raises(ValueError, match="more than one value per channel"):
        Tape(network("resnet18"), own(network("resnet18"))).forward(images(1, 8, 8))
    del weights["bn1.bias"]
    with pytest.raises(ValueError, match=r"weights: .*bn1\.bias"):
        Tape(model, weights)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_passes_captured_in_a_cuda_graph_are_those_of_autograd(dtype):
    # 2^-5: as for bf16 above, and kernels of cuDNN for another batch sum in another order.
    model = network("resnet18", normalize=STATISTICS).float().cuda()
    weights, x = low(model, dtype), images(8, 16, 16).float().cuda()
    twin = copy.deepcopy(model)
    tape = Tape(model, weights)
    cotangents = torch.randn(2, len(x), CLASSES, device="cuda")
    wanted = [None, block_first_convs(model)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            tape.backward(tape.forward(x), cotangents, wanted)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        record = tape.forward(x)
        found = tape.backward(record, cotangents, wanted)
    model.load_state_dict(twin.state_dict())
    graph.replay()
    with Counting() as counting:
        logits, expected = autograd(twin, weights, x, cotangents, dtype)
    assert off(record.logits, logits) < 2**-5
    assert_same(found, expected, wanted, 2**-5)
    with Counting() as ours:
        tape.forward(x)
    for operation in (aten.native_batch_norm, aten.cudnn_batch_norm):
        assert len(ours.of(operation)) == len(counting.of(operation))
