"""The attention kernel computes what its formula says, for every size and layout, inside of its buffers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tvm
from guarded_buffers import filled, guarded_buffer
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import runnable_machines, target_for
from tvm import tirx

from tvm_structured.schedules.attention import Attention, Strided, attention_func
from tvm_structured.schedules.cpu import Cpu

RNG = np.random.default_rng(0)
CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # float32 sums of a few hundred terms


def contiguous(*shape: Any) -> tuple[Any, ...]:
    strides: list[Any] = []
    stride: Any = 1
    for extent in reversed(shape):
        strides.insert(0, stride)
        stride = stride * extent
    return tuple(strides)


def joined(batch: Any, heads: int, tokens: Any, depth: int, part: int) -> Strided:
    """q, k or v (part 0, 1, 2) in the result (batch, tokens, 3 * heads * depth) of one projection."""
    row = 3 * heads * depth
    return Strided((batch, tokens, row), (tokens * row, depth, row, 1), part * heads * depth)


def separate(batch: Any, heads: int, tokens: Any, depth: int) -> Strided:
    shape = (batch, heads, tokens, depth)
    return Strided(shape, contiguous(*shape))


def self_attention(batch: Any, heads: int, tokens: Any, depth: int, **options: Any) -> Attention:
    parts = [joined(batch, heads, tokens, depth, part) for part in range(3)]
    return Attention(batch, heads, tokens, tokens, depth, depth, depth**-0.5, *parts, **options)


def cross_attention(batch: int, heads: int, queries: int, keys: int, depth: int, width: int, **more: Any) -> Attention:
    q, k, v = (separate(batch, heads, *size) for size in ((queries, depth), (keys, depth), (keys, width)))
    return Attention(batch, heads, queries, keys, depth, width, 0.3, q, k, v, **more)


def placed(array: np.ndarray, operand: Strided, shape: tuple[int, ...]) -> np.ndarray:
    """An operand's elements (batch, head, token, feature), in float64."""
    index = sum(
        np.arange(n).reshape(-1, *(1,) * (3 - i)) * s
        for i, (n, s) in enumerate(zip(shape, operand.strides, strict=True))
    )
    return array.reshape(-1)[np.broadcast_to(operand.offset + index, shape)].astype(np.float64)


def reference(a: Attention, arrays: list[np.ndarray]) -> np.ndarray:
    sizes = [(a.queries, a.depth), (a.keys, a.depth), (a.keys, a.width), (a.queries, a.keys)]
    views = [
        placed(array, operand, (a.batch, a.heads, *size))
        for array, operand, size in zip(arrays, a.operands, sizes, strict=False)
    ]
    q, k, v = views[:3]
    scores = a.scale * (q @ k.swapaxes(2, 3))
    if a.bias is not None:
        scores = scores + views[3]
    with np.errstate(invalid="ignore"):
        shares = np.exp(scores - scores.max(axis=3, keepdims=True))
        shares /= shares.sum(axis=3, keepdims=True)
    if a.is_safe:
        shares[np.isneginf(scores).all(axis=3)] = 0.0
    return (shares @ v).transpose(0, 2, 1, 3).transpose(a.order)


def compiled(a: Attention, machine: str = "host", cores: int = 2) -> Any:
    target = target_for(machine, cores)
    func = attention_func(a, Cpu.of(target)).with_attr("global_symbol", "main")
    return tvm.compile(func, target)["main"]


def run(kernel: Any, a: Attention, arrays: list[np.ndarray], at_end: bool = True) -> np.ndarray:
    """The result; all buffers end (or begin) at protected pages."""
    guarded = [filled(x, lambda shape, dtype: guarded_buffer(shape, dtype, at_end=at_end)) for x in arrays]
    y = guarded_buffer(a.y_shape, "float32", at_end=at_end)
    kernel(*(tvm.runtime.from_dlpack(x) for x in (*guarded, y)))
    return y


def random_operands(a: Attention) -> list[np.ndarray]:
    return [RNG.standard_normal(operand.shape).astype(np.float32) for operand in a.operands]


def assert_right(a: Attention, arrays: list[np.ndarray] | None = None, machine: str = "host") -> None:
    arrays = random_operands(a) if arrays is None else arrays
    kernel = compiled(a, machine)
    for at_end in (True, False):
        np.testing.assert_allclose(run(kernel, a, arrays, at_end), reference(a, arrays), **CLOSE)


