"""Default schedules of elementwise functions whose conditions depend on several loops."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import te, tirx

from tvm_structured.schedules import injective
from tvm_structured.schedules.loops import lower_loops
from tvm_structured.targets import resolve_target

TARGET = resolve_target("host")


def patches_func(
    channels: int, height: int, width: int, kernel: int, stride: int, padding: int, blocks: bool
) -> tvm.ir.BaseFunc:
    """Patches of an image, (channel, tap) as one axis: three conditions, each on a tap and an output position."""
    rows, columns = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
    depth = channels * kernel * kernel
    x = te.placeholder((1, channels, height, width), "float32", "x")

    def at(k: tirx.PrimExpr, i: tirx.PrimExpr, j: tirx.PrimExpr) -> tirx.PrimExpr:
        y, z = i * stride + k // kernel % kernel - padding, j * stride + k % kernel - padding
        inside = tirx.all(y >= 0, y < height, z >= 0, z < width)
        return tirx.if_then_else(inside, x[0, k // (kernel * kernel), y, z], tirx.const(0, "float32"))

    if blocks:

        def block(b: tirx.PrimExpr, i: tirx.PrimExpr, j: tirx.PrimExpr, lane: tirx.PrimExpr) -> tirx.PrimExpr:
            k = b * 8 + lane
            return tirx.if_then_else(k < depth, at(k, i, j), tirx.const(0, "float32"))

        out = te.compute((-(-depth // 8), rows, columns, 8), block, "y")
    else:
        out = te.compute((depth, rows, columns), at, "y")
    return te.create_prim_func([x, out])


def patches(x: np.ndarray, kernel: int, stride: int, padding: int, blocks: bool) -> np.ndarray:
    padded = np.pad(x[0], ((0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), (1, 2))[:, ::stride, ::stride]
    found = windows.transpose(0, 3, 4, 1, 2).reshape(-1, *windows.shape[1:3])
    if not blocks:
        return found
    found = np.pad(found, ((0, -len(found) % 8), (0, 0), (0, 0)))
    return found.reshape(-1, 8, *found.shape[1:]).transpose(0, 2, 3, 1)


@settings(max_examples=25)
@given(
    st.integers(1, 3), st.integers(7, 24), st.integers(7, 24), st.integers(1, 7), st.integers(1, 3), st.integers(0, 3),
    st.booleans(),
)  # fmt: skip
def test_conditions_on_two_loops_cut_one(
    channels: int, height: int, width: int, kernel: int, stride: int, padding: int, blocks: bool
) -> None:
    check(channels, height, width, kernel, stride, padding, blocks)


@pytest.mark.parametrize("blocks", [False, True])
def test_the_first_layer_of_a_residual_network(blocks: bool) -> None:
    check(3, 21, 18, 7, 2, 3, blocks)


def check(channels: int, height: int, width: int, kernel: int, stride: int, padding: int, blocks: bool) -> None:
    func = patches_func(channels, height, width, kernel, stride, padding, blocks)
    schedule = injective.apply(func.with_attr("global_symbol", "main"), TARGET)
    assert schedule is not None
    library = tvm.compile(tvm.IRModule({"main": lower_loops(schedule.mod["main"])}), target=TARGET)
    x = np.random.default_rng(0).standard_normal((1, channels, height, width)).astype(np.float32)
    expected = patches(x, kernel, stride, padding, blocks)
    y = tvm.runtime.tensor(np.full(expected.shape, np.nan, np.float32))
    library["main"](tvm.runtime.tensor(x), y)
    np.testing.assert_array_equal(y.numpy(), expected)
