"""gelu is recognised however exporters write it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from graph_harness import (
    CLOSE,
    canonical,
    node,
    only_call,
    onnx_model,
    onnx_runtime,
    operators,
    run,
    weight,
)

from tvm_structured import dialect
from tvm_structured.relay_passes.find_layers import find_calls
from tvm_structured.schedules.base import Epilogue

# torch's own export and serialisation code warns of its own deprecations
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

RNG = np.random.default_rng(0)
W56, B6 = weight(RNG, 5, 6), weight(RNG, 6)
dialect.register()


ROOT, ONE, HALF = {"r": np.float32(np.sqrt(2))}, {"one": np.float32(1)}, {"half": np.float32(0.5)}
GELUS: dict[str, list[Any]] = {
    "divide_last_half": [
        node("Div", "h r", "a"),
        node("Erf", "a", "e"),
        node("Add", "e one", "s"),
        node("Mul", "h s", "m"),
        node("Mul", "m half", "y"),
    ],
    "half_first": [
        node("Mul", "h half", "g"),
        node("Div", "h r", "a"),
        node("Erf", "a", "e"),
        node("Add", "one e", "s"),
        node("Mul", "g s", "y"),
    ],
    "half_inside": [
        node("Div", "h r", "a"),
        node("Erf", "a", "e"),
        node("Mul", "half e", "f"),
        node("Add", "f half", "s"),
        node("Mul", "s h", "y"),
    ],
}


@pytest.mark.parametrize("case", GELUS)
def test_gelu_written_with_erf_is_recognised(case: str) -> None:
    nodes = [node("MatMul", "x w", "z"), node("Add", "z b", "h"), *GELUS[case]]
    model = onnx_model(nodes, {"w": W56, "b": B6, **ROOT, **ONE, **HALF}, (4, 5), (4, 6))
    mod = canonical(model)
    assert only_call(mod).epilogue == Epilogue(bias=True, activation="gelu")
    x = 3 * weight(RNG, 4, 5)
    np.testing.assert_allclose(run(mod, x), onnx_runtime(model, x), **CLOSE)


@pytest.mark.parametrize("case", GELUS)
def test_gelu_between_two_layers_belongs_to_the_first(case: str) -> None:
    """The factor of the second layer's input is no scale of that layer if it is the half of a gelu."""
    *begin, last = copy.deepcopy(GELUS[case])
    last.output[0] = "activated"
    nodes = [node("MatMul", "x w", "h"), *begin, last, node("MatMul", "activated v", "y")]
    model = onnx_model(nodes, {"w": W56, "v": weight(RNG, 6, 3), **ROOT, **ONE, **HALF}, (4, 5), (4, 3))
    mod = canonical(model)
    calls = find_calls(mod)
    assert operators(mod) == ["relax.structured.dense"] * 2
    assert (calls["w"][0].epilogue, calls["v"][0].epilogue) == (Epilogue(activation="gelu"), Epilogue())
    x = weight(RNG, 4, 5)
    np.testing.assert_allclose(run(mod, x), onnx_runtime(model, x), **CLOSE)


def test_nearly_gelu_is_not_gelu() -> None:
    nodes = [node("MatMul", "x w", "h"), *GELUS["divide_last_half"]]
    model = onnx_model(nodes, {"w": W56, "r": np.float32(1.4), **ONE, **HALF}, (4, 5), (4, 6))
    mod = canonical(model)
    assert "relax.erf" in operators(mod)
    x = weight(RNG, 4, 5)
    np.testing.assert_allclose(run(mod, x), onnx_runtime(model, x), **CLOSE)
