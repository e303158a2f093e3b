"""Windows over height and width, as convolutions and pooling see them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import VTAError

Pair = tuple[int, int]
Padding = tuple[int, int, int, int]  # top, left, bottom, right


def taps(kernel: Pair) -> list[Pair]:
    return [(i, j) for i in range(kernel[0]) for j in range(kernel[1])]


def window(x: NDArray[Any], tap: Pair, stride: Pair, output: Pair) -> NDArray[Any]:
    """x[..., i + stride * y, j + stride * x] for every output position."""
    rows = slice(tap[0], tap[0] + stride[0] * (output[0] - 1) + 1, stride[0])
    return x[..., rows, tap[1] : tap[1] + stride[1] * (output[1] - 1) + 1 : stride[1]]


def padded(x: NDArray[Any], padding: Padding, value: int = 0) -> NDArray[Any]:
    top, left, bottom, right = padding
    return np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=value)


def window_extents(name: str, size: Pair, kernel: Pair, stride: Pair, padding: Padding) -> Pair:
    """Output height and width. Raises VTAError where the kernel is larger than the padded input."""
    extents = [(extent + padding[i] + padding[i + 2] - kernel[i]) // stride[i] + 1 for i, extent in enumerate(size)]
    if min(extents) < 1:
        raise VTAError(f"{name}: a kernel {kernel} is larger than the input {size} with padding {padding}")
    return extents[0], extents[1]
