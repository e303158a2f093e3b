"""One operator behind a layer: absorbed where it fits, left where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from graph_harness import (
    batch_norm,
    check_fused,
    const,
    fused,
    only_call,
    operators,
    relax_main,
    weight,
)
from graph_samples import B6, OP, S6, W56, W66, N, conv, dense
from tvm import ir, relax

from tvm_structured import dialect
from tvm_structured.relay_passes.find_layers import find_calls
from tvm_structured.relay_passes.fuse_epilogue import FuseEpilogue
from tvm_structured.schedules.base import Epilogue

# torch's own export and serialisation code warns of its own deprecations
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

RNG = np.random.default_rng(1)
dialect.register()

BIAS, SCALE = Epilogue(bias=True), Epilogue(scale=True)
CLIP6 = Epilogue(activation="clip", low=0.0, high=6.0)
STEPS: dict[str, tuple[Callable[[Any, Any], Any], Epilogue]] = {
    "add": (lambda emit, y: OP.add(y, const(B6)), BIAS),
    "add_left": (lambda emit, y: OP.add(const(B6), y), BIAS),
    "add_row": (lambda emit, y: OP.add(y, const(B6[None])), BIAS),
    "add_number": (lambda emit, y: OP.add(y, const(0.5)), BIAS),
    "add_computed": (lambda emit, y: OP.add(y, emit(OP.multiply(const(B6), const(2.0)))), BIAS),
    "subtract": (lambda emit, y: OP.subtract(y, const(B6)), BIAS),
    "subtract_from": (lambda emit, y: OP.subtract(const(B6), y), Epilogue(scale=True, bias=True)),
    "multiply": (lambda emit, y: OP.multiply(y, const(S6)), SCALE),
    "multiply_left": (lambda emit, y: OP.multiply(const(2.0), y), SCALE),
    "divide": (lambda emit, y: OP.divide(y, const(S6 + 9)), SCALE),
    "negative": (lambda emit, y: OP.negative(y), SCALE),
    "batch_norm": (lambda emit, y: relax.TupleGetItem(emit(batch_norm(RNG, y, 6, 1)), 0), Epilogue(True, True)),
    "batch_norm_without_affine": (
        lambda emit, y: relax.TupleGetItem(emit(batch_norm(RNG, y, 6, -1, center=False, scale=False)), 0),
        Epilogue(True, True),
    ),
    "relu": (lambda emit, y: OP.nn.relu(y), Epilogue(activation="relu")),
    "relu6": (lambda emit, y: OP.nn.relu6(y), CLIP6),
    "clip": (lambda emit, y: OP.clip(y, 0, 6), CLIP6),
    "clip_above_zero": (lambda emit, y: OP.clip(y, 0.0, float("inf")), Epilogue(activation="relu")),
    "gelu": (lambda emit, y: OP.nn.gelu(y), Epilogue(activation="gelu")),
    "gelu_tanh": (lambda emit, y: OP.nn.gelu_tanh(y), Epilogue(activation="gelu_tanh")),
    "silu": (lambda emit, y: OP.nn.silu(y), Epilogue(activation="silu")),
    "silu_spelled_out": (lambda emit, y: OP.multiply(y, emit(OP.sigmoid(y))), Epilogue(activation="silu")),
    "maximum_zero": (lambda emit, y: OP.maximum(const(0.0), y), Epilogue(activation="relu")),
    "bounds": (
        lambda emit, y: OP.minimum(emit(OP.maximum(y, const(-0.5))), const([0.25])),
        Epilogue(activation="clip", low=-0.5, high=0.25),
    ),
    "upper_then_lower": (
        lambda emit, y: OP.maximum(emit(OP.minimum(y, const(1.0))), const(-1.0)),
        Epilogue(activation="clip", low=-1.0, high=1.0),
    ),
    "relu_then_limit": (lambda emit, y: OP.minimum(emit(OP.nn.relu(y)), const(6.0)), CLIP6),
    "clip_twice": (
        lambda emit, y: OP.clip(emit(OP.clip(y, -1, 2)), 0, 6), Epilogue(activation="clip", low=0.0, high=2.0),
    ),
    "negative_then_limits": (
        lambda emit, y: OP.clip(emit(OP.negative(y)), -1, 2),
        Epilogue(scale=True, activation="clip", low=-1.0, high=2.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STEPS)
def test_an_operation_joins_a_dense_layer(case: str) -> None:
    step, epilogue = STEPS[case]
    mod = check_fused(lambda emit, x: step(emit, dense(emit, x)), (N, 5))
    assert operators(mod).count("relax.structured.dense") == 1
    assert set(operators(mod)) <= {"relax.structured.dense", "relax.multiply"}  # the latter of two constants
    assert only_call(mod).epilogue == epilogue


@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (6, 1, 1), (1, 1, 1), ()])
@pytest.mark.parametrize("operator", [OP.add, OP.multiply, OP.subtract])
def test_channels_of_an_image_take_scale_and_bias(shape: tuple[int, ...], operator: Any) -> None:
    mod = check_fused(lambda emit, x: operator(conv(emit, x), const(weight(RNG, *shape))), (2, 3, 5, 6))
    assert operators(mod) == ["relax.structured.conv2d"]


@pytest.mark.parametrize(
    "shape",
    [(6,), (1, 6), (5, 6), (1, 1, 5, 1), (2, 6, 5, 6), (2, 1, 1, 1)],
    ids=str,
)
def test_constants_along_other_axes_of_an_image_are_no_bias(shape: tuple[int, ...]) -> None:
    mod = check_fused(lambda emit, x: OP.add(conv(emit, x), const(weight(RNG, *shape))), (2, 3, 5, 6))
    call = only_call(mod)
    assert not call.epilogue.bias
    assert call.epilogue.residual == (shape == (2, 6, 5, 6))


# -- what has to stay ----------------------------------------------------------------------------------------


def read_twice(emit: Any, x: Any) -> Any:
    y = dense(emit, x)
    return emit(relax.Tuple([emit(OP.nn.relu(y)), y]))


REFUSALS: dict[str, tuple[Callable[..., Any], list[Any], str]] = {
    # id: (body, input shapes, the operator that stays)
    "the_output_is_returned_too": (read_twice, [(3, 5)], "relax.nn.relu"),
    "added_to_itself": (lambda emit, x: OP.add(*[dense(emit, x)] * 2), [(3, 5)], "relax.add"),
    "bias_behind_relu": (
        lambda emit, x: OP.add(emit(OP.nn.relu(dense(emit, x))), const(B6)), [(3, 5)], "relax.add",
    ),
    "scale_behind_a_residual": (
        lambda emit, x, r: OP.multiply(emit(OP.add(dense(emit, x), r)), const(S6)), [(3, 5), (3, 6)], "relax.multiply",
    ),
    "second_residual": (
        lambda emit, x, r, s: OP.add(emit(OP.add(dense(emit, x), r)), s), [(3, 5), (3, 6), (3, 6)], "relax.add",
    ),
    "residual_behind_gelu": (
        lambda emit, x, r: OP.add(emit(OP.nn.gelu(dense(emit, x))), r), [(3, 5), (3, 6)], "relax.add",
    ),
    "broadcast_residual": (lambda emit, x, r: OP.add(dense(emit, x), r), [(3, 5), (1, 6)], "relax.add"),
    "broadcast_output": (lambda emit, x, r: OP.add(dense(emit, x), r), [(1, 5), (3, 6)], "relax.add"),
    "constant_of_more_dimensions": (
        lambda emit, x: OP.add(dense(emit, x), const(B6[None, None])), [(3, 5)], "relax.add",
    ),
    "lower_bound_alone": (lambda emit, x: OP.maximum(dense(emit, x), const(1.0)), [(3, 5)], "relax.maximum"),
    "upper_bound_alone": (lambda emit, x: OP.minimum(dense(emit, x), const(1.0)), [(3, 5)], "relax.minimum"),
    "bound_per_feature": (lambda emit, x: OP.maximum(dense(emit, x), const(B6)), [(3, 5)], "relax.maximum"),
    "clip_behind_gelu": (lambda emit, x: OP.clip(emit(OP.nn.gelu(dense(emit, x))), 0, 1), [(3, 5)], "relax.clip"),
    "divided_by": (lambda emit, x: OP.divide(const(B6), dense(emit, x)), [(3, 5)], "relax.divide"),
    "division_by_zero": (
        lambda emit, x: OP.divide(dense(emit, x), const([1, 2, 0, 1, 1, 1])), [(3, 5)], "relax.divide",
    ),
    "bias_that_overflows": (lambda emit, x: OP.add(dense(emit, x), const(np.inf)), [(3, 5)], "relax.add"),
    "batch_norm_over_rows": (
        lambda emit, x: relax.TupleGetItem(emit(batch_norm(RNG, dense(emit, x), 6, 0)), 0),
        [(6, 5)], "relax.nn.batch_norm",
    ),
    "product_of_inputs": (lambda emit, x, r: OP.multiply(dense(emit, x), r), [(3, 5), (3, 6)], "relax.multiply"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_stays(case: str) -> None:
    body, shapes, stays = REFUSALS[case]
    mod = check_fused(body, *shapes)
    assert operators(mod).count(stays) == 1
    assert operators(mod).count("relax.structured.dense") == 1


def test_batch_norm_in_training_stays() -> None:
    def body(emit: Any, x: Any) -> Any:
        return relax.TupleGetItem(emit(batch_norm(RNG, conv(emit, x), 6, 1, training=True)), 0)

    assert operators(fused(relax_main(body, (2, 3, 5, 5)))) == ["relax.structured.conv2d", "relax.nn.batch_norm"]


def test_batch_norm_whose_statistics_are_read_stays() -> None:
    def body(emit: Any, x: Any) -> Any:
        normed = emit(batch_norm(RNG, conv(emit, x), 6, 1))
        return relax.Tuple([emit(relax.TupleGetItem(normed, 0)), emit(relax.TupleGetItem(normed, 1))])

    assert operators(check_fused(body, (2, 3, 5, 5))) == ["relax.structured.conv2d", "relax.nn.batch_norm"]


def test_a_module_without_layers_is_not_touched() -> None:
    before = relax_main(lambda emit, x: OP.nn.relu(emit(OP.add(x, const(B6)))), (3, 6))
    ir.assert_structural_equal(FuseEpilogue()(before), before)


# -- residuals -----------------------------------------------------------------------------------------------


def test_a_sum_of_two_layers_makes_one_the_residual_of_the_other() -> None:
    def body(emit: Any, x: Any) -> Any:
        a = emit(OP.add(dense(emit, x), const(B6)))
        b = emit(OP.multiply(emit(OP.matmul(x, const(W56 + 1))), const(S6)))
        return OP.nn.relu(emit(OP.add(a, b)))

    mod = check_fused(body, (3, 5))
    assert operators(mod) == ["relax.structured.dense"] * 2
    calls = find_calls(mod)
    assert calls["constant_0"][0].epilogue == Epilogue(bias=True, residual=True, activation="relu")
    assert calls["constant_1"][0].epilogue == SCALE


def test_a_layer_may_be_the_residual_of_what_it_feeds() -> None:
    def body(emit: Any, x: Any) -> Any:
        y = emit(OP.nn.relu(dense(emit, x)))
        return OP.add(y, emit(OP.add(emit(OP.matmul(y, const(W66))), const(B6))))

    mod = check_fused(body, (3, 5))
    assert operators(mod) == ["relax.structured.dense"] * 2
    assert find_calls(mod)["constant_1"][0].epilogue == Epilogue(bias=True, residual=True)


def test_a_bias_may_follow_the_residual() -> None:
    mod = check_fused(lambda emit, x, r: OP.add(emit(OP.add(dense(emit, x), r)), const(B6)), (3, 5), (3, 6))
    assert only_call(mod).epilogue == Epilogue(bias=True, residual=True)
