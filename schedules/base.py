"""Kernel: the TensorIR of a structure. Site: the place in a model where one is needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from tvm_structured.schedules.cpu import Cpu
from tvm_structured.structures.base import Structure

Config = Mapping[str, Any]
Extent = Any  # int, or a tirx expression where the size is known at run time only


@dataclass(frozen=True)
class Epilogue:
    """What happens to an accumulator before it is stored: act(scale * acc + bias + residual).

    `scale` and `bias` are per output feature (channel), shape (out,); `residual` has the output's shape.
    """

    scale: bool = False
    bias: bool = False
    residual: bool = False
    activation: str = "none"  # one of ACTIVATIONS
    low: float = 0.0  # bounds of "clip"
    high: float = 0.0

    ACTIVATIONS: ClassVar[tuple[str, ...]] = ("none", "relu", "clip", "gelu", "gelu_tanh", "silu")

    @property
    def operands(self) -> tuple[str, ...]:
        """The operands that are present, in the order in which kernels take them."""
        return tuple(name for name in ("scale", "bias", "residual") if getattr(self, name))


@dataclass(frozen=True)
class ConvGeometry:
    """Geometry of a convolution; `padding` is (top, left, bottom, right)."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class Site:
    """Where a kernel is called.

    Dense: x is (rows, in), y is (rows, out); `rows` may be symbolic.
    Convolution: x is (batch, in, h, w), y is (batch, out, oh, ow); only the batch may be symbolic. Either may be stored
    in blocks of `cpu.lanes` channels, see `blocked_shape`. All are float32.
    """

    dtype: ClassVar[str] = "float32"

    x_shape: tuple[Extent, ...]
    y_shape: tuple[Extent, ...]
    cpu: Cpu
    epilogue: Epilogue = field(default_factory=Epilogue)
    conv: ConvGeometry | None = None
    blocked_x: bool = False
    blocked_y: bool = False

    @property
    def rows(self) -> Extent:
        return self.x_shape[0]

    @property
    def stored_x(self) -> tuple[Extent, ...]:
        """The shape of x in memory."""
        return blocked_shape(self.x_shape, self.cpu.lanes) if self.blocked_x else self.x_shape

    @property
    def stored_y(self) -> tuple[Extent, ...]:
        """The shape of y, and of the residual, in memory."""
        return blocked_shape(self.y_shape, self.cpu.lanes) if self.blocked_y else self.y_shape


def blocked_shape(shape: Sequence[Extent], lanes: int) -> tuple[Extent, ...]:
    """(batch, channels, h, w) -> (batch, ceil(channels / lanes), h, w, lanes), known as NCHW16c for 16 lanes.

    Lanes behind the last channel hold finite numbers without meaning.
    """
    batch, channels, height, width = shape
    return (batch, -(-channels // lanes), height, width, lanes)


class Kernel(ABC):
    """One kernel family. Arguments of its PrimFunc: x, *packed, then the epilogue's operands, then y."""

    name: ClassVar[str]
    takes_images: ClassVar[bool] = (
        False  # True: runs on the image itself where the layer is a convolution, not on patches
    )

    @abstractmethod
    def configs(self, structure: Structure, site: Site) -> Iterator[Config]:
        """The tunable space; the first config is the default."""

    @abstractmethod
    def pack(self, structure: Structure, site: Site, config: Config) -> dict[str, np.ndarray]:
        """Constants as the kernel wants them, made at compile time."""

    @abstractmethod
    def prim_func(self, structure: Structure, site: Site, config: Config) -> Any:
        """The TensorIR. Its extents are int64; it is already scheduled."""
