"""Arithmetic instead of libm: as exact as promised over the whole range, and vectors in the machine code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import runnable_machines, target_for
from scipy.special import erf, expit
from tvm import te, tirx

from tvm_structured.schedules.producers import open_schedule
from tvm_structured.schedules.vector_math import POWERS, with_vector_math

TOLERANCE = 4e-7  # relative; float32 resolves 1.2e-7
TINY = np.finfo("f4").tiny  # below it, float32 has fewer digits
COUNT = 4096

FUNCTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "exp": (tirx.exp, np.exp),
    "log": (tirx.log, np.log),
    "tanh": (tirx.tanh, np.tanh),
    "erf": (tirx.erf, erf),
    "sigmoid": (tirx.sigmoid, expit),
}
RANGES: dict[str, np.ndarray] = {
    "everywhere": np.linspace(-104, 89, COUNT),
    "unit": np.linspace(-1, 1, COUNT),
    "ten": np.linspace(-10, 10, COUNT),
    "small": np.concatenate([sign * 10.0 ** np.linspace(-37, 0, COUNT // 2) for sign in (1, -1)]),
    "large": np.concatenate([sign * 10.0 ** np.linspace(0, 38, COUNT // 2) for sign in (1, -1)]),
}
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 1e-40, -1e-40, 88.72, 88.8, -87.4, -103.5, -104.5]


def elementwise(function: Callable[[Any], Any], dtype: str = "float32") -> Any:
    x = te.placeholder((COUNT,), dtype, name="x")
    return te.create_prim_func([x, te.compute((COUNT,), lambda i: function(x(i)), name="y")])


@functools.cache
def compiled(name: str, machine: str) -> Any:
    return tvm.compile(with_vector_math(elementwise(FUNCTIONS[name][0])), target_for(machine))


def evaluate(name: str, values: Any, machine: str = "host") -> np.ndarray:
    x = np.resize(np.asarray(values, "f4"), COUNT)
    y = tvm.runtime.tensor(np.zeros(COUNT, "f4"))
    compiled(name, machine)["main"](tvm.runtime.tensor(x), y)
    return y.numpy()[: np.size(values)]


def exact(name: str, values: Any) -> np.ndarray:
    """The float64 value at these float32 arguments, rounded to float32."""
    with np.errstate(all="ignore"):
        return FUNCTIONS[name][1](np.asarray(values, "f4").astype("f8")).astype("f4")


@pytest.mark.parametrize("machine", runnable_machines())
@pytest.mark.parametrize("area", RANGES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_relative_error_is_a_few_units_in_the_last_place(name: str, area: str, machine: str) -> None:
    values = np.abs(RANGES[area]) if name == "log" else RANGES[area]
    values = values[values != 0]
    np.testing.assert_allclose(evaluate(name, values, machine), exact(name, values), TOLERANCE, TINY)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_infinities_zeros_and_nan_go_where_libm_sends_them(name: str) -> None:
    np.testing.assert_allclose(evaluate(name, SPECIAL), exact(name, SPECIAL), TOLERANCE, TINY)


@settings(max_examples=60)
@given(value=st.floats(width=32))
def test_any_float_is_as_exact(value: float) -> None:
    for name in FUNCTIONS:
        np.testing.assert_allclose(evaluate(name, [value]), exact(name, [value]), TOLERANCE, TINY)


@pytest.mark.parametrize("name", ["tanh", "erf"])
def test_bounded_functions_never_pass_one(name: str) -> None:
    assert np.abs(evaluate(name, np.linspace(-12, 12, COUNT))).max() <= 1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_machine_code_calls_no_function_and_has_vectors(name: str) -> None:
    assembly = compiled(name, "haswell").mod.inspect_source("asm")
    assert not any(f"{symbol}f@PLT" in assembly for symbol in ("exp", "log", "tanh", "erf"))
    assert "ymm" in assembly


@pytest.mark.parametrize("exponent", [*POWERS, 2.5])
def test_powers_with_usual_exponents_equal_pow(exponent: float) -> None:
    func = with_vector_math(elementwise(lambda x: tirx.power(x, tirx.const(exponent, "float32"))))
    x, y = np.linspace(0.1, 30, COUNT).astype("f4"), tvm.runtime.tensor(np.zeros(COUNT, "f4"))
    tvm.compile(func, target_for())["main"](tvm.runtime.tensor(x), y)
    np.testing.assert_allclose(y.numpy(), x.astype("f8") ** exponent, rtol=TOLERANCE)
    assert ("pow" in func.script()) == (exponent not in POWERS)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_types_keep_libm(dtype: str) -> None:
    func = elementwise(tirx.exp, dtype)
    tvm.ir.assert_structural_equal(with_vector_math(func), func)


def test_rewriting_twice_changes_nothing_more() -> None:
    once = with_vector_math(elementwise(lambda x: tirx.exp(tirx.tanh(x))))
    tvm.ir.assert_structural_equal(with_vector_math(once), once)


def test_a_formula_within_a_formula_waits_in_memory() -> None:
    """TVM generates code of nested formulas in exponential time: seconds for a step of an LSTM."""
    x = te.placeholder((64,), "float32", "x")
    gate = te.compute((64,), lambda i: tirx.sigmoid(x[i]), "gate")
    scaled = te.compute((64,), lambda i: x[i] * gate[i], "scaled")
    shifted = te.compute((64,), lambda i: scaled[i] + tirx.const(1.0, "float32"), "shifted")
    func = te.create_prim_func([x, te.compute((64,), lambda i: tirx.tanh(shifted[i]), "y")])
    opened = open_schedule(func)
    assert opened is not None
    assert [nest.num_stores for nest in opened[1]] == [1, 1], "the sigmoid with what follows, and the tanh"
