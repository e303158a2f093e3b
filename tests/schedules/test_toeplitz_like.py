"""The Toeplitz-like kernel and its transforms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_harness import EVERYTHING, check_all_guarded

from tvm_structured.schedules.complex_fft import complex_fft, factor_lengths, twiddles
from tvm_structured.structures.toeplitz_like import ToeplitzLike


class Numbers:
    """Stands in for an Emitter: vectors are numpy arrays."""

    def splat(self, value: float) -> float:
        return value

    def bind(self, value: Any) -> Any:
        return value


@pytest.mark.parametrize("length", [1, 2, 4, 8, 16, 64, 128, 12])
def test_straight_line_transforms_are_those_of_numpy(length: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, length, 3))
    spectrum = complex_fft(Numbers(), list(zip(*x, strict=True)))
    expected = np.fft.fft(x[0] + 1j * x[1], axis=0)
    for (re, im), value in zip(spectrum, expected, strict=True):
        np.testing.assert_allclose(re + 1j * im, value, atol=1e-10)


@pytest.mark.parametrize("length", [256, 512, 8192])
def test_factors_and_tables_fit_the_length(length: int) -> None:
    first, second = factor_lengths(length)
    assert first * second == length and first <= second <= 2 * first
    tables = twiddles(length)
    np.testing.assert_allclose(
        tables[0] + 1j * tables[1], np.exp(-2j * np.pi / length * np.outer(range(first), range(second))), atol=1e-6
    )


@pytest.mark.parametrize(("shape", "rank"), [((1, 1), 1), ((5, 200), 1), ((200, 5), 2), ((64, 64), 3), ((300, 520), 4)])
def test_shapes_ranks_and_odd_batches(guarded: Any, shape: Any, rank: int) -> None:
    rng = np.random.default_rng(1)
    columns, rows = (rng.standard_normal((rank, extent)).astype(np.float32) for extent in shape)
    member = ToeplitzLike(shape, columns, rows / shape[1])
    case = {"structure": member, "rows": (1, 2, 7), "symbolic": True, "epilogue": EVERYTHING}
    assert guarded(check_all_guarded, [case]) == 3
