from __future__ import annotations

import logging
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cure_fast.errors import InputError
from cure_fast.models import build_model
from cure_fast.models.weights import load_into, read_metadata, read_weights, save_weights

SUFFIXES = (".safetensors", ".pt")


def small(*, num_classes=4, width=2, name="resnet-small", **options):
    return build_model(name, num_classes=num_classes, width=width, **options)


def write(folder, suffix):
    """Write the weights of a model in the format of the suffix; return the file and the model."""
    model, file = small(), folder / f"weights{suffix}"
    if suffix == ".safetensors":
        save_weights(model, file, {})
    else:
        torch.save(model.state_dict(), file)
    return file, model


def saved(folder, content):
    torch.save(content, folder / "file.pt")
    return folder / "file.pt"


def assert_same(weights, model):
    own = model.state_dict()
    assert list(weights) == list(own)
    for name, tensor in weights.items():
        assert torch.equal(tensor, own[name])
        assert tensor.dtype == own[name].dtype


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["resnet-small", "preactresnet18", "wrn28-10"])
def test_round_trip(tmp_path, name):
    model, other = small(name=name, width=1), small(name=name, width=1)
    images = torch.rand(6, 3, 8, 8)
    model(images)  # moves the running statistics away from their start
    file = tmp_path / "model.safetensors"
    save_weights(model, file, {"recipe": "quickstart", "note": "Größe"})
    weights = read_weights(file)
    assert weights.keys() == model.state_dict().keys()
    load_into(other, weights, source=str(file))
    assert_same(other.state_dict(), model)
    assert other.get_parameter("conv1.weight").is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.eval()(images), other.eval()(images))
    assert read_metadata(file) == {"recipe": "quickstart", "note": "Größe"}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_run_folder_stands_for_its_weights(tmp_path):
    model = small()
    save_weights(model, tmp_path / "model.safetensors", {"epoch": "3"})
    load_into(small(), read_weights(tmp_path), source="run")
    assert read_weights(str(tmp_path)).keys() == model.state_dict().keys()
    assert read_metadata(tmp_path) == {"epoch": "3"}


def test_no_metadata(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "plain.safetensors")
    assert read_metadata(tmp_path / "plain.safetensors") == {}


def test_tensors_that_share_memory_are_stored_apart(tmp_path):
    model = small()
    first = model.get_parameter("layer1.0.bn1.weight")
    model.get_submodule("layer1.0.bn2").register_parameter("weight", first)
    save_weights(model, tmp_path / "model.safetensors", {})
    weights = read_weights(tmp_path)
    assert weights["layer1.0.bn1.weight"].data_ptr() != weights["layer1.0.bn2.weight"].data_ptr()


@pytest.mark.parametrize("failing", ["os.replace", "os.fsync", "safetensors.torch.save"])
def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch, failing):
    file, _ = write(tmp_path, ".safetensors")
    before = file.read_bytes()

    def fail(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        with pytest.raises(OSError, match="No space left"):
            save_weights(small(), file, {})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_write_into_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_weights(small(), tmp_path / "absent" / "model.safetensors", {})


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "_orig_mod."])
def test_wrappers_and_prefixes(tmp_path, wrapper, prefix):
    model = small()
    state = OrderedDict((prefix + name, tensor) for name, tensor in model.state_dict().items())
    content = state if wrapper is None else {"epoch": 3, "lr": 0.1, wrapper: state}
    assert_same(read_weights(saved(tmp_path, content)), model)


@pytest.mark.parametrize("suffix", [".pth", ".tar", ".pth.tar", ""])
def test_any_name_of_a_torch_file(tmp_path, suffix):
    file, model = write(tmp_path, ".pt")
    assert_same(read_weights(file.rename(tmp_path / f"best{suffix}")), model)


def test_old_torch_format(tmp_path):
    model = small()
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(read_weights(tmp_path / "old.pt"), model)


