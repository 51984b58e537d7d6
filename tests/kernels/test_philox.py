"""Philox: published vectors, kernels against PyTorch, independence of streams, bad input."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from cure_fast.kernels import philox
from cure_fast.kernels.device.launching import Launch
from cure_fast.kernels.device.philox import normal, uniform
from cure_fast.kernels.philox import philox_normal, philox_uniform, philox_words, step_tensor


# Known answers that come with Random123, the authors' library: counter and key -> words.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_words_are_the_published_ones(counter, key, expected):
    words = philox_words(key, (torch.tensor(counter[0]), *counter[1:]))
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def python_words(seed, counter):
    """Philox in Python's integers, one counter at a time."""
    c, k = list(counter), [seed % 2**32, seed // 2**32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b // 2**32 ^ c[1] ^ k[0], b % 2**32, a // 2**32 ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


words32, steps, seeds = (st.integers(0, 2**bits - 1) for bits in (32, 63, 64))


@given(seed=seeds, index=words32, step=steps, stream=words32, on_device=st.booleans())
def test_numbers_are_those_of_python_integers(seed, index, step, stream, on_device):
    first, second, _, _ = python_words(seed, (index, step % 2**32, step // 2**32, stream))
    step = torch.tensor(step) if on_device else step
    u = philox_uniform(seed, torch.tensor([index]), step, stream=stream)
    assert u.dtype == torch.float32
    assert u.item() == first // 256 / 2**24
    radius = np.sqrt(-2 * np.log(1 - first // 256 / 2**24))
    n = philox_normal(seed, torch.tensor([index]), step, stream=stream)
    # float32: 2 * pi * u is off by 2**-22 of a radian at most, the radius is 5.8 at most.
    assert n.item() == pytest.approx(radius * np.cos(2 * np.pi * (second // 256) / 2**24), abs=2e-6)


@triton.jit
def drawing_kernel(out, seed, step, first, STREAM: tl.constexpr, NORMAL: tl.constexpr):
    """Write 64 numbers, of the indices from ``first``."""
    i = tl.arange(0, 64)
    if NORMAL:
        tl.store(out + i, normal(seed, first + i, tl.load(step), STREAM))
    else:
        tl.store(out + i, uniform(seed, first + i, tl.load(step), STREAM))


def drawn_by_kernel(seed, step, first, stream, *, gaussian=False):
    out = torch.empty(64)
    constants = {"STREAM": stream, "NORMAL": gaussian}
    step = step_tensor(step, out.device)
    Launch(drawing_kernel, 1, out.device, (out, seed, step, first), constants).run()
    return out


@settings(max_examples=30)
@given(
    seed=seeds,
    step=steps,
    first=st.integers(0, 2**31 - 65),
    stream=words32,
    on_device=st.booleans(),
)
def test_kernels_draw_the_same_numbers(seed, step, first, stream, on_device):
    step = torch.tensor(step) if on_device else step
    index = first + torch.arange(64)
    u = drawn_by_kernel(seed, step, first, stream)
    assert torch.equal(u, philox_uniform(seed, index, step, stream=stream))
    n = drawn_by_kernel(seed, step, first, stream, gaussian=True)
    # Cosine of the kernel within 3e-7, times a radius of 5.8 at most.
    expected = philox_normal(seed, index, step, stream=stream)
    torch.testing.assert_close(n, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("step", [0, 1, 2**31, 2**32, 2**63 - 1])
def test_kernels_take_seeds_and_steps_of_any_width(seed, step):
    """Triton passes 1 as a constant, and chooses an integer's width by its value."""
    expected = philox_uniform(seed, torch.arange(64), step, stream=5)
    assert torch.equal(drawn_by_kernel(seed, step, 0, 5), expected)


def test_numbers_are_uniform_and_normal():
    index = torch.arange(2**16)
    u = philox_uniform(7, index, stream=philox.START)
    n = philox_normal(7, index, stream=philox.START)
    assert 0 <= u.min() and u.max() < 1
    # Kolmogorov and Smirnov's distance is below 1.95 / sqrt(count) in 999 of 1000 cases.
    ranks = torch.arange(2**16) / 2**16
    assert (u.sort().values - ranks).abs().max() < 1.95 / 2**8
    normal_cdf = torch.special.ndtr(n.double()).sort().values
    assert (normal_cdf - ranks).abs().max() < 1.95 / 2**8


@pytest.mark.parametrize("change", [{"seed": 8}, {"step": 1}, {"step": 2**32}, {"stream": 3}])
def test_other_seeds_steps_and_streams_are_unrelated(change):
    key = {"seed": 7, "step": 0, "stream": 2}
    index = torch.arange(2**14)
    one = philox_normal(key["seed"], index, key["step"], stream=key["stream"])
    key |= change
    other = philox_normal(key["seed"], index, key["step"], stream=key["stream"])
    # The correlation of independent numbers has the standard deviation 2**-7.
    assert abs(torch.corrcoef(torch.stack((one, other)))[0, 1]) < 4 * 2**-7


def test_the_step_is_read_and_not_advanced():
    step = torch.tensor(5)
    again = philox_uniform(3, torch.arange(4), step, stream=1)
    assert step == 5
    assert torch.equal(again, philox_uniform(3, torch.arange(4), 5, stream=1))


def kernels_with_a_seed():
    """Return the kernels that are launched with a seed, by name."""
    found = {}
    for path in sorted(Path(philox.__file__).with_name("device").glob("*.py")):
        module = importlib.import_module(f"cure_fast.kernels.device.{path.stem}")
        for name, value in vars(module).items():
            if name.endswith("_kernel") and "seed" in value.arg_names:
                found[name] = value
    return found


@pytest.mark.parametrize("name", ["_coin_kernel", "init_l2_kernel", "init_linf_kernel"])
def test_a_seed_is_not_compiled_into_a_kernel(name):
    """Triton compiles anew for an integer that is 1 or a multiple of 16 unless it is told."""
    found = kernels_with_a_seed()
    assert set(found) == {"_coin_kernel", "init_l2_kernel", "init_linf_kernel"}
    kernel = found[name]
    options = getattr(kernel, "kwargs", vars(kernel))  # as Triton's interpreter keeps them, or not
    assert "seed" in (options["do_not_specialize"] or ())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seed": -1}, ValueError, r"seed: expected an int in \[0, 2\*\*64\), got -1"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"seed": 1.0}, TypeError, "seed: .*float"),
        ({"seed": True}, TypeError, "seed: .*bool"),
        ({"step": -1}, ValueError, "step"),
        ({"step": 2**63}, ValueError, "step"),
        ({"step": 0.5}, TypeError, "step"),
        ({"step": torch.tensor(1.0)}, TypeError, "step: .*float32"),
        ({"step": torch.tensor(1, dtype=torch.int32)}, TypeError, "step: .*int32"),
        ({"step": torch.tensor([1])}, ValueError, "step: expected a 0-d tensor"),
        ({"step": torch.tensor(1, device="meta")}, ValueError, "step: .*meta"),
        ({"stream": 2**32}, ValueError, "stream"),
        ({"index": torch.rand(2)}, TypeError, "index: .*float32"),
        ({"index": [1, 2]}, TypeError, "index: .*list"),
    ],
)
@pytest.mark.parametrize("draw", [philox_uniform, philox_normal])
def test_bad_arguments_are_refused(draw, changes, error, message):
    arguments = {"seed": 0, "index": torch.arange(3), "step": 0, "stream": 1} | changes
    with pytest.raises(error, match=message):
        draw(**arguments)
