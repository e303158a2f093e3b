"""Epilogues pass through reshapes and permutations; what these only carried disappears."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graph_harness import (
    batch_norm,
    check_fused,
    const,
    only_call,
    operators,
    weight,
)
from graph_samples import B6, OP, W56, W66, N, conv, dense
from tvm import relax

from tvm_structured import dialect
from tvm_structured.relay_passes.find_layers import find_calls
from tvm_structured.schedules.base import Epilogue

# torch's own export and serialisation code warns of its own deprecations
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

RNG = np.random.default_rng(1)
dialect.register()


def test_epilogues_reach_a_one_dimensional_convolution() -> None:
    w = weight(RNG, 6, 3, 3)

    def body(emit: Any, x: Any, r: Any) -> Any:
        y = emit(OP.add(emit(OP.nn.conv1d(x, const(w))), const(B6.reshape(1, 6, 1))))
        y = emit(relax.TupleGetItem(emit(batch_norm(RNG, y, 6, 1)), 0))
        return OP.nn.relu(emit(OP.add(y, r)))

    mod = check_fused(body, (2, 3, 9), (2, 6, 7))
    assert only_call(mod).epilogue == Epilogue(True, True, True, "relu")
    assert sorted(operators(mod)) == [
        "relax.expand_dims", "relax.reshape", "relax.squeeze", "relax.structured.conv2d",
    ]  # fmt: skip


def test_epilogues_reach_a_channels_last_convolution_and_permutations_meet() -> None:
    first, second = weight(RNG, 3, 3, 3, 6), weight(RNG, 1, 1, 6, 4)

    def body(emit: Any, x: Any) -> Any:
        layouts = {"data_layout": "NHWC", "kernel_layout": "HWIO"}
        y = emit(OP.nn.relu(emit(OP.add(emit(OP.nn.conv2d(x, const(first), **layouts)), const(B6)))))
        return OP.nn.conv2d(y, const(second), **layouts)

    mod = check_fused(body, (2, 7, 6, 3))
    assert operators(mod).count("relax.permute_dims") == 2  # at the input and at the output
    assert find_calls(mod)["constant_0"][0].epilogue == Epilogue(bias=True, activation="relu")


def test_epilogues_reach_a_weight_on_the_left() -> None:
    def body(emit: Any, x: Any) -> Any:
        y = emit(OP.add(emit(OP.matmul(const(W56.T), x)), const(B6[:, None])))
        return OP.matmul(const(W66), emit(OP.nn.relu(y)))

    mod = check_fused(body, (5, N))
    assert operators(mod).count("relax.permute_dims") == 2
    assert find_calls(mod)["constant_0"][0].epilogue == Epilogue(bias=True, activation="relu")


def test_a_residual_is_not_permuted() -> None:
    mod = check_fused(lambda emit, x, r: OP.add(emit(OP.matmul(const(W56.T), x)), r), (5, 3), (6, 3))
    assert operators(mod).count("relax.add") == 1


def test_reshapes_around_a_layer_of_merged_rows_disappear() -> None:
    def body(emit: Any, x: Any, r: Any) -> Any:
        y = emit(OP.matmul(emit(OP.reshape(x, (N * 4, 5))), const(W56)))
        y = emit(OP.reshape(emit(OP.add(const(B6), y)), (N, 4, 6)))
        return OP.nn.gelu(emit(OP.add(y, r)))

    mod = check_fused(body, (N, 4, 5), (N, 4, 6))
    assert operators(mod) == ["relax.structured.dense"]
    assert only_call(mod).epilogue == Epilogue(bias=True, residual=True, activation="gelu")


def test_a_reshape_with_other_readers_stays_for_them() -> None:
    def body(emit: Any, x: Any) -> Any:
        rows = emit(OP.reshape(x, (12, 5)))
        y = emit(OP.reshape(dense(emit, rows), (3, 4, 6)))
        return relax.Tuple([y, emit(OP.nn.relu(rows))])

    assert operators(check_fused(body, (3, 4, 5))).count("relax.reshape") == 1


def test_a_reshape_that_splits_features_stays_and_lets_numbers_through() -> None:
    def body(emit: Any, x: Any) -> Any:
        heads = emit(OP.reshape(dense(emit, x), (4, 3, 2)))
        return OP.add(emit(OP.multiply(heads, const(0.5))), const([1.0, 2.0]))  # the sum is per feature of a head

    mod = check_fused(body, (4, 5))
    assert only_call(mod).epilogue == Epilogue(scale=True)
    assert operators(mod).count("relax.add") == 1


def test_features_keep_their_place_through_flattened_images() -> None:
    def body(emit: Any, x: Any) -> Any:
        return OP.nn.relu(emit(OP.add(emit(OP.reshape(conv(emit, x), (2, 6, 30))), const(B6[:, None]))))

    mod = check_fused(body, (2, 3, 5, 6))
    assert only_call(mod).epilogue == Epilogue(bias=True, activation="relu")
