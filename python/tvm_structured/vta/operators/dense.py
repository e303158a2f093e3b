"""Matrix products: whole, block diagonal, in chains, and of structured weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import VTAError
from tvm_structured.vta.operators.base import Int8, Operator, Shape, Weighted, absolute_sums, check_array
from tvm_structured.vta.operators.requantize import Integers, Requantize, Scale


@dataclass(frozen=True, eq=False)
class Int8Dense(Weighted):
    """(n, in) -> (n, out): x W^T, weight (out, in)."""

    def check_weight(self) -> None:
        check_array(self.name, "weight", self.weight, np.int8, (None, None))

    @property
    def out_channels(self) -> int:
        return int(self.weight.shape[0])

    def weight_sums(self) -> Integers:
        return absolute_sums(self.weight, 1)

    def output_shape(self, *shapes: Shape) -> Shape:
        self.check_inputs(shapes, 2, int(self.weight.shape[1]))
        output = (shapes[0][0], self.out_channels)
        self.check_residual(shapes, output)
        return output

    def products(self, x: Int8) -> Integers:
        return exact_product(x, self.weight.T)


def exact_product(a: NDArray[Any], b: NDArray[Any]) -> Integers:
    """Matrix product of integers; float64 is exact, since no sum of an operator leaves 32 bits."""
    product: Integers = np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.int64)
    return product


@dataclass(frozen=True, eq=False)
class Int8BlockDiagonal(Weighted):
    """(n, groups * in) -> (n, groups * out): the features, taken in the order `in_order`, are cut into `groups` equal
    parts, each multiplied by its own matrix or by the one they share; then feature i of the result is feature
    `out_order[i]` of the products.

    weight: (groups, out, in), or (1, out, in) shared. Orders: permutations, None for the given order. Bias and
    multipliers belong to the result's features.
    """

    groups: int = 1
    in_order: NDArray[np.int64] | None = None
    out_order: NDArray[np.int64] | None = None

    def check_weight(self) -> None:
        check_array(self.name, "weight", self.weight, np.int8, (None, None, None))
        if self.groups < 1 or self.weight.shape[0] not in (1, self.groups):
            raise VTAError(f"{self.name}: {self.weight.shape[0]} matrices for {self.groups} groups; give 1 or as many")
        for what, order, count in (
            ("in_order", self.in_order, self.in_features),
            ("out_order", self.out_order, self.out_channels),
        ):
            if order is not None and not np.array_equal(np.sort(order), np.arange(count)):
                raise VTAError(f"{self.name}: {what} is no permutation of 0 to {count - 1}")

    @property
    def in_features(self) -> int:
        return self.groups * int(self.weight.shape[2])

    @property
    def out_channels(self) -> int:
        return self.groups * int(self.weight.shape[1])

    def output_shape(self, *shapes: Shape) -> Shape:
        self.check_inputs(shapes, 2, self.in_features)
        output = (shapes[0][0], self.out_channels)
        self.check_residual(shapes, output)
        return output

    def weight_sums(self) -> Integers:
        sums = absolute_sums(self.weight, 2)
        every: Integers = np.broadcast_to(sums, (self.groups, sums.shape[1])).reshape(-1)
        return every if self.out_order is None else every[self.out_order]

    def products(self, x: Int8) -> Integers:
        taken = x if self.in_order is None else x[:, self.in_order]
        parts = taken.reshape(len(x), self.groups, -1).transpose(1, 0, 2)
        result = exact_product(parts, self.weight.transpose(0, 2, 1)).transpose(1, 0, 2).reshape(len(x), -1)
        return result if self.out_order is None else result[:, self.out_order]

    def dense(self) -> Int8:
        """The whole matrix, (groups * out, groups * in)."""
        groups, (out, inner) = self.groups, self.weight.shape[1:]
        whole = np.zeros((groups, out, groups, inner), np.int8)
        whole[np.arange(groups), :, np.arange(groups)] = self.weight
        matrix = whole.reshape(groups * out, groups * inner)
        if self.in_order is not None:
            matrix = matrix[:, np.argsort(self.in_order)]
        return matrix if self.out_order is None else matrix[self.out_order]


@dataclass(frozen=True, eq=False)
class Int8Chain(Operator):
    """factors[-1](... factors[0](x)), int8 between them: low rank, tensor trains, butterflies."""

    factors: tuple[Int8Dense | Int8BlockDiagonal, ...]
    name: str = "chain"

    def __post_init__(self) -> None:
        if not self.factors:
            raise VTAError(f"{self.name}: a chain needs at least one factor")
        for before, after in zip(self.factors, self.factors[1:], strict=False):
            after.output_shape((1, before.out_channels), *[(1, after.out_channels)] * (after.num_inputs - 1))
        if any(factor.residual is not None for factor in self.factors[:-1]):
            raise VTAError(f"{self.name}: only the last factor may have a residual")

    @property
    def num_inputs(self) -> int:
        return self.factors[-1].num_inputs if len(self.factors) > 1 else self.factors[0].num_inputs

    def output_shape(self, *shapes: Shape) -> Shape:
        self.check_inputs(shapes, 2)
        first, *rest = shapes
        for factor in self.factors[:-1]:
            first = factor.output_shape(first)
        return self.factors[-1].output_shape(first, *rest)

    def compute(self, *inputs: Int8) -> Int8:
        x, *rest = inputs
        for factor in self.factors[:-1]:
            x = factor.compute(x)
        return self.factors[-1].compute(x, *rest)


class Expandable(Protocol):
    """A structure with integer factors, such as those of `tvm_structured.structures`."""

    @property
    def name(self) -> str: ...

    def dense(self) -> Any: ...


@dataclass(frozen=True, eq=False)
class Int8StructuredDense(Operator):
    """(n, in) -> (n, out): the dense layer whose weight is `structure.dense()`, for example a BlockCirculant or a
    PermutedDiagonal with int8 factors."""

    structure: Expandable
    bias: NDArray[np.int32] | None = None
    requantize: Requantize = field(default_factory=Requantize)
    residual: Scale | None = None
    name: str = "layer"
    expanded: Int8Dense = field(init=False, repr=False)

    def __post_init__(self) -> None:
        whole = np.asarray(self.structure.dense())
        narrow = whole.astype(np.int8)
        if not np.array_equal(narrow, whole):
            raise VTAError(f"{self.name}: the {self.structure.name} weight is no int8 matrix; quantise its factors")
        dense = Int8Dense(narrow, self.bias, self.requantize, self.residual, self.name)
        object.__setattr__(self, "expanded", dense)

    @property
    def num_inputs(self) -> int:
        return self.expanded.num_inputs

    def output_shape(self, *shapes: Shape) -> Shape:
        return self.expanded.output_shape(*shapes)

    def compute(self, *inputs: Int8) -> Int8:
        return self.expanded.compute(*inputs)
