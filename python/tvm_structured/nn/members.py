"""From a torch user's arguments to a member: sizes, convolution geometry, arrays."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tvm_structured.errors import ModelError
from tvm_structured.structures import STRUCTURES, Conv2d, Layer, Structure

Pair = int | tuple[int, int]
Padding = int | tuple[int, int] | tuple[int, int, int, int] | str


def make_member(structure: str, layer: Layer, size: Mapping[str, Any]) -> Structure:
    """The member of that family and size nearest to the layer's weight."""
    return checked_family(structure, layer, size).from_dense(layer, **size)


def draw_member(structure: str, layer: Layer, size: Mapping[str, Any]) -> Structure:
    """A random member of that family and size, from torch's generator; of the layer only the geometry counts."""
    seed = int(torch.randint(2**62, ()))
    return checked_family(structure, layer, size).drawn(layer, np.random.default_rng(seed), **size)


def checked_family(structure: str, layer: Layer, size: Mapping[str, Any]) -> type[Structure]:
    """The family of that name. Raises ModelError where it is unknown, not for this layer or not of such a size."""
    family = STRUCTURES.get(structure)
    if family is None:
        raise ModelError(f"no structure is called {structure!r}; choose one of {', '.join(STRUCTURES)}")
    if not family.takes(layer):
        raise ModelError(f"{structure} is not defined for {describe_geometry(layer)}")
    try:
        inspect.signature(family.from_dense).bind(layer, **size)
    except TypeError as error:
        example = next(iter(family.sizes(layer)), None)
        hint = f"; for example {', '.join(f'{k}={v}' for k, v in example.items())}" if example else ""
        raise ModelError(f"{structure} of shape {layer.matrix.shape}: {error}{hint}") from None
    return family


def weightless(*shape: int) -> np.ndarray[Any, Any]:
    """Zeros that take no memory, for a layer of which only the geometry counts."""
    return np.broadcast_to(np.float32(0), shape)


def conv_layer(weight: np.ndarray[Any, Any], stride: Pair, padding: Padding, dilation: Pair) -> Conv2d:
    """A convolution with arguments as torch takes them."""
    kernel = int(weight.shape[2]), int(weight.shape[3])
    return Conv2d("weight", weight, pair(stride), four_sides(padding, kernel, pair(dilation)), pair(dilation))


def describe_geometry(layer: Layer) -> str:
    """What a refusal names: the weight's shape, for a convolution also its stride and dilation."""
    where = f", stride {layer.stride} and dilation {layer.dilation}" if isinstance(layer, Conv2d) else ""
    return f"a weight of shape {layer.weight.shape}{where}"


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A copy as numpy; bfloat16, which numpy lacks, becomes float32 (exactly)."""
    tensor = tensor.detach().cpu()
    return np.array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(), order="C")


def pair(value: Pair) -> tuple[int, int]:
    """3 -> (3, 3)."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def four_sides(padding: Padding, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a torch padding: a number, (vertical, horizontal), "same" or "valid"."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":  # an odd total puts the extra row below and the extra column right, as torch does
        height, width = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
        return height // 2, width // 2, height - height // 2, width - width // 2
    if isinstance(padding, str):
        raise ModelError(f"padding={padding!r} is unknown; give numbers, 'same' or 'valid'")
    if isinstance(padding, int) or len(padding) == 2:
        return pair(padding) * 2
    top, left, bottom, right = padding
    return top, left, bottom, right
