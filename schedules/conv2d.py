"""Convolution without a structure: y = act(conv(x, w) + b), NCHW in and out.

Three forms, chosen by a model of their cost: pixels in lanes (short sums, few output channels), output channels in
lanes (small images, strides), depthwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tvm_structured.schedules import conv_channels, conv_pixels, depthwise
from tvm_structured.schedules.base import Config, Kernel, Site
from tvm_structured.schedules.conv_cost import ranked_configs
from tvm_structured.schedules.conv_units import pack_blocks, packed_shape
from tvm_structured.schedules.emit import Emitter, arg, prim_func
from tvm_structured.schedules.images import ImageShape, ImageWriter, view
from tvm_structured.structures.base import Structure

EMIT = {"pixels": conv_pixels.emit, "channels": conv_channels.emit, "depthwise": depthwise.emit}


class Conv2dKernel(Kernel):
    """Direct convolution of any kernel, stride, padding, dilation and group count."""

    name = "conv2d"

    def configs(self, structure: Structure, site: Site) -> Iterator[Config]:
        shape = ImageShape.of(site)
        if shape.channels == 1 and shape.groups > 1:
            for rows in (4, 2, 8, 1):
                yield {"form": "depthwise", "rows": rows}
            return
        yield from ranked_configs(shape.joined(), site.cpu)

    def pack(self, structure: Structure, site: Site, config: Config) -> dict[str, np.ndarray]:
        shape = ImageShape.of(site)
        matrix = np.asarray(structure.dense())
        if config["form"] == "depthwise":
            return {"weight": depthwise.pack(matrix, shape)}
        return {"weight": pack_blocks(matrix, shape, block_size(site, config), config["form"] == "pixels")}

    def prim_func(self, structure: Structure, site: Site, config: Config) -> Any:
        shape, e = ImageShape.of(site).joined(), Emitter(site.cpu)
        if config["form"] == "depthwise":
            packed: tuple[int, ...] = (shape.groups, shape.outs, shape.taps)
        else:
            packed = packed_shape(shape, block_size(site, config))
        with prim_func(self.name) as made:
            x = arg("x", site.x_shape)
            weight = arg("weight", packed)
            writer = ImageWriter(e, site.epilogue, site.y_shape)
            flat = view(x, (shape.batch, shape.groups * shape.channels, shape.image[0] * shape.image[1]))
            EMIT[config["form"]](e, shape, config, flat, weight, writer)
        return made.func


def block_size(site: Site, config: Config) -> int:
    """Output channels that are computed together."""
    return config["mr"] if config["form"] == "pixels" else config["nr"] * site.cpu.lanes
