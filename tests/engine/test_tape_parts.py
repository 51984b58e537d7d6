"""One forward pass of several batches on the tape against a pass of the model for each."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from cure_fast.engine.tape import Tape
from cure_fast.engine.tape_norm import BatchNorm
from cure_fast.models import ImageClassifier, block_first_convs
from tape_cases import (
    BOUND,
    CLASSES,
    NETWORKS,
    STATISTICS,
    Casting,
    Counting,
    Odd,
    assert_close_buffers,
    assert_same,
    images,
    low,
    network,
    off,
    own,
)

pytestmark = pytest.mark.usefixtures("one_thread")

aten = torch.ops.aten
NATURAL, ADVERSARIAL, BOTH = range(1), range(1, 2), range(2)
Wanted = Collection[str] | None


def apart(
    model: ImageClassifier,
    weights: dict[str, Tensor],
    batches: Sequence[Tensor],
    rows: Sequence[Tensor],
    spans: Sequence[range],
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Logits and gradients by a pass of the model itself for each batch, and autograd."""
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    named = {f"model.{name}": leaf for name, leaf in leaves.items()}
    logits = [functional_call(Casting(model, dtype), named, (x,)) for x in batches]
    sweeps = [
        torch.autograd.grad(
            torch.cat([logits[part] for part in span]),
            list(leaves.values()),
            own_rows,
            retain_graph=True,
            allow_unused=True,
        )
        for own_rows, span in zip(rows, spans, strict=True)
    ]
    return torch.cat(logits).detach(), [
        {name: grad for name, grad in zip(leaves, sweep, strict=True) if grad is not None}
        for sweep in sweeps
    ]


def cotangents(spans: Sequence[range], size: int, dtype=torch.float64) -> list[Tensor]:
    return [torch.randn(len(span) * size, CLASSES, dtype=dtype) for span in spans]


def check(
    model: ImageClassifier,
    batches: Sequence[Tensor],
    wanted: Sequence[Wanted],
    spans: Sequence[range],
) -> list[dict[str, Tensor]]:
    twin = copy.deepcopy(model)
    rows = cotangents(spans, len(batches[0]))
    logits, expected = apart(twin, own(twin), batches, rows, spans)
    tape = Tape(model, own(model))
    record = tape.forward(torch.cat(list(batches)), len(batches))
    assert off(record.logits, logits) < BOUND
    # A convolution of a larger batch may sum in another order, which moves the last bits of a
    # mean; BatchNorm itself moves none (below).
    assert_close_buffers(model, twin, 1e-13)
    found = tape.backward(record, torch.cat(rows), wanted, spans)
    assert_same(found, expected, wanted)
    return found


def cure(model: ImageClassifier) -> tuple[list[Wanted], list[range]]:
    """What CURE wants: all of the total, and of two losses what the mask may touch."""
    scored = [name for name in own(model) if not name.startswith(model.classifier_name)]
    return [None, scored, block_first_convs(model)], [BOTH, NATURAL, ADVERSARIAL]


@pytest.mark.parametrize(("name", "stem"), NETWORKS)
def test_a_joint_pass_of_every_network_is_two_passes(name, stem):
    model = network(name, stem)
    check(model, [images(3, 8, 12), images(3, 8, 12)], *cure(model))


@settings(max_examples=12)
@given(st.data(), st.sampled_from(["resnet-small", "preactresnet18"]), st.integers(1, 3))
def test_any_losses_of_any_parts(data, name, parts):
    torch.manual_seed(0)
    model = network(name, normalize=STATISTICS)
    names = st.none() | st.sets(st.sampled_from(list(own(model))), max_size=4)
    span = st.sampled_from([range(a, b) for a in range(parts) for b in range(a + 1, parts + 1)])
    losses = data.draw(st.lists(st.tuples(names, span), min_size=1, max_size=4))
    batches = [images(2, 8, 8) for _ in range(parts)]
    check(model, batches, [some for some, _ in losses], [part for _, part in losses])


