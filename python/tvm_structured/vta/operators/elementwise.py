"""Element by element: sums of two tensors, and a change of scale."""

from __future__ import annotations

from dataclasses import dataclass, field

from tvm_structured.errors import VTAError
from tvm_structured.vta.operators.base import Int8, Operator, Shape
from tvm_structured.vta.operators.requantize import Scale, check_clip, clipped


@dataclass(frozen=True, eq=False)
class Int8Add(Operator):
    """clip(scale_a(a) + scale_b(b), low, high) for two tensors of one shape; low=0 is a ReLU."""

    scale_a: Scale = field(default_factory=Scale)
    scale_b: Scale = field(default_factory=Scale)
    low: int = -128
    high: int = 127
    name: str = "add"

    def __post_init__(self) -> None:
        check_clip(self.low, self.high)

    @property
    def num_inputs(self) -> int:
        return 2

    def output_shape(self, *shapes: Shape) -> Shape:
        self.check_inputs(shapes, len(shapes[0]) if len(shapes[0]) in (2, 4) else 4)
        if shapes[0] != shapes[1]:
            raise VTAError(f"{self.name}: inputs of shapes {shapes[0]} and {shapes[1]}; expected equal ones")
        return shapes[0]

    def compute(self, *inputs: Int8) -> Int8:
        total = self.scale_a.reference(inputs[0]) + self.scale_b.reference(inputs[1])
        return clipped(total, self.low, self.high)


@dataclass(frozen=True, eq=False)
class Int8Rescale(Operator):
    """clip(scale(x), low, high): a change of scale, a ReLU, a clip."""

    scale: Scale = field(default_factory=Scale)
    low: int = -128
    high: int = 127
    name: str = "rescale"

    def __post_init__(self) -> None:
        check_clip(self.low, self.high)

    def output_shape(self, *shapes: Shape) -> Shape:
        self.check_inputs(shapes, len(shapes[0]) if len(shapes[0]) in (2, 4) else 4)
        return shapes[0]

    def compute(self, *inputs: Int8) -> Int8:
        return clipped(self.scale.reference(inputs[0]), self.low, self.high)
