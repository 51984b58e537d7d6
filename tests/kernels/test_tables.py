"""Tables of addresses: what graphs and other calls read, where tensors move, what is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cure_fast.kernels import RGP, TensorList, mask_below_, rgp_mask_, rgp_select, tables
from cure_fast.kernels import layout as layouts
from cure_fast.kernels.workspace import Workspace


class Captures:
    """CUDA graphs of the writes to tables, pretended on the CPU: recorded, done at each replay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graph: list[tuple[Tensor, Tensor]] | None = None
        write = TensorList._write

        def record(table: TensorList, host: Tensor) -> None:
            if self.graph is None:
                write(table, host)
            else:
                self.graph.append((table.addresses, host))

        monkeypatch.setattr(TensorList, "_write", record)
        monkeypatch.setattr(tables, "is_capturing", lambda device: self.graph is not None)

    @contextmanager
    def capture(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        self.graph = graph = []
        yield graph
        self.graph = None

    @staticmethod
    def replay(graph: list[tuple[Tensor, Tensor]]) -> None:
        for addresses, host in graph:
            addresses.copy_(host)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    return Captures(monkeypatch)


def points_to(table: TensorList, tensor: Tensor) -> bool:
    return table.addresses.tolist() == [tensor.data_ptr()]


# Tables and captures.


def test_a_replay_reads_what_was_captured_whatever_calls_came_between(captures):
    warm, other = torch.zeros(3), torch.zeros(3)
    table = TensorList([warm])
    table.point_to([warm])
    with captures.capture() as graph:
        table.point_to([warm])
    table.point_to([other])
    captures.replay(graph)
    assert points_to(table, warm)


def test_a_call_reads_its_own_tensors_after_a_capture_of_the_same(captures):
    first, captured = torch.zeros(3), torch.zeros(3)
    table = TensorList([first])
    with captures.capture():
        table.point_to([captured])
    assert points_to(table, first)  # A capture does nothing yet.
    table.point_to([captured])
    assert points_to(table, captured)


def test_a_released_list_is_refused_until_it_points_to_tensors_again(triton_kernels):
    first, second = torch.ones(3), torch.ones(3)
    table = TensorList([first])
    table.release()
    with pytest.raises(ValueError, match=r"one that has let go of them by release\(\)"):
        mask_below_(table, [torch.zeros(3)], torch.ones(1))
    with pytest.raises(ValueError, match=r"Call point_to\(\) with tensors first"):
        mask_below_([torch.ones(3)], table, torch.ones(1))
    assert table.point_to([second])
    mask_below_(table, [torch.zeros(3)], torch.ones(1))
    assert first.tolist() == [1, 1, 1] and second.tolist() == [0, 0, 0]


def test_a_captured_list_keeps_its_tensors(captures):
    captured = torch.zeros(3)
    table = TensorList([captured])
    with captures.capture():
        table.point_to([captured])
    table.release()
    assert table[0] is captured


def test_a_call_reads_its_own_tensors_after_a_replay(captures):
    captured, other = torch.zeros(3), torch.zeros(3)
    table = TensorList([captured])
    with captures.capture() as graph:
        table.point_to([captured])
    table.point_to([other])
    captures.replay(graph)
    table.point_to([other])
    assert points_to(table, other)


@given(
    st.lists(
        st.tuples(st.sampled_from(["call", "capture", "replay"]), st.integers(0, 2)), max_size=30
    )
)
def test_calls_captures_and_replays_in_any_order_read_their_own(steps):
    tensors = [torch.zeros(3) for _ in range(3)]
    table, graphs = TensorList(tensors[:1]), []
    with pytest.MonkeyPatch.context() as patch:
        captures = Captures(patch)
        for kind, number in steps:
            wanted = tensors[number]
            if kind == "call":
                assert table.point_to([wanted])
            elif kind == "capture":
                with captures.capture() as graph:
                    assert table.point_to([wanted])
                graphs.append((graph, wanted))
                continue
            elif graphs:
                graph, wanted = graphs[number % len(graphs)]
                captures.replay(graph)
            else:
                continue
            assert points_to(table, wanted)


def test_a_graph_keeps_its_addresses_however_often_the_list_is_sent(captures):
    captured = torch.zeros(3)
    table = TensorList([captured])
    with captures.capture() as graph:
        table.point_to([captured])
    for _ in range(3):
        table.point_to([torch.zeros(3)])
        with captures.capture():
            table.point_to([torch.zeros(3)])
    captures.replay(graph)
    assert points_to(table, captured)


def test_captures_without_end_are_refused_and_a_call_outside_makes_room(captures):
    table, tensor = TensorList([torch.zeros(3)], label="grads"), torch.zeros(3)
    with captures.capture():
        for _ in range(tables.CAPTURES):
            table.point_to([tensor])
        with pytest.raises(RuntimeError, match="grads: a TensorList can be captured 32 times"):
            table.point_to([torch.ones(3)])
        assert table[0] is tensor
    table.point_to([tensor])
    with captures.capture() as graph:
        table.point_to([tensor])
    assert len(graph) == 1


def test_addresses_that_no_graph_sends_are_sent_once(captures, monkeypatch):
    sent = []
    monkeypatch.setattr(TensorList, "_write", lambda table, host: sent.append(host.tolist()))
    tensor, other = torch.zeros(3), torch.zeros(3)
    table = TensorList([tensor])
    for each in (tensor, tensor, other, other):
        table.point_to([each])
    assert sent == [[other.data_ptr()]]


def test_a_list_cannot_be_built_in_a_capture(captures):
    with captures.capture(), pytest.raises(RuntimeError, match="cannot be built while a CUDA gra"):
        TensorList([torch.zeros(3)])


def test_rgp_keeps_the_tables_that_a_graph_reads_and_no_others(captures, triton_kernels):
    rgp = RGP([("w", torch.zeros(8))], percentile=30, alpha=0.1)
    captured, late = torch.rand(8), torch.rand(9)[1:]
    rgp.select([captured], [captured])
    with captures.capture() as graph:
        rgp.select([captured], [captured])
    found = rgp._tables["nat_grads"]
    (table,) = found.tables
    for other in (late, captured.half(), late, captured):
        rgp.select([other], [other])
    # The captured one, and that of the last gradients of another kind.
    assert len(found.tables) == 2 and found.tables[0] is table
    rgp.select([torch.rand(8)], [captured])
    captures.replay(graph)
    assert points_to(table, captured)


@pytest.mark.parametrize("asked", ["cpu", "cuda:1"])
def test_a_capture_is_asked_of_the_device_of_the_tensors(asked, monkeypatch):
    entered = []

    def enter(device):
        entered.append(device)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: len(entered) == 1)
    assert tables.is_capturing(torch.device(asked)) == (asked != "cpu")
    assert entered == ([] if asked == "cpu" else [torch.device(asked)])