def test_parameters_come_as_tensors_without_gradient(tmp_path):
    weights = read_weights(saved(tmp_path, {"weight": torch.nn.Parameter(torch.ones(2))}))
    assert not weights["weight"].requires_grad
    assert type(weights["weight"]) is torch.Tensor


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("part", [0, 0.5, 0.999, "one byte"])
def test_truncated(tmp_path, suffix, part):
    file, _ = write(tmp_path, suffix)
    whole = file.read_bytes()
    size = 1 if part == "one byte" else int(part * len(whole))
    file.write_bytes(whole[:size])
    with pytest.raises(InputError, match=r"weights\.\w+: .*(empty|cut short).*again"):
        read_weights(file)


@pytest.mark.parametrize("part", [0, 0.5, 0.999])
def test_metadata_of_a_truncated_file(tmp_path, part):
    file, _ = write(tmp_path, ".safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(InputError, match="again"):
        read_metadata(file)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(suffix=st.sampled_from(SUFFIXES), data=st.data())
def test_any_cut_and_any_bytes_are_refused(tmp_path, suffix, data):
    file, _ = write(tmp_path, suffix)
    whole = file.read_bytes()
    cut = st.integers(0, len(whole) - 1).map(lambda size: whole[:size])
    file.write_bytes(data.draw(st.one_of(cut, st.binary(max_size=300)), label="content"))
    with pytest.raises(InputError, match=r"weights"):
        read_weights(file)


def test_hostile_pickle_is_not_executed(tmp_path):
    marker = tmp_path / "executed"
    payload = Payload(marker)
    files = {
        "zip": saved(tmp_path, {"state_dict": small().state_dict(), "extra": payload}),
        "bare": tmp_path / "bare.pt",
        "old": tmp_path / "old.pt",
        "renamed": tmp_path / "renamed.safetensors",
    }
    files["bare"].write_bytes(pickle.dumps(payload))
    torch.save(payload, files["old"], _use_new_zipfile_serialization=False)
    files["renamed"].write_bytes(pickle.dumps(payload))
    for file in files.values():
        with pytest.raises(InputError, match=r"pickled Python objects|not a complete safetensors"):
            read_weights(file)
    assert not marker.exists()
    # The payload does act where it is let.
    torch.load(files["zip"], weights_only=False)
    assert marker.exists()


def test_pickled_model_is_named(tmp_path):
    with pytest.raises(InputError, match=r"Linear\).*refused and nothing was run.*state_dict\(\)"):
        read_weights(saved(tmp_path, torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page"),
        (b"\xef\xbb\xbf\r\n<HTML>quota exceeded</HTML>", "a web page"),
        (b"version https://git-lfs.invalid/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
        (b'{"message": "not found"}', "something else"),
        (b"hello world\n" * 10, "something else"),
    ],
)
def test_other_files(tmp_path, suffix, content, message):
    file = tmp_path / f"download{suffix}"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_weights(file)


def test_absent_files(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.pt: cannot be opened \(No such file"):
        read_weights(tmp_path / "nothing.pt")
    with pytest.raises(InputError, match=r"has no model\.safetensors.*a run that has finished"):
        read_weights(tmp_path)
    with pytest.raises(InputError, match="cannot be opened"):
        read_weights("a\0b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        read_weights(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "got list"),
        (torch.ones(2), "got Tensor"),
        ({}, "without entries"),
        ({"state_dict": {}}, "without entries"),
        ({"epoch": 3, "optimizer": {"lr": 0.1}}, "'epoch' is a int"),
        ({"state_dict": {"weight": 3.0}}, "'weight' is a float"),
        ({1: torch.ones(2)}, "1 is a Tensor"),
        ({"weight": torch.ones(2).to_sparse()}, "weight is not a dense tensor"),
        ({"weight": torch.ones(2, device="meta")}, "weight is not a dense tensor"),
        ({"module.w": torch.ones(1), "w": torch.zeros(1)}, "two sets of weights"),
    ],
)
def test_torch_files_of_something_else(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_weights(saved(tmp_path, content))


def assert_refused(model, weights, message):
    """Assert that loading is refused with the message and leaves the model as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_into(model, weights, source="best.pt")
    assert_same(before, model)


def test_missing_and_unexpected_keys_are_named():
    weights = small().state_dict()
    weights["extra.weight"] = weights.pop("linear.bias")
    assert_refused(
        small(), weights, r"^best\.pt: .*Missing from them: linear\.bias\. Not in .*extra\.wei"
    )
    assert_refused(small(), {}, r"Missing from them: conv1\.weight, bn1\.weight, .* and \d+ more\.")
    assert_refused(small(name="resnet18"), small().state_dict(), "another architecture")


def test_other_number_of_classes_is_said():
    weights = small(num_classes=7).state_dict()
    assert_refused(
        small(), weights, r"linear\.weight \[7, 8\] instead of \[4, 8\].*7 classes.*model 4:"
    )


@pytest.mark.parametrize("name", ["resnet-small", "wrn28-10"])
def test_other_width_is_said(name):
    weights = small(name=name, width=3).state_dict()
    assert_refused(
        small(name=name), weights, "more.* Their width is 3, the model's 2: pass --width 3."
    )


def test_other_stem_is_said():
    weights = small(name="resnet18", stem="imagenet").state_dict()
    assert_refused(
        small(name="resnet18"),
        weights,
        r"conv1\.weight .* first convolution is 7x7: choose the other --stem",
    )


def test_other_shape_alone():
    weights = small().state_dict()
    weights["layer1.0.bn1.bias"] = torch.zeros(3)
    assert_refused(small(), weights, r"instead of \[2\]\.$")
    weights["linear.weight"] = torch.zeros(3)
    assert_refused(small(), weights, r"linear\.weight \[3\] instead of \[4, 8\]\.$")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(value):
    weights = small().state_dict()
    weights["layer3.0.bn1.running_var"][1] = value
    assert_refused(
        small(), weights, r"layer3\.0\.bn1\.running_var holds values that are not finite"
    )


def test_weights_too_large_for_the_model():
    weights = small().state_dict()
    weights["linear.bias"] = torch.full((4,), 1e300, dtype=torch.float64)
    assert_refused(small(), weights, r"linear\.bias holds values that are not finite")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_of_another_kind_of_number(dtype):
    weights = small().state_dict()
    weights["linear.bias"] = torch.ones(4, dtype=dtype)
    assert_refused(small(), weights, rf"linear\.bias has dtype {dtype}, expected torch\.float32")


def test_half_precision_weights_become_the_models():
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in small().state_dict().items()
    }
    model = small()
    load_into(model, weights, source="half.pt")
    loaded = model.get_parameter("conv1.weight")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, weights["conv1.weight"].float())


def test_unused_group_of_published_wide_resnets_is_left_out(caplog):
    model, other = (small(name="wrn34-10") for _ in range(2))
    published = model.state_dict()
    first_group = {n: t for n, t in published.items() if n.startswith("block1.")}
    published |= {f"sub_{name}": tensor.clone() for name, tensor in first_group.items()}
    assert len(published) == 252
    with caplog.at_level(logging.WARNING):
        load_into(other, published, source="trades.pt")
    assert_same(other.state_dict(), model)
    assert "trades.pt: left out 61 tensors of sub_block1" in caplog.text


@pytest.mark.parametrize("key", ["sub_block2.weight", "sub_block10.weight", "block1.sub_block1.w"])
def test_only_the_unused_group_is_left_out(key):
    model = small(name="wrn28-10", width=1)
    assert_refused(model, model.state_dict() | {key: torch.zeros(1)}, f"Not in the model: {key}")


def test_unused_group_is_refused_by_other_models():
    model = small()
    assert_refused(
        model, model.state_dict() | {"sub_block1.w": torch.zeros(1)}, "Not in the model: sub_"
    )
