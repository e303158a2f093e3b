"""What all operators share: shapes, checks, and the way from sums to int8."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import VTAError
from tvm_structured.vta.operators.requantize import Integers, Joined, Requantize, Scale, clipped, multiplied

Int8 = NDArray[np.int8]
Shape = tuple[int, ...]
Pair = tuple[int, int]
Padding = tuple[int, int, int, int]  # top, left, bottom, right


class Operator(ABC):
    """int8 arrays -> one int8 array."""

    name: str

    @property
    def num_inputs(self) -> int:
        return 1

    @abstractmethod
    def output_shape(self, *shapes: Shape) -> Shape:
        """Raises VTAError, naming the operator, for input shapes that it does not take."""

    @abstractmethod
    def compute(self, *inputs: Int8) -> Int8:
        """The meaning, for inputs that were checked."""

    def reference(self, *inputs: Int8) -> Int8:
        """The exact result. Raises VTAError for inputs of another number, type or shape."""
        for index, x in enumerate(inputs):
            if not isinstance(x, np.ndarray) or x.dtype != np.int8:
                raise VTAError(f"{self.name}: input {index} is {getattr(x, 'dtype', type(x).__name__)}; expected int8")
        self.output_shape(*(x.shape for x in inputs))
        return self.compute(*inputs)

    def check_inputs(self, shapes: tuple[Shape, ...], ndim: int, channels: int | None = None) -> None:
        if len(shapes) != self.num_inputs:
            raise VTAError(f"{self.name}: {len(shapes)} inputs; it takes {self.num_inputs}")
        first = shapes[0]
        expected = f"{ndim} extents" + ("" if channels is None else f", {channels} channels")
        if len(first) != ndim or (channels is not None and first[1] != channels) or min(first) < 1:
            raise VTAError(f"{self.name}: an input of shape {first}; expected {expected}, none of them 0")


def absolute_sums(weight: Int8, axes: int | tuple[int, ...]) -> Integers:
    """sum |w| over some axes, exact."""
    sums: Integers = np.abs(weight.astype(np.int16)).sum(axis=axes, dtype=np.int64)
    return sums


def check_array(name: str, what: str, array: Any, dtype: Any, shape: tuple[int | None, ...]) -> None:
    """Raise VTAError unless the array has the type and the shape (None: any extent from 1)."""
    found = getattr(array, "shape", None)
    right = found is not None and len(found) == len(shape) and array.dtype == dtype
    if not right or any(a < 1 or (b is not None and a != b) for a, b in zip(found or (), shape, strict=False)):
        wanted = ", ".join("n" if extent is None else str(extent) for extent in shape)
        raise VTAError(
            f"{name}: {what} is {getattr(array, 'dtype', type(array).__name__)} of shape {found}; "
            f"expected {np.dtype(dtype)} of shape ({wanted})"
        )


def check_numbers(name: str, what: str, values: Any, count: int, least: int) -> None:
    whole = isinstance(values, tuple) and all(isinstance(v, (int, np.integer)) for v in values)
    if not whole or len(values) != count or min(values) < least:
        raise VTAError(f"{name}: {what}={values!r}; expected a tuple of {count} whole numbers from {least}")


@dataclass(frozen=True, eq=False)
class Weighted(Operator):
    """clip(requantize(sum of products + bias) [+ residual]). `residual` scales a second input of the output's shape;
    a `Joined` one is added before the shift of the requantisation instead of behind it."""

    weight: Int8
    bias: NDArray[np.int32] | None = None
    requantize: Requantize = field(default_factory=Requantize)
    residual: Scale | None = None
    name: str = "layer"

    def __post_init__(self) -> None:
        self.check_weight()
        if self.bias is not None:
            check_array(self.name, "bias", self.bias, np.int32, (self.out_channels,))
        bound = self.requantize.check(self.name, self.acc_bound)
        if self.residual is not None:
            self.check_scale(self.residual, int(bound.max()))

    def check_scale(self, residual: Scale, bound: int) -> None:
        """`bound`: of |result| without the residual."""
        if isinstance(residual, Joined):
            if residual.shift > self.requantize.shift:
                raise VTAError(
                    f"{self.name}: the residual joins where {residual.shift} bits of the shift are left, which is "
                    f"{self.requantize.shift}; use a smaller shift of the residual"
                )
            multiplied(self.name, (bound + 1 << residual.shift) + 128 * abs(residual.multiplier), 1, 0)
            return
        multiplied(self.name, bound + residual.bound, 1, 0)
        multiplied(self.name, 128, residual.multiplier, residual.shift)

    def result_bound(self) -> int:
        """Of |result| before the clip, for any int8 input."""
        bound = int(self.requantize.check(self.name, self.acc_bound).max())
        if self.residual is None:
            return bound
        return bound + self.residual.bound + isinstance(self.residual, Joined)

    @property
    def num_inputs(self) -> int:
        return 1 if self.residual is None else 2

    @property
    @abstractmethod
    def out_channels(self) -> int:
        """Extent of bias and multipliers."""

    @abstractmethod
    def check_weight(self) -> None:
        """Raise VTAError for a weight or geometry that means nothing."""

    @abstractmethod
    def weight_sums(self) -> Integers:
        """sum |w| over what one output channel can see, shape (channels,)."""

    @abstractmethod
    def products(self, x: Int8) -> Integers:
        """The sums without bias."""

    @cached_property
    def acc_bound(self) -> Integers:
        """Of |acc| for any int8 input, shape (channels,)."""
        bias = 0 if self.bias is None else np.abs(self.bias.astype(np.int64))
        bound: Integers = 128 * self.weight_sums() + bias
        return bound

    def check_residual(self, shapes: tuple[Shape, ...], output: Shape) -> None:
        if self.residual is not None and shapes[1] != output:
            raise VTAError(f"{self.name}: the residual has shape {shapes[1]}; the output has {output}")

    def compute(self, *inputs: Int8) -> Int8:
        acc = self.products(inputs[0])
        if self.bias is not None:
            acc = acc + self.bias.astype(np.int64).reshape(-1, *[1] * (acc.ndim - 2))
        values = self.requantize.scaled(acc)
        if isinstance(self.residual, Joined):
            joined = inputs[1].astype(np.int64) * self.residual.multiplier
            values = self.requantize.scaled(acc, joined, self.residual.shift)
        elif self.residual is not None:
            values = values + self.residual.reference(inputs[1])
        return clipped(values, self.requantize.low, self.requantize.high)
