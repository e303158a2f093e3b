"""lower_loops: full tiles without conditions and the rest apart, for any extent and any tile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from guarded_buffers import guarded_buffer
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import target_for
from operator_samples import loops_of, nodes
from tvm import s_tir, te, tirx

from tvm_structured.schedules.loops import PARTITION, lower_loops, partition, tile


def doubled(extent: Any) -> Any:
    x = te.placeholder((extent,), name="x")
    func = te.create_prim_func([x, te.compute((extent,), lambda i: x[i] * 2.0, name="y")], index_dtype_override="int64")
    return s_tir.Schedule(func)


def in_vectors(extent: Any, factor: int) -> Any:
    sch = doubled(extent)
    _, lanes = tile(sch, sch.get_loops(sch.get_sblock("y"))[0], factor)
    sch.vectorize(lanes)
    return lower_loops(sch.mod["main"])


def check(func: Any, extent: int) -> None:
    x, y = guarded_buffer((extent,), "float32"), guarded_buffer((extent,), "float32", at_end=False)
    x[...] = np.arange(extent)
    target = target_for()
    tvm.compile(func.with_attr("global_symbol", "main"), target)["main"](*map(tvm.runtime.from_dlpack, (x, y)))
    np.testing.assert_array_equal(y, 2 * x)


@settings(max_examples=15)
@given(extent=st.integers(1, 200), factor=st.sampled_from([4, 8, 16, 64]))
def test_every_element_is_written_once_whatever_the_tile(extent: int, factor: int) -> None:
    func = in_vectors(extent, factor)
    assert not nodes(func, tirx.IfThenElse)
    check(func, extent)


def test_a_rest_of_13_is_cut_into_powers_of_two() -> None:
    sizes = [int(loop.extent) for loop in loops_of(in_vectors(45, 16), tirx.ForKind.VECTORIZED)]
    assert sizes == [16, 8, 4]  # and one element without a loop


def test_a_tile_that_divides_the_extent_leaves_no_mark() -> None:
    sch = doubled(64)
    outer, inner = tile(sch, sch.get_loops(sch.get_sblock("y"))[0], 16)
    assert all(PARTITION not in sch.get(loop).annotations for loop in (outer, inner))


def test_a_tile_of_a_tile_is_cut_as_well() -> None:
    sch = doubled(1000)
    chunk, rest = tile(sch, sch.get_loops(sch.get_sblock("y"))[0], 256)
    _, lanes = tile(sch, rest, 16)
    sch.parallel(chunk)
    sch.vectorize(lanes)
    func = lower_loops(sch.mod["main"])
    assert not nodes(func, tirx.IfThenElse)
    check(func, 1000)


@pytest.mark.parametrize("extent", [1, 3, 16, 17, 100])
def test_a_symbolic_extent_gets_full_vectors_and_a_loop_for_the_rest(extent: int) -> None:
    n = tirx.Var("n", "int64")
    func = in_vectors(n, 16)
    assert [int(loop.extent) for loop in loops_of(func, tirx.ForKind.VECTORIZED)] == [16]
    assert not nodes(func, tirx.IfThenElse)
    check(func, extent)


def test_a_condition_on_padding_is_cut_out_of_the_loop() -> None:
    x = te.placeholder((30,), name="x")
    padded = te.compute((34,), lambda i: tirx.if_then_else(tirx.all(i >= 2, i < 32), x[i - 2], 0.0), name="y")
    sch = s_tir.Schedule(te.create_prim_func([x, padded], index_dtype_override="int64"))
    partition(sch, *sch.get_loops(sch.get_sblock("y")))
    assert "if_then_else" not in lower_loops(sch.mod["main"]).script()


def test_accumulators_are_placed_on_the_stack() -> None:
    x = te.placeholder((64, 2048), name="x")
    k = te.reduce_axis((0, 64), "k")
    sch = s_tir.Schedule(te.create_prim_func([x, te.compute((2048,), lambda i: te.sum(x[k, i], k), name="y")]))
    tiles, _ = tile(sch, sch.get_loops(sch.get_sblock("y"))[0], 512)
    sch.reverse_compute_at(sch.cache_write(sch.get_sblock("y"), 0, "global"), tiles)
    (allocation,) = nodes(lower_loops(sch.mod["main"]), tirx.AllocBuffer)
    assert allocation.annotations["disable_lower_builtin"]