# Surroundings that torch lets users set.


def same_as_usual(monkeypatch, choice, surroundings):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    nat, adv = torch.rand(2, 700).unbind()
    wanted = rgp_select([nat, nat], [adv, adv], percentile=[30, 0], alpha=0.1)
    with surroundings:
        found = rgp_select([nat, nat], [adv, adv], percentile=[30, 0], alpha=0.1)
        none = rgp_select([], [], percentile=30, alpha=0.1)
    for mine, usual, empty in zip(found[1:], wanted[1:], none[1:], strict=True):
        assert torch.equal(mine, usual) and mine.dtype == usual.dtype == empty.dtype
    assert torch.equal(found.scores[0], wanted.scores[0])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("choice", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_default_dtype_changes_nothing(dtype, choice, monkeypatch):
    same_as_usual(monkeypatch, choice, default_dtype(dtype))


def test_a_default_device_changes_nothing(monkeypatch):
    same_as_usual(monkeypatch, "reference", torch.device("meta"))
    tensors = [torch.zeros(5000), torch.zeros(3)]
    with torch.device("meta"):
        table, own = (
            TensorList(tensors),
            Workspace(tensors, percentiles=[30, 0], alphas=[0, 0], score="abs"),
        )
        groups = table.plan(own.scores, chunk=4096).groups
    assert table.addresses.tolist() == [tensor.data_ptr() for tensor in tensors]
    assert {t.device.type for t in (*own.results, own.weights, own.state)} == {"cpu"}
    assert [group.chunks.tolist() for group in groups] == [[[0, 0], [0, 1]], [[1, 0]]]


@pytest.mark.parametrize("choice", ["triton", "reference"])
def test_what_is_built_in_inference_mode_serves_outside(choice, monkeypatch):
    monkeypatch.setenv("CURE_FAST_KERNELS", choice)
    weight = torch.zeros(20)
    with torch.inference_mode():
        rgp = RGP([("w", weight)], percentile=30, alpha=0.1)
    for seed in range(3):
        torch.manual_seed(seed)
        nat, adv, grad = torch.rand(3, 20).unbind()
        wanted = grad.clone()
        rgp_mask_([wanted], [nat], [adv], percentile=30, alpha=0.1)
        rgp.mask_([nat], [adv], [grad])
        assert torch.equal(grad, wanted)


# What lists hold.


def test_chunks_cover_every_element_once_without_numpy_tensors_of_no_elements_apart():
    sizes = [1, 0, 4096, 4097, 10_000]
    table = TensorList([torch.zeros(size) for size in sizes])
    plan = table.plan(chunk=4096)
    (group,) = plan.groups
    assert plan.sizes.tolist() == sizes and group.chunks.dtype == torch.int32
    wanted = [[i, c] for i, size in enumerate(sizes) for c in range(-(-size // 4096))]
    assert group.chunks.tolist() == wanted


def test_a_second_plan_of_equal_lists_is_the_first():
    def lists(dtype=torch.float32):
        return TensorList([torch.zeros(4, 3), torch.zeros(2, dtype=dtype)])

    table = lists()
    plan = table.plan(lists(), None, chunk=64)
    assert table.plan(lists(), None, chunk=64) is plan
    for others in ((lists(), lists()), (lists(torch.float16), None), (None, lists())):
        assert table.plan(*others, chunk=64) is not plan
    assert table.plan(lists(), None, chunk=128) is not plan


def test_prepared_calls_look_at_no_tensor_again(monkeypatch, triton_kernels):
    shapes = [(4, 3, 3, 3), (7,), (5, 2)]
    rgp = RGP([(str(s), torch.zeros(s)) for s in shapes], percentile=30, alpha=0.1)
    nat, adv, grads = (TensorList([torch.rand(s) for s in shapes]) for _ in range(3))
    rgp.mask_(nat, adv, grads)
    seen = []
    for module in (layouts, tables):
        for name in ("memory_order", "is_dense"):
            monkeypatch.setattr(module, name, lambda tensor: seen.append(tensor))
    monkeypatch.setattr(
        "cure_fast.kernels.checking.check_tensor", lambda name, t, **k: seen.append(t)
    )
    monkeypatch.setattr("cure_fast.kernels.prepared.memory_order", lambda t: seen.append(t))
    rgp.mask_(nat, adv, grads)
    assert [tensor.shape for tensor in seen] == [(3,)]  # the thresholds


def test_a_tensor_that_has_moved_is_refused_by_name(triton_kernels):
    weight = torch.nn.Parameter(torch.ones(3))
    grads = TensorList([torch.ones(2), weight])
    mask_below_(grads, [torch.ones(2), torch.ones(3)], torch.ones(2))
    weight.data = torch.full((3,), 5.0)
    with pytest.raises(ValueError, match=r"tensors\[1\]: expected a tensor that stays where it"):
        mask_below_(grads, [torch.ones(2), torch.ones(3)], torch.ones(2))
    named = TensorList([weight], names=["fc.bias"])
    weight.data = torch.full((3,), 6.0)
    with pytest.raises(ValueError, match=r"fc\.bias: expected a tensor that stays"):
        mask_below_(named, [torch.ones(3)], torch.ones(1))


def test_other_strides_of_a_dimension_of_one_are_the_same_memory_order():
    first = torch.zeros(4, 3, 1, 1)
    table = TensorList([first])
    other = torch.zeros(4, 3, 1, 1).to(memory_format=torch.channels_last)
    other = other.as_strided((4, 3, 1, 1), (3, 1, 7, 7))
    assert other.stride() != first.stride() and table.point_to([other])


@pytest.mark.parametrize(
    "other",
    [
        [torch.zeros(4)],
        [torch.zeros(3).half()],
        [torch.zeros(6)[::2]],
        [None],
        [7],
        [torch.zeros(3).to_sparse()],
        [torch.zeros(3, device="meta")],
        [],
        [torch.zeros(4)[1:]],
    ],
)
def test_a_list_does_not_take_what_does_not_fit(other):
    first = torch.zeros(3)
    table = TensorList([first])
    assert not table.point_to(other) and table[0] is first and points_to(table, first)


def test_a_workspace_refuses_gaps_and_knows_its_device_without_scores():
    with pytest.raises(ValueError, match=r"tensors\[0\]: expected a tensor whose elements fill"):
        Workspace([torch.zeros(4, 4)[:, :2]], percentiles=[30], alphas=[0.1], score="abs")
    meta = torch.device("meta")
    own = Workspace([torch.zeros(3, device=meta)], percentiles=[0], alphas=[0.1], score="abs")
    assert own.device == own.scores.device == own.scores.addresses.device == meta
