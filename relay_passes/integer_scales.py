"""From real factors to integer ones: weights by channel, and the multipliers and shifts that rescale sums.

The scale of a weight's channel is ours to choose, so it is chosen such that rescaling is exact: with activations
x = x_scale * q_x and y = y_scale * q_y,

    w_scale[c] = multiplier[c] * 2^-shift * y_scale / x_scale

holds for an integer multiplier[c], the least that lets the channel's largest weight fit into int8. Only weights and
results are rounded. The shift is the largest one with which no sum can leave 32 bits, whatever the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvm_structured.structures.layer import Array

LEVELS = 127  # of each sign: the scale stays the same for w and -w
WORST_INPUT = 128  # |q_x|
LARGEST_SUM = (1 << 31) - 1
LARGEST_MULTIPLIER = (1 << 14) - 1
LARGEST_SHIFT = 30
FINE = 16  # steps of the sums in one of the results
LEAST_MULTIPLIER = 64  # of a joined residual


@dataclass(frozen=True, eq=False)
class Channels:
    """Of every output channel, shape (out,): scale (float64) of its weights, multiplier (int32); one shift for all."""

    scale: Array
    multiplier: Array
    shift: int

    @property
    def are_fine(self) -> bool:
        """Whether a step of the sums is so small beside one of the results that the bias may hold the rounding."""
        return bool(2.0**self.shift >= FINE * self.multiplier.max(initial=1))


def fit_channels(
    largest: Array, sums: Array, count: int, bias: Array, x_scale: float, y_scale: float
) -> Channels | None:
    """largest, sums: max |w| and sum |w| of each channel; count: its number of weights; bias: real, (out,).

    None where no shift keeps the sums within 32 bits.
    """
    ratio = largest.astype(np.float64) / LEVELS * (x_scale / y_scale)
    for shift in range(LARGEST_SHIFT, -1, -1):
        # what exceeds a whole number by a rounding error of this very computation does not ask for the next one
        multiplier = np.maximum(1, np.ceil(ratio * 2.0**shift * (1 - 1e-9)))
        if multiplier.max(initial=1) > LARGEST_MULTIPLIER:
            continue
        scale = multiplier * 2.0**-shift * (y_scale / x_scale)
        weights = sums / scale + count / 2  # rounded to nearest
        bound = WORST_INPUT * weights + np.abs(bias) / (scale * x_scale) + 1
        rounding = 2.0 ** (shift - 1) if shift else 0.0
        if np.all(bound * multiplier + rounding <= LARGEST_SUM):
            return Channels(scale, multiplier.astype(np.int32), shift)
    return None


def fit_joined(ratio: float) -> tuple[int, int] | None:
    """(multiplier, shift) with the largest multiplier * 2^-shift that the ratio reaches, of multipliers from 64 to 127:
    what a tile of int8 weights can hold. None for ratios from 128 on, or next to nothing."""
    for shift in range(LARGEST_SHIFT - 1):
        multiplier = int(ratio * 2.0**shift * (1 + 1e-9))
        if multiplier > LEVELS:
            return None
        if multiplier >= LEAST_MULTIPLIER:
            return multiplier, shift
    return None


def to_int8(values: Array, scale: Array | float) -> Array:
    """Rounded to nearest, at most 127 in magnitude."""
    rounded: Array = np.clip(np.rint(values / scale), -LEVELS, LEVELS).astype(np.int8)
    return rounded


def fit_scale(ratio: float, count: int = 1) -> tuple[int, int] | None:
    """(multiplier, shift) with multiplier * 2^-shift nearest to the ratio, for sums of `count` int8 values; None for
    a ratio that 16-bit multipliers cannot hold, or that is next to nothing."""
    for shift in range(LARGEST_SHIFT, -1, -1):
        multiplier = round(ratio * 2**shift)
        rounding = 1 << (shift - 1) if shift else 0
        if multiplier < 1 << 15 and WORST_INPUT * count * multiplier + rounding <= LARGEST_SUM:
            return (multiplier, shift) if multiplier else None
    return None
