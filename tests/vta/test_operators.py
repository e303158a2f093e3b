"""What the integer operators mean: equal to PyTorch in float64, and refused where 32 bits would not do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_structured.errors import VTAError
from tvm_structured.structures import BlockCirculant
from tvm_structured.vta.operators import (
    Int8Add,
    Int8AvgPool,
    Int8BlockDiagonal,
    Int8Chain,
    Int8Conv2d,
    Int8Conv2dTranspose,
    Int8Dense,
    Int8MaxPool,
    Int8Rescale,
    Int8StructuredDense,
    Joined,
    Requantize,
    Scale,
)

rng = np.random.default_rng(0)


def int8(*shape: int) -> np.ndarray:
    return rng.integers(-128, 128, shape).astype(np.int8)


def biases(count: int) -> np.ndarray:
    return rng.integers(-9999, 9999, count).astype(np.int32)


def rounded(values: Any, shift: int) -> Any:
    """Round half up of values / 2^shift, in float64: exact for what 32 bits hold."""
    return np.floor(np.asarray(values, np.float64) / 2.0**shift + (0.5 if shift else 0.0))


def finished(acc: Any, q: Requantize) -> np.ndarray:
    acc = np.asarray(acc, np.float64)
    factor = np.asarray(q.multiplier, np.float64).reshape(-1, *[1] * (acc.ndim - 2))
    return np.clip(rounded(rounded(acc, q.pre_shift) * factor, q.shift), q.low, q.high).astype(np.int8)


def tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float64))


@pytest.mark.parametrize(("n", "inner", "out"), [(1, 1, 1), (3, 37, 19), (2, 300, 65)])
def test_dense_is_a_product_with_multipliers_of_each_channel(n: int, inner: int, out: int) -> None:
    q = Requantize(4, rng.integers(1, 200, out).astype(np.int32), 11, -100, 101)
    layer = Int8Dense(int8(out, inner), biases(out), q)
    x = int8(n, inner)
    acc = x.astype(np.int64) @ layer.weight.T.astype(np.int64) + layer.bias
    np.testing.assert_array_equal(layer.reference(x), finished(acc, q))


geometry = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2)
)


@settings(max_examples=40)
@given(geometry, st.integers(3, 9), st.integers(3, 9))
def test_conv2d_is_that_of_torch(g: tuple[int, ...], height: int, width: int) -> None:
    kh, kw, sh, sw, pad, groups = g
    layer = Int8Conv2d(
        int8(6, 4 // groups, kh, kw), biases(6), Requantize(shift=8), stride=(sh, sw), padding=(pad,) * 4, groups=groups
    )
    x = int8(2, 4, height, width)
    acc = torch.conv2d(tensor(x), tensor(layer.weight), tensor(layer.bias), stride=(sh, sw), padding=pad, groups=groups)
    np.testing.assert_array_equal(layer.reference(x), finished(acc, layer.requantize))


@settings(max_examples=40)
@given(geometry, st.integers(3, 7), st.integers(3, 7), st.integers(0, 2))
def test_conv2d_transpose_is_that_of_torch(g: tuple[int, ...], height: int, width: int, more: int) -> None:
    kh, kw, sh, sw, pad, groups = g
    pad, output_padding = min(pad, kh - 1, kw - 1), min(more, sh - 1, sw - 1)
    layer = Int8Conv2dTranspose(
        int8(4, 6 // groups, kh, kw),
        biases(6),
        Requantize(shift=8),
        stride=(sh, sw),
        padding=(pad,) * 4,
        output_padding=(output_padding,) * 2,
        groups=groups,
    )
    x = int8(2, 4, height, width)
    acc = torch.nn.functional.conv_transpose2d(
        tensor(x), tensor(layer.weight), tensor(layer.bias), (sh, sw), pad, output_padding, groups
    )
    np.testing.assert_array_equal(layer.reference(x), finished(acc, layer.requantize))


def test_padding_may_differ_on_every_side() -> None:
    layer = Int8Conv2d(int8(5, 3, 2, 3), None, Requantize(shift=9), padding=(0, 1, 2, 3))
    x = int8(1, 3, 6, 7)
    wide = torch.nn.functional.pad(tensor(x), (1, 3, 0, 2))
    np.testing.assert_array_equal(
        layer.reference(x), finished(torch.conv2d(wide, tensor(layer.weight)), layer.requantize)
    )


def test_pooling_is_that_of_torch() -> None:
    x = int8(2, 5, 11, 9)
    highest = Int8MaxPool((3, 3), (2, 2), (1, 1, 1, 1))
    np.testing.assert_array_equal(highest.reference(x), torch.max_pool2d(tensor(x), 3, 2, 1).numpy().astype(np.int8))
    mean = Int8AvgPool.mean((11, 9))
    true = x.astype(np.float64).mean(axis=(2, 3), keepdims=True)
    assert np.abs(mean.reference(x) - true).max() <= 0.51  # rounding, and the multiplier's own
    wide = Int8AvgPool((3, 2), (2, 1), (1, 0, 1, 1), scale=Scale(10923, 16))
    total = torch.nn.functional.avg_pool2d(
        torch.nn.functional.pad(tensor(x), (0, 1, 1, 1)), (3, 2), (2, 1), divisor_override=1
    )
    np.testing.assert_array_equal(wide.reference(x), rounded(total.numpy() * 10923, 16))


def test_a_residual_is_scaled_and_added_before_the_clip() -> None:
    layer = Int8Dense(int8(8, 16), None, Requantize(shift=6, low=0), Scale(77, 5))
    x, r = int8(4, 16), int8(4, 8)
    acc = rounded(x.astype(np.int64) @ layer.weight.T.astype(np.int64), 6) + rounded(r.astype(np.int64) * 77, 5)
    np.testing.assert_array_equal(layer.reference(x, r), np.clip(acc, 0, 127))


@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize(("shift", "last"), [(9, 6), (6, 6), (6, 0), (0, 0)])
def test_a_joined_residual_is_rounded_with_the_sum(rounds: bool, shift: int, last: int) -> None:
    q = Requantize(0, rng.integers(1, 9, 8).astype(np.int32), shift, rounds=rounds)
    layer = Int8Dense(int8(8, 16), biases(8), q, Joined(-77, last))
    x, r = int8(40, 16), int8(40, 8)
    acc = (x.astype(np.int64) @ layer.weight.T.astype(np.int64) + layer.bias) * np.asarray(q.multiplier)
    whole = acc / 2.0**shift + r * -77.0 / 2.0**last
    exact = np.clip(np.floor(whole + (0.5 if rounds and shift else 0.0)), -128, 127)
    np.testing.assert_array_equal(layer.reference(x, r), exact)
    a = Int8Add(Scale(3, 1), Scale(-5, 2), -50, 50)
    total = rounded(r.astype(np.int64) * 3, 1) + rounded(r.astype(np.int64) * -5, 2)
    np.testing.assert_array_equal(a.reference(r, r), np.clip(total, -50, 50))
    np.testing.assert_array_equal(Int8Rescale(Scale(3, 1), 0).reference(r), np.clip(rounded(r * 3.0, 1), 0, 127))


def test_block_diagonal_factors_are_their_dense_matrix() -> None:
    for shared in (1, 6):
        factor = Int8BlockDiagonal(
            int8(shared, 4, 5), biases(24), Requantize(shift=7), None, "f", 6, rng.permutation(30), rng.permutation(24)
        )
        x = int8(3, 30)
        whole = Int8Dense(factor.dense(), factor.bias, factor.requantize)
        np.testing.assert_array_equal(factor.reference(x), whole.reference(x))
        np.testing.assert_array_equal(factor.weight_sums(), whole.weight_sums())
        last = Int8Dense(int8(7, 24), None, Requantize(shift=8))
        np.testing.assert_array_equal(Int8Chain((factor, last)).reference(x), last.reference(whole.reference(x)))


def test_a_structured_layer_is_its_expanded_weight() -> None:
    structure = BlockCirculant((13, 21), 1, int8(4, 6, 4))
    layer = Int8StructuredDense(structure, biases(13), Requantize(shift=7))
    x = int8(2, 21)
    dense = Int8Dense(structure.dense(), layer.bias, layer.requantize)
    np.testing.assert_array_equal(layer.reference(x), dense.reference(x))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Int8Dense(np.ones((2, 2), np.int32)), "layer: weight is int32"),
        (lambda: Int8Dense(int8(2, 3), np.zeros(3, np.int32)), r"bias .* shape \(2\)"),
        (lambda: Int8Dense(int8(2, 3), None, Requantize(multiplier=1 << 30), name="fc"), "fc: the product"),
        (lambda: Int8Dense(int8(2, 3), np.full(2, 2**31 - 1, np.int32), name="fc"), "fc: the sum"),
        (lambda: Int8Dense(int8(2, 3), None, Requantize(multiplier=np.ones(3, np.int32))), "3 multipliers for 2"),
        (lambda: Requantize(shift=32), "shift=32"),
        (lambda: Int8Dense(int8(2, 3), None, Requantize(shift=5), Joined(64, 6), "fc"), "fc: the residual joins"),
        (lambda: Requantize(low=3, high=2), "low=3"),
        (lambda: Requantize(multiplier=1.5), "multiplier of type float64"),  # type: ignore[arg-type]
        (lambda: Scale(1 << 15), "multiplier=32768"),
        (lambda: Int8Conv2d(int8(3, 1, 1, 1), groups=2), "3 output channels in 2"),
        (lambda: Int8Conv2d(int8(3, 1, 1, 1), stride=(0, 1)), "stride"),
        (lambda: Int8Conv2d(int8(3, 1, 3, 3)).reference(int8(1, 1, 2, 5)), "larger than the input"),
        (lambda: Int8Conv2d(int8(3, 1, 3, 3)).reference(int8(1, 2, 5, 5)), "1 channels"),
        (lambda: Int8Dense(int8(2, 3)).reference(np.zeros((1, 3), np.float32)), "input 0 is float32"),  # type: ignore[arg-type]
        (lambda: Int8Dense(int8(2, 3)).reference(int8(0, 3)), "none of them 0"),
        (lambda: Int8Add().reference(int8(2, 3), int8(3, 2)), "expected equal"),
        (lambda: Int8Chain(()), "at least one factor"),
        (lambda: Int8Chain((Int8Dense(int8(2, 3)), Int8Dense(int8(2, 3)))), "3 channels"),
        (lambda: Int8BlockDiagonal(int8(1, 2, 2), groups=2, in_order=np.zeros(4, np.int64)), "no permutation"),
        (lambda: Int8Conv2dTranspose(int8(1, 1, 1, 1), padding=(1, 1, 1, 1)).reference(int8(1, 1, 2, 2)), "leaves"),
    ],
)
def test_what_cannot_be_is_refused(build: Any, words: str) -> None:
    with pytest.raises(VTAError, match=words):
        build()
