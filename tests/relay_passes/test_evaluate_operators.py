"""Values computed at compile time are those that TVM computes at run time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from graph_harness import const, relax_main, weight
from tvm import relax

from tvm_structured.relay_passes import evaluate_operators
from tvm_structured.relay_passes.evaluate_operators import OPERATORS, evaluate, evaluate_by_tvm
from tvm_structured.relay_passes.fold_weights import WeightFolder

RNG = np.random.default_rng(0)
OP = relax.op
A, B, V = weight(RNG, 4, 6), weight(RNG, 4, 6), weight(RNG, 6)
INDEX = relax.const(np.array([2, 0, -1]), "int64")

Make = Callable[..., Any]
CASES: dict[str, tuple[Make, list[np.ndarray]]] = {
    "permute_dims": (lambda a: OP.permute_dims(a, [2, 0, 1]), [weight(RNG, 2, 3, 4)]),
    "permute_dims_default": (OP.permute_dims, [weight(RNG, 2, 3, 4)]),
    "permute_dims_negative": (lambda a: OP.permute_dims(a, [-1, 0]), [A]),
    "reshape": (lambda a: OP.reshape(a, (3, -1)), [A]),
    "expand_dims": (lambda a: OP.expand_dims(a, [0, 2]), [A]),
    "squeeze": (lambda a: OP.squeeze(a, [1]), [weight(RNG, 3, 1, 1)]),
    "flatten": (OP.flatten, [A]),
    "broadcast_to": (lambda a: OP.broadcast_to(a, (3, 4, 6)), [V]),
    "astype": (lambda a: OP.astype(a, "float16"), [A]),
    "astype_integer": (lambda a: OP.astype(a, "float32"), [RNG.integers(-9, 9, (3, 2)).astype("int8")]),
    "astype_boolean": (lambda a: OP.astype(a, "float32"), [RNG.random((3, 2)) > 0.5]),
    "concat": (lambda a, b: OP.concat([a, b], axis=-1), [A, B]),
    "stack": (lambda a, b: OP.stack([a, b], axis=1), [A, B]),
    "split": (lambda a: OP.split(a, 3, axis=1), [A]),
    "split_uneven": (lambda a: OP.split(a, 4, axis=1), [A]),
    "split_at": (lambda a: OP.split(a, [1, 4], axis=-1), [A]),
    "strided_slice": (lambda a: OP.strided_slice(a, [0, 1], [1, -4], [4, 100], [2, 1]), [A]),
    "strided_slice_backwards": (lambda a: OP.strided_slice(a, [1], [5], [1], [-2]), [A]),
    "take": (lambda a: OP.take(a, relax.const(1, "int64"), axis=1), [A]),
    "take_many": (lambda a: OP.take(a, relax.const(np.array([[2, 0], [1, 1]]), "int64"), axis=0), [A]),
    "take_flat": (lambda a: OP.take(a, relax.const(np.array([2, 5]), "int64")), [V]),
    "add": (OP.add, [A, V]),
    "subtract": (OP.subtract, [V, A]),
    "multiply": (OP.multiply, [A, B]),
    "divide": (OP.divide, [A, V]),
    "divide_integers": (OP.divide, [np.array([7, -7, 8]), np.array([2, 2, -3])]),
    "power": (lambda a: OP.power(a, const(2.0)), [A]),
    "maximum": (OP.maximum, [A, V]),
    "minimum": (OP.minimum, [A, V]),
    "where": (lambda c, a, b: OP.where(c, a, b), [A > 0, A, B]),
    "isnan": (OP.isnan, [np.array([1, np.nan, np.inf], "f4")]),
    "negative": (OP.negative, [A]),
    "abs": (OP.abs, [A]),
    "square": (OP.square, [A]),
    "sqrt": (OP.sqrt, [np.abs(A)]),
    "rsqrt": (OP.rsqrt, [np.abs(A)]),
    "exp": (OP.exp, [A]),
    "tanh": (OP.tanh, [A]),
    "matmul": (lambda a, b: OP.matmul(a, b), [weight(RNG, 2, 3, 5), weight(RNG, 5, 4)]),
    "sum": (lambda a: OP.sum(a, [0], keepdims=True), [A]),
    "mean": (OP.mean, [A]),
    "max": (lambda a: OP.max(a, [-1]), [A]),
    "min": (lambda a: OP.min(a, [0, 1]), [A]),
    # not in the table: TVM evaluates them
    "tril": (OP.tril, [A]),
    "erf": (OP.erf, [A]),
    "clip": (lambda a: OP.clip(a, -1, 1), [A]),
    "layer_norm": (lambda a: OP.nn.layer_norm(a, const(V), const(V), [-1]), [A]),
    "quantized": (
        lambda q: OP.dequantize(q, const([0.5, 2, 1]), relax.const(np.array([1, 0, 3], "int8"), "int8"), axis=0),
        [RNG.integers(-9, 9, (3, 2)).astype("int8")],
    ),
}  # fmt: skip


def normalised(make: Make, arrays: list[np.ndarray]) -> Any:
    """The call on constants, with its type."""
    return relax.BlockBuilder().normalize(make(*(relax.const(a, str(a.dtype)) for a in arrays)))


def at_run_time(make: Make, arrays: list[np.ndarray]) -> Any:
    """The same call on inputs, compiled by TVM."""
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(a.shape, str(a.dtype))) for i, a in enumerate(arrays)]
    with builder.function("main", inputs):
        builder.emit_func_output(builder.emit(make(*inputs)))
    executable = tvm.compile(builder.get(), tvm.target.Target({"kind": "llvm", "opt-level": 0}))
    return relax.VirtualMachine(executable, tvm.cpu())["main"](*arrays)


def folded(call: Any) -> Any:
    folder = WeightFolder(tvm.IRModule(), relax_main(lambda emit, x: x, (1,))["main"])
    item = folder._fold(call)
    return [field.value for field in item] if isinstance(item, list) else item.value


@pytest.mark.parametrize("case", CASES)
def test_a_value_is_the_one_that_tvm_computes(case: str) -> None:
    make, arrays = CASES[case]
    found, expected = folded(normalised(make, arrays)), at_run_time(make, arrays)
    if not isinstance(found, list):
        found, expected = [found], [expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert str(mine.dtype) == str(theirs.dtype)
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=2e-6, atol=1e-7)


def test_every_operator_of_the_table_is_tested() -> None:
    calls = {normalised(*case).op.name for case in CASES.values()}
    assert set(OPERATORS) <= calls


@pytest.mark.parametrize("case", ["permute_dims", "reshape", "split_at", "add", "sum", "matmul", "take"])
def test_common_operators_need_no_compiler(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("compiled")

    monkeypatch.setattr(evaluate_operators, "evaluate_by_tvm", refuse)
    folded(normalised(*CASES[case]))


def test_a_tuple_comes_back_as_a_list() -> None:
    call = normalised(*CASES["split"])
    assert [part.shape for part in evaluate_by_tvm(tvm.IRModule(), call, [A])] == [(4, 2)] * 3


def test_what_has_an_effect_or_no_legalisation_is_not_evaluated() -> None:
    for make in (
        lambda: relax.op.call_pure_packed("vm.builtin.copy", const(A), ty_args=[relax.TensorType((4, 6), "float32")]),
        lambda: relax.op.shape_of(const(A)),
    ):
        call = relax.BlockBuilder().normalize(make())
        assert evaluate(tvm.IRModule(), call, [None] * len(call.args)) is None


def test_a_symbolic_shape_is_not_evaluated() -> None:
    n = tvm.tirx.Var("n", "int64")
    call = relax.BlockBuilder().normalize(relax.op.broadcast_to(const(V), relax.ShapeExpr([n, 6])))
    assert evaluate(tvm.IRModule(), call, [V, None]) is None


def test_evaluation_ignores_the_target_around_it() -> None:
    call = normalised(*CASES["tril"])
    with tvm.target.Target("c"):
        np.testing.assert_array_equal(evaluate(tvm.IRModule(), call, [A, None]), np.tril(A))
