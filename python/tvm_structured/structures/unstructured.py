"""A layer that is left as it is: the choice `dense` in a plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import Self

from tvm_structured.structures.base import Size, Structure, factor
from tvm_structured.structures.layer import Conv2d, Dense, Layer, as_layer


@dataclass(frozen=True, eq=False)
class Unstructured(Structure):
    """y = W x with weight (out, in); every kind of layer, every group count."""

    name: ClassVar[str] = "dense"
    accepts: ClassVar[tuple[type[Layer], ...]] = (Dense, Conv2d)
    is_lossless: ClassVar[bool] = True

    weight: Any = factor()

    @classmethod
    def takes(cls, layer: Layer) -> bool:
        return True

    @classmethod
    def sizes(cls, layer: Layer) -> Iterator[Size]:
        yield {}

    @classmethod
    def from_dense(cls, layer: Layer, **size: Any) -> Self:
        matrix = as_layer(layer).matrix
        return cls((int(matrix.shape[0]), int(matrix.shape[1])), matrix)

    def dense(self) -> Any:
        return self.weight

    def apply(self, x: Any) -> Any:
        return x @ self.weight.T

    def flops(self, rows: int) -> int:
        return 2 * rows * self.shape[0] * self.shape[1]
