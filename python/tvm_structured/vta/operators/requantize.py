"""From 32-bit sums back to 8 bits in what the ALU can do: add, multiply (low 32 bits), shift right, clip."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import VTAError

Integers = NDArray[np.int64]
LARGEST_ACC = (1 << 31) - 1
LARGEST_IMMEDIATE = (1 << 15) - 1
LARGEST_ROUNDING = 1 << 14  # the largest power of two that is an immediate


def rounding(shift: int) -> int:
    """What is added before a shift, so that it rounds to nearest (ties upward)."""
    return 1 << (shift - 1) if shift else 0


def rounding_shift(values: Integers, shift: int) -> Integers:
    """(values + rounding(shift)) >> shift."""
    shifted: Integers = (values + rounding(shift)) >> shift
    return shifted


def check_shift(name: str, shift: Any) -> None:
    if not isinstance(shift, (int, np.integer)) or isinstance(shift, bool) or not 0 <= shift <= 31:
        raise VTAError(f"{name}={shift!r}: expected a whole number from 0 to 31")


def check_clip(low: Any, high: Any) -> None:
    whole = all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in (low, high))
    if not whole or not -128 <= low <= high <= 127:
        raise VTAError(f"low={low!r}, high={high!r}: expected whole numbers, -128 <= low <= high <= 127")


def clipped(values: Integers, low: int, high: int) -> NDArray[np.int8]:
    return np.clip(values, low, high).astype(np.int8)


def multiplied(name: str, bound: Any, multiplier: Any, shift: int) -> Integers:
    """Bound of |round((acc * multiplier) >> shift)| from that of |acc|. Raises VTAError if 32 bits may not hold it."""
    product = np.asarray(bound, np.int64) * np.abs(np.asarray(multiplier, np.int64))
    largest = product + min(rounding(shift), LARGEST_ROUNDING)
    if largest.size and int(largest.max()) > LARGEST_ACC:
        raise VTAError(
            f"{name}: the product with the multiplier may reach {int(largest.max())}, more than 32 bits hold "
            f"({LARGEST_ACC}); use a larger pre_shift or a smaller multiplier"
        )
    return rounding_shift(product, shift)


@dataclass(frozen=True, eq=False)
class Scale:
    """x -> (x * multiplier + rounding) >> shift for int8 values; the multiplier is an immediate (16 bits)."""

    multiplier: int = 1
    shift: int = 0

    def __post_init__(self) -> None:
        value = self.multiplier
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or abs(value) > LARGEST_IMMEDIATE:
            raise VTAError(
                f"multiplier={value!r}: expected a whole number from -{LARGEST_IMMEDIATE} to {LARGEST_IMMEDIATE}"
            )
        check_shift("shift", self.shift)

    def reference(self, x: NDArray[Any]) -> Integers:
        """int64, of the input's shape."""
        return rounding_shift(x.astype(np.int64) * self.multiplier, self.shift)

    @property
    def bound(self) -> int:
        """Of |result| for any int8 input."""
        return int(rounding_shift(np.int64(128 * abs(self.multiplier)), self.shift))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Joined(Scale):
    """The scale of a residual that joins the sums before the last `shift` bits of theirs are cut off, see `Requantize`;
    both are rounded once."""


@dataclass(frozen=True, eq=False)
class Requantize:
    """acc (int32, bias included) -> int8:

        a = (acc + rounding(pre_shift)) >> pre_shift
        b = (a * multiplier + rounding(shift)) >> shift          rounding(s) = 1 << (s - 1), 0 for s = 0
        clip(b, low, high)

    `multiplier` is one integer, or one for each output channel, shape (channels,), int32. Without `rounds` nothing is
    added before the shifts: the bias has the rounding in it. A residual r with `Joined(m, s)`, s <= shift, makes

        b = (a * multiplier + (r * m << (shift - s)) + rounding(shift)) >> shift

    An operator proves that no step leaves 32 bits, or raises VTAError.
    """

    pre_shift: int = 0
    multiplier: int | NDArray[Any] = 1
    shift: int = 0
    low: int = -128
    high: int = 127
    rounds: bool = True
    is_scalar: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        check_shift("pre_shift", self.pre_shift)
        check_shift("shift", self.shift)
        check_clip(self.low, self.high)
        values = np.asarray(self.multiplier)
        if values.ndim > 1 or not np.issubdtype(values.dtype, np.integer) or not values.size:
            raise VTAError(
                f"multiplier of type {values.dtype} and shape {values.shape}: expected an integer, or an array of "
                "one integer for each output channel"
            )
        if int(np.abs(values.astype(np.int64)).max()) > LARGEST_ACC:
            raise VTAError(f"multiplier: {int(np.abs(values).max())} does not fit 32 bits")
        object.__setattr__(self, "is_scalar", values.ndim == 0)
        stored = int(values) if values.ndim == 0 else values.astype(np.int32)
        object.__setattr__(self, "multiplier", stored)

    def rounding(self, shift: int) -> int:
        """What this requantisation adds before a shift."""
        return rounding(shift) if self.rounds else 0

    def check(self, name: str, bound: Integers) -> Integers:
        """Bound of |b| without a residual for each channel, from that of |acc|, shape (channels,).

        Raises VTAError, naming the operator, where a step may overflow or the multipliers are not one a channel.
        """
        if not self.is_scalar and np.shape(self.multiplier) != np.shape(bound):
            raise VTAError(
                f"{name}: {np.size(self.multiplier)} multipliers for {len(bound)} output channels; give one for each"
            )
        widest = bound + rounding(self.pre_shift)
        if widest.size and int(widest.max()) > LARGEST_ACC:
            raise VTAError(
                f"{name}: the sum with its bias may reach {int(widest.max())}, more than 32 bits hold "
                f"({LARGEST_ACC}); split the layer or use smaller weights"
            )
        # what is not rounded to nearest may lie one further from 0
        more = 0 if self.rounds else 1
        before = rounding_shift(bound, self.pre_shift) + (more if self.pre_shift else 0)
        return multiplied(name, before, self.multiplier, self.shift) + (more if self.shift else 0)

    def scaled(self, acc: Integers, joined: Integers | None = None, bits: int = 0) -> Integers:
        """b of sums of shape (n, channels, ...); `joined`, of the same shape, is added where `bits` of the shift are
        left."""
        factor: Any = self.multiplier
        if not self.is_scalar:
            factor = np.asarray(self.multiplier, np.int64).reshape(-1, *[1] * (acc.ndim - 2))
        before = (acc + self.rounding(self.pre_shift)) >> self.pre_shift
        product = before * factor + self.rounding(self.shift)
        result: Integers = product >> self.shift
        if joined is not None:
            result = ((product >> (self.shift - bits)) + joined) >> bits
        return result
