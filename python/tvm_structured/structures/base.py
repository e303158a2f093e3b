"""What every structure answers. An author writes four members; the rest is derived.

    sizes(layer)              the members of the family to try, smallest first
    from_dense(layer, **size) the nearest member of that size
    apply(x)                  the meaning, for numpy and torch alike
    flops(rows)               its cost

Arrays are declared with `factor()`; every other field is a static size (int, float, str or a tuple of ints).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import numpy as np
from typing_extensions import Self

from tvm_structured.errors import BudgetError
from tvm_structured.structures.activation_fit import checked_moments, output_error
from tvm_structured.structures.budget import Budget
from tvm_structured.structures.layer import Array, Layer, as_layer, to_detect

Size = Mapping[str, Any]
Member = TypeVar("Member", bound="Structure")
SLICE = 1 << 20  # numbers that are widened to float64 at a time: they stay in cache


def factor(*, trainable: bool = True) -> Any:
    """Declare a dataclass field that holds an array: a trainable factor, or an index (`trainable=False`)."""
    return field(metadata={"factor": True, "trainable": trainable})


@dataclass(frozen=True, eq=False)
class Structure(ABC):
    """One member of a family of matrices (or of convolution algorithms).

    `shape` is that of the matrix, (out, in). For a convolution the matrix is (out, kh * kw * in).
    """

    name: ClassVar[str]
    accepts: ClassVar[tuple[type[Layer], ...]]
    is_lossless: ClassVar[bool] = False  # True: another algorithm for any weight, never an approximation
    is_frobenius_optimal: ClassVar[bool] = False  # True: no member of the same size is nearer than `from_dense`

    shape: tuple[int, int]

    # -- written by the author -------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def sizes(cls, layer: Layer) -> Iterator[Size]:
        """Keyword arguments for `from_dense`, smallest model first; nothing where the family has no member."""

    @classmethod
    @abstractmethod
    def from_dense(cls, layer: Layer, **size: Any) -> Self:
        """The nearest member of the given size (in the Frobenius norm unless the family says otherwise)."""

    @abstractmethod
    def apply(self, x: Any) -> Any:
        """x (..., in) -> (..., out). numpy or torch, whichever x and the factors are; gradients flow."""

    @abstractmethod
    def flops(self, rows: int) -> int:
        """Floating-point operations for `rows` input vectors (a multiply-add counts as two)."""

    # -- derived ---------------------------------------------------------------------------------

    @classmethod
    def members(cls, layer: Layer) -> Iterator[Self]:
        """The nearest member of every size. Families whose sizes share most of the work override it."""
        for size in cls.sizes(layer):
            yield cls.from_dense(layer, **size)

    @classmethod
    def detect(cls, layer: Any, tol: float | None = None) -> Self | None:
        """The smallest member equal to the weight within relative Frobenius error `tol`, else None.

        Without `tol` it is the layer's `tolerance`: 1e-5, more for weights in half precision.
        """
        layer, tol = to_detect(layer, tol)
        if not cls.takes(layer):
            return None
        for member in cls.members(layer):
            if member.num_params < layer.num_params and member.error(layer) <= tol:
                return member
        return None

    @classmethod
    def project(cls, layer: Any, budget: Budget | float) -> Self | None:
        """A member within the budget, else None.

        With `max_error` the smallest one that is near enough, without it the nearest one that is small
        enough. A bare number is `max_params`.
        """
        layer = as_layer(layer)
        budget = as_budget(budget)
        if not cls.takes(layer):
            return None
        return best_of((member for member in cls.members(layer) if fits(member, layer, budget)), layer, budget)

    @classmethod
    def takes(cls, layer: Layer) -> bool:
        """Whether the family is defined for this kind of layer."""
        return isinstance(layer, cls.accepts) and getattr(layer, "groups", 1) == 1

    @property
    def factors(self) -> dict[str, Any]:
        """Name -> array, in the order in which kernels take them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("factor")}

    @classmethod
    def from_factors(cls, sizes: Mapping[str, Any], factors: Sequence[Any]) -> Self:
        """Rebuild a member from `sizes_of` (lists, as JSON has them, become tuples) and its factors in order."""
        static = {name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()}
        names = [f.name for f in fields(cls) if f.metadata.get("factor")]
        return cls(**static, **dict(zip(names, factors, strict=True)))

    @property
    def trainable_factors(self) -> tuple[str, ...]:
        """Names of the factors that are trained (the others are indices)."""
        return tuple(f.name for f in fields(self) if f.metadata.get("trainable"))

    @property
    def sizes_of(self) -> dict[str, Any]:
        """The static fields: everything but the factors. With `factors` they rebuild the member."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata.get("factor")}

    @property
    def num_params(self) -> int:
        """Numbers that are trained."""
        return sum(math.prod(self.factors[name].shape) for name in self.trainable_factors)

    @property
    def num_bytes(self) -> int:
        """Bytes of all factors, indices included."""
        return sum(math.prod(array.shape) * array.dtype.itemsize for array in self.factors.values())

    def dense(self) -> Any:
        """The (out, in) matrix, by applying the member to the identity. Of the kind of the factors: numpy, or torch,
        where gradients flow into them."""
        first = self.factors[self.trainable_factors[0]]
        if not hasattr(first, "detach"):
            return np.ascontiguousarray(self.apply(np.eye(self.shape[1], dtype=first.dtype)).T)
        import torch

        return self.apply(torch.eye(self.shape[1], dtype=first.dtype, device=first.device)).T.contiguous()

    def error(self, layer: Any) -> float:
        """Relative Frobenius error against the weight; the absolute one where the weight is zero."""
        matrix, dense = as_layer(layer).matrix, self.dense()
        step = max(1, SLICE // self.shape[1])
        difference = norm = 0.0
        for first in range(0, self.shape[0], step):
            piece = matrix[first : first + step].astype(np.float64)
            norm += float(np.square(piece).sum())
            difference += float(np.square(piece - dense[first : first + step]).sum())
        return math.sqrt(difference / (norm or 1.0))

    @classmethod
    def drawn(cls, layer: Layer, rng: np.random.Generator, **size: Any) -> Self:
        """A member of that size with random numbers, to train from scratch. `layer` gives the geometry, not the values.

        By projecting a random matrix; families for which that takes long draw their factors.
        """
        matrix = rng.standard_normal(layer.matrix.shape, dtype=np.float32)
        return cls.from_dense(layer.with_matrix(matrix), **size)

    def refit(self, layer: Layer, moments: Array) -> Self | None:
        """The member of the same sizes whose outputs are nearest on inputs with the second moments E[x x^T], (in, in).

        None where the family has no closed form. Raises ModelError for moments of another shape.
        """
        return None

    def output_error(self, layer: Layer, moments: Array) -> float:
        """sqrt(E ||(W' - W) x||^2 / E ||W x||^2) for inputs with these second moments."""
        matrix = layer.matrix.astype(np.float64)
        return output_error(self.dense() - matrix, matrix, checked_moments(layer, moments))

    def describe(self) -> str:
        """The sizes in a few characters, for tables: `block=8`."""
        return ""


def as_budget(budget: Any) -> Budget:
    """A Budget as it is; a bare number is `max_params`."""
    if isinstance(budget, Budget):
        return budget
    if isinstance(budget, (int, float)) and not isinstance(budget, bool):
        return Budget(max_params=budget)
    raise BudgetError(f"a budget is a ts.Budget or a fraction of the dense parameters, got {budget!r}")


def fits(member: Structure, layer: Layer, budget: Budget) -> bool:
    """Whether parameters and operations stay within the budget (the error is not looked at)."""
    if budget.max_params is not None and member.num_params > budget.max_params * layer.num_params:
        return False
    return budget.max_flops is None or member.flops(layer.rows(1)) <= budget.max_flops * layer.flops(1)


def best_of(members: Iterable[Member], layer: Layer, budget: Budget) -> Member | None:
    """Of members that are small enough, smallest first: the first within `max_error`, or without one the nearest."""
    best, best_error = None, math.inf
    for member in members:
        error = member.error(layer)
        if budget.max_error is not None and error <= budget.max_error:
            return member
        if budget.max_error is None and error < best_error:
            best, best_error = member, error
    return best
