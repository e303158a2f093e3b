"""Pooling, additions and changes of scale: operators of the ALU alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering_harness import CONFIGS, DEFAULT, TINY, check, names, seeds

from tvm_structured.errors import VTAError
from tvm_structured.vta import VTAConfig
from tvm_structured.vta.lower import Schedule, lower
from tvm_structured.vta.operators import Int8Add, Int8AvgPool, Int8MaxPool, Int8Rescale, Scale

INT4 = replace(TINY, log_inp_width=2, log_wgt_width=2)
pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))
scales = st.builds(Scale, st.integers(-32767, 32767), st.integers(0, 24))


def run(operator: Int8Add | Int8MaxPool | Int8AvgPool | Int8Rescale, config: VTAConfig, *inputs: np.ndarray) -> None:
    lowered = lower(operator, [x.shape for x in inputs], config)
    np.testing.assert_array_equal(lowered.run(*inputs), operator.reference(*inputs))


@settings(max_examples=40)
@given(
    names, seeds, st.booleans(), pairs, pairs, st.tuples(*[st.integers(0, 3)] * 4), st.integers(4, 12),
    st.integers(4, 12), st.integers(1, 40), st.integers(1, 2),
)  # fmt: skip
def test_pooling_of_any_shape(
    config: str, seed: int, is_max: bool, kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int, int, int], height: int, width: int, channels: int, threads: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    clip = int(rng.integers(-128, 0)), int(rng.integers(0, 128))
    operator = (
        Int8MaxPool(kernel, stride, padding, *clip) if is_max else Int8AvgPool.mean(kernel, stride, padding, *clip)
    )
    check(operator, [(int(rng.integers(1, 3)), channels, height, width)], CONFIGS[config], rng, threads=threads)


@pytest.mark.parametrize("config", [DEFAULT, TINY])
def test_windows_larger_than_the_accumulator(config: VTAConfig) -> None:
    rng = np.random.default_rng(0)
    for operator in (Int8AvgPool.mean((50, 49)), Int8MaxPool((50, 49)), Int8MaxPool((20, 3), (3, 20), (9, 1, 9, 1))):
        check(operator, [(1, 5, 50, 49)], config, rng)


@settings(max_examples=30)
@given(names, seeds, scales, scales, st.integers(-128, 0), st.integers(0, 127), st.integers(1, 2))
def test_sums_and_scales(config: str, seed: int, a: Scale, b: Scale, low: int, high: int, threads: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(extent) for extent in rng.integers(1, (4, 40, 9, 9)))[: 2 if seed % 2 else 4]
    check(Int8Add(a, b, low, high), [shape, shape], CONFIGS[config], rng, threads=threads)
    check(Int8Rescale(a, low, high), [shape], CONFIGS[config], rng, threads=threads)


def test_four_bit_activations_go_through_an_identity() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.integers(-8, 8, (2, 2, 21, 9, 8)).astype(np.int8)
    run(Int8Add(Scale(3, 1), Scale(-2, 0), -8, 7), INT4, x, y)
    run(Int8MaxPool((3, 2), (2, 1), (1, 0, 1, 1), -8, 7), INT4, x)
    run(Int8AvgPool.mean((9, 8), low=-8, high=7), INT4, x)
    with pytest.raises(VTAError, match=r"add: clips to -128\.\.127"):
        lower(Int8Add(), [x.shape, x.shape], INT4)


def test_what_cannot_be_lowered_is_refused() -> None:
    with pytest.raises(VTAError, match="pool: Schedule"):
        lower(Int8MaxPool((3, 3)), [(1, 16, 50, 50)], DEFAULT, Schedule(2, 1, 1, 48, 48, (3, 3)))
    with pytest.raises(VTAError, match="add: Schedule"):
        lower(Int8Add(), [(1, 16)] * 2, DEFAULT, Schedule(columns=1025))