sizes = st.sampled_from([1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 65])


@given(st.integers(1, 3), st.integers(1, 3), sizes, sizes, sizes, sizes)
@settings(max_examples=12)
def test_any_size_is_right_and_stays_in_its_buffers(
    batch: int, heads: int, queries: int, keys: int, depth: int, width: int
) -> None:
    assert_right(cross_attention(batch, heads, queries, keys, depth, width))


@pytest.mark.parametrize("machine", runnable_machines())
@pytest.mark.parametrize("tokens", [5, 37])
def test_every_class_of_machine_computes_the_same(machine: str, tokens: int) -> None:
    assert_right(self_attention(2, 3, tokens, 20), machine=machine)


@pytest.mark.parametrize(
    "strides", [(0, 0, 0, 1), (0, 0, 21, 1), (0, 21 * 21, 21, 1), (1323, 441, 21, 1), (63, 21, 0, 1)]
)
def test_a_bias_may_be_shared_along_any_axis(strides: tuple[int, ...]) -> None:
    size = 1 + sum((n - 1) * s for n, s in zip((2, 3, 21, 21), strides, strict=True))
    assert_right(self_attention(2, 3, 21, 16, bias=Strided((size,), strides)))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (2, 1, 0, 3)])
def test_heads_are_written_in_every_order(order: tuple[int, ...]) -> None:
    assert_right(self_attention(2, 3, 19, 24, order=order))


def masked(a: Attention, empty_rows: bool) -> list[np.ndarray]:
    """Random operands, a causal mask, and its first rows without a single key on request."""
    arrays = random_operands(a)
    mask = np.where(np.tril(np.ones((a.queries, a.keys), bool)), 0.0, -np.inf)
    if empty_rows:
        mask[:3] = -np.inf
    arrays[3] = mask.astype(np.float32)
    return arrays


def with_causal_bias(**options: Any) -> Attention:
    return self_attention(2, 2, 35, 16, bias=Strided((35, 35), (0, 0, 35, 1)), **options)


@pytest.mark.parametrize("is_safe", [False, True])
def test_masked_scores_count_for_nothing(is_safe: bool) -> None:
    a = with_causal_bias(is_safe=is_safe)
    assert_right(a, masked(a, empty_rows=False))


@pytest.mark.parametrize("is_safe", [False, True])
def test_a_query_without_keys_gives_nan_or_zero_as_its_model_says(is_safe: bool) -> None:
    a = with_causal_bias(is_safe=is_safe)
    arrays = masked(a, empty_rows=True)
    assert_right(a, arrays)
    first = run(compiled(a), a, arrays)[:, :3]
    assert (first == 0).all() if is_safe else np.isnan(first).all()


def test_one_nan_spoils_its_query_alone() -> None:
    a = cross_attention(1, 1, 40, 9, 8, 8)
    arrays = random_operands(a)
    arrays[0][0, 0, 7, 3] = np.nan
    y = run(compiled(a), a, arrays)
    assert np.isnan(y[0, 7]).all() and np.isfinite(np.delete(y, 7, axis=1)).all()


def test_large_scores_do_not_overflow() -> None:
    a = replace(cross_attention(1, 2, 17, 33, 16, 16), scale=1.0)
    arrays = random_operands(a)
    arrays[0] *= 1e3
    assert_right(a, arrays)


def test_batch_and_sequence_may_be_symbolic() -> None:
    batch, tokens = tirx.Var("batch", "int64"), tirx.Var("tokens", "int64")
    kernel = compiled(self_attention(batch, 3, tokens, 20))
    for sizes_of_call in ((1, 1), (2, 5), (3, 33), (1, 64), (2, 71)):
        a = self_attention(sizes_of_call[0], 3, sizes_of_call[1], 20)
        arrays = random_operands(a)
        np.testing.assert_allclose(run(kernel, a, arrays), reference(a, arrays), **CLOSE)


def test_shares_sum_to_one() -> None:
    a = cross_attention(2, 2, 37, 101, 8, 5)
    arrays = random_operands(a)
    arrays[2][:] = 1.0
    np.testing.assert_allclose(run(compiled(a), a, arrays), 1.0, rtol=1e-5)
    assert math.prod(a.y_shape) == 2 * 2 * 37 * 5
