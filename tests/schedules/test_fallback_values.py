"""Default schedules compute what their functions compute, for every size, inside of their buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tvm
from guarded_buffers import guarded_buffer
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import runnable_machines, target_for
from operator_samples import CASES, F32, Build, Spec, functions_of, module_of, running_sum
from tvm import relax, tirx

from tvm_structured.schedules.fallback import default_schedule

RNG = np.random.default_rng(0)


def random_array(shape: Sequence[int], dtype: str, at_end: bool) -> np.ndarray:
    array = guarded_buffer(shape, dtype, at_end=at_end)
    values = RNG.standard_normal(shape) if dtype.startswith("float") else RNG.integers(0, 2, shape)
    array[...] = values.astype(dtype)
    return array


def run(func: Any, target: Any, tensors: Sequence[Any]) -> list[np.ndarray]:
    """The buffers after a call."""
    tvm.compile(func.with_attr("global_symbol", "main"), target)["main"](*tensors)
    return [tensor.numpy() for tensor in tensors]


def assert_same(func: Any, target: Any) -> None:
    """The default schedule against the function as it came."""
    scheduled = default_schedule(func, target)
    assert scheduled is not None, "no rule takes the function"
    specs = [([int(extent) for extent in p.shape], str(p.dtype)) for p in func.params]
    arrays = [random_array(shape, dtype, at_end=i % 2 == 0) for i, (shape, dtype) in enumerate(specs)]
    copies = [tvm.runtime.tensor(array) for array in arrays]
    guarded = [tvm.runtime.from_dlpack(array) for array in arrays]  # the very memory
    for actual, expected in zip(run(scheduled, target, guarded), run(func, target, copies), strict=True):
        # rounding of a sum in another order, and of a vectorised exp, relative to the largest element
        scale = np.abs(expected[np.isfinite(expected)].astype("f8")).max(initial=1e-3)
        tolerance = 1e-2 if "float16" in str(specs) else 2e-5
        np.testing.assert_allclose(actual.astype("f8"), expected.astype("f8"), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("name", CASES)
def test_schedule_computes_what_the_function_computes(name: str) -> None:
    build, specs = CASES[name]
    for func in functions_of(build, *specs):
        assert_same(func, target_for())


@pytest.mark.parametrize("machine", runnable_machines())
@pytest.mark.parametrize("name", ["softmax", "attention", "conv_strided", "argmax", "max_pool", "transpose"])
def test_every_class_of_machine_computes_the_same(name: str, machine: str) -> None:
    build, specs = CASES[name]
    for func in functions_of(build, *specs):
        assert_same(func, target_for(machine))


@settings(max_examples=12)
@given(rows=st.integers(1, 20), length=st.integers(1, 300))
def test_softmax_of_any_length_adds_up_to_one(rows: int, length: int) -> None:
    (func,) = functions_of(CASES["softmax"][0], ((rows, length), F32))
    x, y = random_array((rows, length), F32, True), guarded_buffer((rows, length), F32)
    x *= 30
    run(default_schedule(func, target_for()), target_for(), [tvm.runtime.from_dlpack(array) for array in (x, y)])
    expected = np.exp(x.astype("f8") - x.max(-1, keepdims=True))
    np.testing.assert_allclose(y, expected / expected.sum(-1, keepdims=True), rtol=2e-6, atol=1e-12)
    np.testing.assert_allclose(y.sum(-1), 1, rtol=1e-5)


# -- symbolic shapes ------------------------------------------------------------------------------------


def symbolic(build: Build, specs: Sequence[Spec], sizes: Sequence[int]) -> None:
    """One compiled module for all sizes of the dimension "n", each against a module made for that size alone."""
    n, target = tirx.Var("n", "int64"), target_for()

    def compiled(size: Any) -> Any:
        shapes = [([size if extent == "n" else extent for extent in shape], dtype) for shape, dtype in specs]
        return module_of(build, *shapes)

    functions = dict(compiled(n).functions_items())
    for name, func in functions.items():
        if isinstance(func, tirx.PrimFunc):
            functions[name] = default_schedule(func, target)
    mod = tvm.IRModule(functions)
    with target:
        machine = relax.VirtualMachine(tvm.compile(mod, target), tvm.cpu())
        for size in sizes:
            shapes = [([size if extent == "n" else extent for extent in shape], dtype) for shape, dtype in specs]
            inputs = [tvm.runtime.tensor(RNG.standard_normal(shape).astype(dtype)) for shape, dtype in shapes]
            plain = relax.VirtualMachine(tvm.compile(compiled(size), target), tvm.cpu())
            expected = plain["main"](*inputs).numpy()
            np.testing.assert_allclose(machine["main"](*inputs).numpy(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("softmax", [("n", 5, 197)]),
        ("softmax", [(3, 5, "n")]),
        ("layer_norm", [("n", 17, 100), (100,), (100,)]),
        ("mean_of_images", [("n", 70, 7, 7)]),
        ("max_pool", [("n", 9, 33, 35)]),
        ("depthwise", [("n", 17, 28, 31), (17, 1, 3, 3), (17,)]),
        ("conv_grouped", [("n", 6, 11, 35), (10, 3, 3, 3), (10,)]),
        ("attention", [("n", 3, 17, 20), ("n", 3, 33, 20), ("n", 3, 33, 20)]),
        ("attention", [(1, 3, "n", 20), (1, 3, "n", 20), (1, 3, "n", 20)]),
        ("matmul", [("n", 70), (70, 130)]),
        ("product_of_rows", [(2, "n", 64), (2, "n", 64)]),
        ("concat", [("n", 19, 33), ("n", 5, 33)]),
        ("gelu", [("n", 100)]),
        ("split_heads", [(2, 33, 60)]),
    ],
)
def test_one_schedule_serves_every_size(name: str, shapes: Sequence[Sequence[Any]]) -> None:
    symbolic(CASES[name][0], [(shape, F32) for shape in shapes], (1, 3, 70))


def test_loops_written_by_hand_run_in_their_order() -> None:
    scheduled = default_schedule(running_sum, target_for())
    x, y = random_array((64, 900), F32, True), guarded_buffer((64, 900), F32)
    run(scheduled, target_for(), [tvm.runtime.from_dlpack(array) for array in (x, y)])
    np.testing.assert_allclose(y, np.cumsum(x, 1, dtype="f4"), rtol=1e-4, atol=1e-4)
