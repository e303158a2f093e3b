"""Expressions of weights alone have a value and the name of their largest parameter; others have neither."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from graph_harness import const, onnx_model, weight
from graph_harness import node as onnx_node
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from tvm_structured.frontend import import_model
from tvm_structured.relay_passes.canonicalize_layers import CanonicalizeLayers
from tvm_structured.relay_passes.fold_weights import WeightFolder

RNG = np.random.default_rng(0)
OP = relax.op
W, BIAS = weight(RNG, 12, 4), weight(RNG, 4)


def origin_of(make: Any) -> tuple[str | None, np.ndarray]:
    """Name with its part, and value, of an expression of w (12, 4) named "fc.weight" and b (4) named "fc.bias"."""
    builder = relax.BlockBuilder()
    x, w, b = (relax.Var(n, relax.TensorType(s, "float32")) for n, s in {"x": (2, 4), "w": (12, 4), "b": (4,)}.items())
    with builder.function("main", [x, w, b]):
        with builder.dataflow():
            out = builder.emit_output(make(builder.emit, x, w, b))
        builder.emit_func_output(out)
    mod = builder.get()
    params, names = {"w": W, "b": BIAS}, {"w": "fc.weight", "b": "fc.bias"}
    found = WeightFolder(mod, mod["main"], params, names).fold(mod["main"].body.body)
    assert found is not None
    return (None if found.origin.name is None else found.origin.name + found.origin.part), found.value


NAMES = {
    "itself": (lambda emit, x, w, b: emit(OP.permute_dims(w)), "fc.weight", W.T),
    "largest": (lambda emit, x, w, b: OP.add(b, w), "fc.weight", W + BIAS),
    "named_before_constant": (
        lambda emit, x, w, b: OP.multiply(b, const(np.ones((9, 4)))), "fc.bias", np.tile(BIAS, (9, 1)),
    ),
    "constant_alone": (lambda emit, x, w, b: OP.negative(const(W)), None, -W),
    "half": (lambda emit, x, w, b: emit(relax.TupleGetItem(emit(OP.split(w, 3)), 2)), "fc.weight[2]", W[8:]),
    "equal_slice": (lambda emit, x, w, b: OP.strided_slice(w, [0], [4], [8]), "fc.weight[1]", W[4:8]),
    "slice": (lambda emit, x, w, b: OP.strided_slice(w, [0], [3], [8]), "fc.weight[3:8]", W[3:8]),
    "open_slice": (lambda emit, x, w, b: OP.strided_slice(w, [0], [-2], [2**63 - 1]), "fc.weight[5]", W[-2:]),
    "steps": (lambda emit, x, w, b: OP.strided_slice(w, [0], [1], [8], [3]), "fc.weight[1:8:3]", W[1:8:3]),
    "two_axes": (
        lambda emit, x, w, b: OP.strided_slice(w, [0, 1], [0, 1], [6, 4]), "fc.weight[0][1:4]", W[:6, 1:4],
    ),
    "whole": (lambda emit, x, w, b: OP.strided_slice(w, [0], [0], [12]), "fc.weight", W),
    "row": (lambda emit, x, w, b: OP.take(w, relax.const(7, "int64"), axis=0), "fc.weight[7]", W[7]),
    "slice_of_a_slice": (
        lambda emit, x, w, b: OP.strided_slice(emit(OP.strided_slice(w, [0], [6], [12])), [0], [0], [3]),
        "fc.weight[1][0]", W[6:9],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_a_weight_is_called_after_its_largest_parameter_and_its_part(case: str) -> None:
    make, name, value = NAMES[case]
    found_name, found = origin_of(make)
    assert found_name == name
    np.testing.assert_allclose(found, value, rtol=1e-6)


def test_what_needs_an_input_has_no_value() -> None:
    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor((2, 4), "float32"), w: R.Tensor((2, 4), "float32")):
            with R.dataflow():
                a = R.add(x, w)
                b = R.multiply(w, R.const(2.0))
                c = R.add(a, b)
                R.output(c)
            return c

    folder = WeightFolder(Module, Module["main"], {"w": np.ones((2, 4), "f4")})
    values = [folder.array(binding.var) for binding in Module["main"].body.blocks[0].bindings]
    assert values[0] is None and values[2] is None
    assert np.array_equal(values[1], np.full((2, 4), 2.0))


def test_a_deep_network_is_not_walked_for_every_operand() -> None:
    """Ten thousand operations would exceed Python's recursion limit if constness were decided by descending."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = x
            for _ in range(10_000):
                y = builder.emit(OP.add(y, y))
            y = builder.emit_output(y)
        builder.emit_func_output(y)
    mod = builder.get()
    assert WeightFolder(mod, mod["main"]).fold(mod["main"].body.body) is None


def test_the_caller_s_values_are_not_changed() -> None:
    nodes = [
        onnx_node("Mul", "a s", "m"),
        onnx_node("Transpose", "m", "t", perm=[1, 0]),
        onnx_node("MatMul", "x t", "y"),
    ]
    model = onnx_model(nodes, {"a": W, "s": weight(RNG, 12, 1)}, (3, 4), (3, 12))
    imported = import_model(model)
    before = {name: value.copy() for name, value in imported.params.items()}
    CanonicalizeLayers(imported.params, imported.names)(imported.mod)
    assert all(np.array_equal(before[name], value) for name, value in imported.params.items())


def test_tensor_ir_on_constants_is_evaluated() -> None:
    builder = relax.BlockBuilder()
    with builder.function("main", []):
        with builder.dataflow():
            out = builder.emit_output(builder.call_te(tvm.topi.nn.pad, const(W), [1, 0], [0, 2]))
        builder.emit_func_output(out)
    mod = builder.get()
    found = WeightFolder(mod, mod["main"]).array(mod["main"].body.body)
    assert np.array_equal(found, np.pad(W, [(1, 0), (0, 2)]))