def test_layers_with_every_option():
    model = Odd().double().to(memory_format=torch.channels_last)
    batches = [images(3, 9, 11), images(3, 9, 11)]
    reached = {n for n in own(model) if not n.startswith(("unused.", "aside."))}
    # A bias before BatchNorm has a gradient of 0, of which there is nothing but rounding.
    first = reached - {"conv1.bias"}
    check(model, batches, [first, ["conv2.bias", "hidden.weight"]], [BOTH, ADVERSARIAL])
    assert int(model.aside.num_batches_tracked) == 2


def test_all_parts_are_the_default():
    model = network()
    tape = Tape(model, own(model))
    record = tape.forward(images(6), 2)
    rows = torch.randn(2, 6, CLASSES, dtype=torch.float64)
    found = tape.backward(record, rows, [None, None])
    same = tape.backward(record, rows.flatten(0, 1), [None, None], [BOTH, BOTH])
    for ours, theirs in zip(found, same, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in own(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_batchnorm_of_parts_has_the_bits_of_passes_in_turn(dtype, order):
    wide = torch.promote_types(dtype, torch.float32)
    module = nn.BatchNorm2d(5, momentum=0.3).to(wide)
    nn.init.uniform_(module.weight, 0.5, 1.5)
    twin = copy.deepcopy(module)
    x = torch.randn(8, 5, 6, 7).to(dtype).contiguous(memory_format=order)
    x[4:] += 2
    weights = {f"bn.{name}": weight.detach() for name, weight in module.named_parameters()}
    y, _ = BatchNorm("bn", module).forward(weights, 2, x)
    assert torch.equal(y, torch.cat([twin(part) for part in x.chunk(2)]))
    assert torch.equal(module.running_mean, twin.running_mean)
    assert torch.equal(module.running_var, twin.running_var)
    # The other order is another average.
    other = nn.BatchNorm2d(5, momentum=0.3).to(wide)
    BatchNorm("bn", other).forward(weights, 2, x.roll(4, 0))
    assert not torch.allclose(module.running_mean, other.running_mean, rtol=1e-2)


def test_frozen_batchnorms_take_all_parts_at_once():
    model = network("resnet18")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for frozen in (norms[1::3], norms):
        for module in norms:
            module.train(module not in frozen)
        batches = [images(3, 8, 8), images(3, 8, 8)]
        check(model, batches, *cure(model))
        tape = Tape(model, own(model))
        with Counting() as counting:
            tape.forward(torch.cat(batches), 2)
        taken = [len(args[0]) for args in counting.of(aten.native_batch_norm)]
        assert taken.count(6) == len(frozen)
        assert taken.count(3) == 2 * (len(norms) - len(frozen))


@pytest.mark.parametrize("name", ["resnet-small", "preactresnet18"])
def test_bf16_weights(name):
    # As for a single pass: a batch of another size sums in another order, which turns a rounding to
    # bf16 (2^-9) here and there. The oracle rounds the gradient of each pass, and their sum.
    model = network(name, normalize=STATISTICS)
    weights = low(model, torch.bfloat16)
    twin = copy.deepcopy(model)
    batches = [images(4, 8, 8).float(), images(4, 8, 8).float()]
    wanted, spans = cure(model)
    rows = cotangents(spans, 4, torch.float32)
    logits, expected = apart(twin, weights, batches, rows, spans, torch.bfloat16)
    tape = Tape(model, weights)
    record = tape.forward(torch.cat(batches), 2)
    assert record.logits.dtype == torch.float32
    assert off(record.logits, logits) < 2**-6
    assert_close_buffers(model, twin, 2**-8)
    found = tape.backward(record, torch.cat(rows), wanted, spans)
    assert_same(found, expected, wanted, 2**-5)
    for gradients in found:
        for key, gradient in gradients.items():
            assert gradient.dtype == weights[key].dtype
            assert gradient.stride() == weights[key].stride()


def test_convolutions_go_once_forward_once_back_and_once_per_loss():
    model = network()
    tape = Tape(model, own(model))
    size = 4
    convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    scored = [name for name in own(model) if not name.startswith("linear")]
    spans = [BOTH, NATURAL, ADVERSARIAL]
    with Counting() as forward:
        record = tape.forward(images(2 * size), 2)
    rows = torch.cat(cotangents(spans, size))
    with Counting() as back:
        tape.backward(record, rows, [None, scored, scored], spans)
    assert [len(args[0]) for args in forward.of(aten.convolution)] == [2 * size] * convs
    calls = [(tuple(args[-1]), len(args[0])) for args in back.of(aten.convolution_backward)]
    assert calls.count(((True, False, False), 4 * size)) == convs - 1
    assert calls.count(((False, True, False), 2 * size)) == convs
    assert calls.count(((False, True, False), size)) == 2 * convs
    assert len(calls) == 4 * convs - 1
    # The parts come as natural, adversarial, natural, adversarial: the batch is read twice over.
    relus = back.of(aten.threshold_backward)
    assert [len(args[0]) for args in relus] == [2 * size] * 2 * 7
    assert [len(args[0]) for args in back.of(aten.native_batch_norm_backward)] == [size] * 4 * norms
    assert len(back.of(aten._foreach_add_)) == 1
    waiting = (aten._local_scalar_dense, aten.nonzero, aten.lift_fresh, aten.index, aten.equal)
    for counting in (forward, back):
        assert [operation for operation in waiting if counting.of(operation)] == []


def test_no_activation_is_copied_to_join_the_parts_on_the_way_forward():
    tape = Tape(model := network(), own(model))
    x = images(8)
    with Counting() as counting:
        tape.forward(x, 2)
    copying = (aten.cat, aten.clone, aten.copy_, aten.stack)
    assert [operation for operation in copying if counting.of(operation)] == []


def test_a_joint_record_serves_several_backward_passes():
    model = network(normalize=STATISTICS)
    tape = Tape(model, own(model))
    record = tape.forward(images(6, 8, 8), 2)
    wanted, spans = cure(model)
    rows = torch.cat(cotangents(spans, 3))
    buffers = copy.deepcopy(dict(model.named_buffers()))
    once, again = (tape.backward(record, rows, wanted, spans) for _ in range(2))
    for ours, theirs in zip(once, again, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("parts", [0, 3, -2])
def test_parts_that_are_not_equal_are_refused(parts):
    model = network()
    with pytest.raises(ValueError, match=r"parts: expected equal parts of 4 images"):
        Tape(model, own(model)).forward(images(4), parts)


def test_what_does_not_fit_a_joint_record_is_refused():
    model = network()
    tape = Tape(model, own(model))
    record = tape.forward(images(4), 2)
    rows = torch.ones(2, CLASSES, dtype=torch.float64)
    for spans in ([range(2, 3)], [range(0)], [range(1, -1, -1)], [NATURAL, NATURAL], []):
        with pytest.raises(ValueError, match="spans: expected parts of 2 in order"):
            tape.backward(record, rows, [None], spans)
    with pytest.raises(ValueError, match=r"cotangents: expected \[4, 5\]"):
        tape.backward(record, rows, [None], [BOTH])
    with pytest.raises(ValueError, match=r"cotangents: expected \[1, 4, 5\]"):
        tape.backward(record, rows[None], [None])
    # Two images of one part would do, one of each of two parts does not.
    deep = network("resnet18")
    with pytest.raises(ValueError, match="more than one value per channel"):
        Tape(deep, own(deep)).forward(images(2, 8, 8), 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_joint_pass_captured_in_a_cuda_graph_is_two_passes(dtype):
    # 2^-5: as for bf16 above, and kernels of cuDNN for another batch sum in another order.
    model = network("resnet18", normalize=STATISTICS).float().cuda()
    weights = low(model, dtype)
    batches = [images(8, 16, 16).float().cuda() for _ in range(2)]
    both, twin = torch.cat(batches), copy.deepcopy(model)
    tape = Tape(model, weights)
    wanted, spans = cure(model)
    rows = [some.cuda() for some in cotangents(spans, 8, torch.float32)]
    stacked = torch.cat(rows)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            tape.backward(tape.forward(both, 2), stacked, wanted, spans)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        record = tape.forward(both, 2)
        found = tape.backward(record, stacked, wanted, spans)
    model.load_state_dict(twin.state_dict())
    graph.replay()
    logits, expected = apart(twin, weights, batches, rows, spans, dtype)
    assert off(record.logits, logits) < 2**-5
    assert_close_buffers(model, twin, 2**-8)
    assert_same(found, expected, wanted, 2**-5)
