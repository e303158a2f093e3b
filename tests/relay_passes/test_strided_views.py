"""A view says where each element of a tensor lies in the array that it was made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from graph_harness import const, relax_main
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, tirx

from tvm_structured.relay_passes.fold_weights import WeightFolder
from tvm_structured.relay_passes.strided_views import View, view_of

OP = relax.op


def traced(body: Callable[..., Any], *shape: Any) -> View:
    """The view that `body(emit, x)` is of x or of what it could not see through."""
    mod = relax_main(body, shape)
    function = mod["main"]
    view = view_of(function.body.body, WeightFolder(mod, function))
    assert view is not None
    return view


def is_input(view: View) -> bool:
    return view.source.name == "x0"


def elements(view: View, source: np.ndarray) -> np.ndarray:
    """scale * source[offset + sum of index * stride], digit by digit."""
    digits = [digit for axis in view.axes for digit in axis]
    index: Any = np.full((1,) * len(digits), view.offset)
    for position, (extent, stride) in enumerate(digits):
        index = index + (np.arange(extent) * stride).reshape(-1, *(1,) * (len(digits) - 1 - position))
    return view.scale * source.reshape(-1)[index].reshape(view.shape)


def split_heads(emit: Any, x: Any) -> Any:
    parts = emit(OP.permute_dims(emit(OP.reshape(x, (2, 5, 3, 4, 6))), [2, 0, 3, 1, 4]))
    return OP.squeeze(emit(OP.strided_slice(parts, [0], [1], [2])), [0])


def merged_and_taken_apart(emit: Any, x: Any) -> Any:
    """As torch's MultiheadAttention does: (tokens, batch * heads, features) is evenly spaced along no axis."""
    rows = emit(OP.reshape(emit(OP.strided_slice(emit(OP.reshape(x, (5, 2, 3, 24))), [2], [2], [3])), (5, 8, 6)))
    return OP.reshape(emit(OP.permute_dims(rows, [1, 0, 2])), (2, 4, 5, 6))


VIEWS: dict[str, tuple[Any, tuple[int, ...], Any]] = {
    "heads": (split_heads, (2, 5, 72), lambda x: x.reshape(2, 5, 3, 4, 6).transpose(2, 0, 3, 1, 4)[1]),
    "merged": (
        merged_and_taken_apart,
        (5, 2, 72),
        lambda x: x.reshape(5, 2, 3, 24)[:, :, 2].reshape(5, 8, 6).transpose(1, 0, 2).reshape(2, 4, 5, 6),
    ),
    "scaled": (lambda emit, x: OP.multiply(const(0.5), emit(OP.multiply(x, const([3.0])))), (2, 3), lambda x: 1.5 * x),
    "taken": (lambda emit, x: OP.take(x, relax.const(-1, "int64"), axis=1), (2, 3, 4), lambda x: x[:, -1]),
    "broadcast": (
        lambda emit, x: OP.broadcast_to(x, (5, 2, 3, 4)),
        (2, 1, 4),
        lambda x: np.broadcast_to(x, (5, 2, 3, 4)),
    ),
    "split": (
        lambda emit, x: relax.TupleGetItem(emit(OP.split(x, [2, 3], axis=1)), 2),
        (2, 7, 3),
        lambda x: x[:, 3:],
    ),
    "slice_from_behind": (lambda emit, x: OP.strided_slice(x, [1], [-3], [7]), (2, 7), lambda x: x[:, -3:]),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_chain_of_moves_is_a_view_of_its_input(name: str) -> None:
    body, shape, expected = VIEWS[name]
    view = traced(body, *shape)
    x = np.random.default_rng(0).standard_normal(shape)
    assert is_input(view)
    np.testing.assert_array_equal(elements(view, x), expected(x))


@pytest.mark.parametrize(
    "body",
    [
        lambda emit, x: OP.multiply(x, const([1.0, 2.0, 3.0])),
        lambda emit, x: OP.nn.relu(x),
        lambda emit, x: OP.strided_slice(x, [1], [0], [3], [2]),
        lambda emit, x: OP.reshape(emit(OP.permute_dims(x, [1, 0])), (2, 3)),
    ],
    ids=["features", "relu", "steps", "mixed"],
)
def test_what_is_no_view_lies_where_it_is(body: Any) -> None:
    view = traced(body, 2, 3)
    assert not is_input(view)
    assert view.offset == 0 and view.scale == 1.0 and view.strides is not None


def factorisation(draw: Any, total: int) -> list[int]:
    extents = []
    while total > 1:
        extents.append(draw(st.sampled_from([d for d in range(2, total + 1) if total % d == 0])))
        total //= extents[-1]
    return extents or [1]


@given(st.data())
@settings(max_examples=60)
def test_any_chain_of_reshapes_and_permutations_finds_its_elements(data: Any) -> None:
    x = np.arange(48.0)
    steps: list[tuple[str, list[int]]] = []
    y, rank = x, 1
    for _ in range(data.draw(st.integers(1, 4))):
        shape = factorisation(data.draw, 48)
        axes = data.draw(st.permutations(range(len(shape))))
        steps += [("reshape", shape), ("permute", list(axes))]
        y = y.reshape(shape).transpose(axes)
        rank = len(shape)

    def body(emit: Any, value: Any) -> Any:
        for kind, argument in steps[:-1]:
            value = emit(OP.reshape(value, argument) if kind == "reshape" else OP.permute_dims(value, argument))
        return OP.permute_dims(value, steps[-1][1])

    view = traced(body, 48)
    assert len(view.axes) == rank
    if is_input(view):
        np.testing.assert_array_equal(elements(view, x), y)


def test_a_symbolic_batch_is_divided_where_that_is_whole() -> None:
    n = tirx.Var("n", "int64")
    view = traced(lambda emit, x: OP.reshape(emit(OP.reshape(x, (n * 4, 5, 6))), (n, 4, 5, 6)), n, 4, 5, 6)
    assert is_input(view) and view.strides == (120, 30, 6, 1)
