"""Convolution without a structure: y = act(conv(x, w) + b), NCHW or in blocks of channels.

NCHW has three forms, chosen by a model of their cost: pixels in lanes (short sums, few output channels), output
channels in lanes (small images, strides), depthwise. Of blocks there is one form, and one for depthwise; an image that
only begins them (NCHW in, blocks out) has its output channels in lanes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from tvm_structured.schedules import conv_blocks, conv_channels, conv_pixels, depthwise, depthwise_blocks
from tvm_structured.schedules.base import Config, Kernel, Site
from tvm_structured.schedules.channel_blocks import BlockWriter, block_view
from tvm_structured.schedules.conv_cost import ranked_configs
from tvm_structured.schedules.conv_units import pack_blocks, packed_shape
from tvm_structured.schedules.emit import Emitter, arg, prim_func
from tvm_structured.schedules.images import ImageShape, ImageWriter, view
from tvm_structured.structures.base import Structure

EMIT = {
    "pixels": conv_pixels.emit,
    "channels": conv_channels.emit,
    "depthwise": depthwise.emit,
    "blocks": conv_blocks.emit,
    "depthwise blocks": depthwise_blocks.emit,
}


class Conv2dKernel(Kernel):
    """Direct convolution of any kernel, stride, padding, dilation and group count."""

    name = "conv2d"
    takes_images = True

    def configs(self, structure: Structure, site: Site) -> Iterator[Config]:
        shape = ImageShape.of(site)
        if shape.channels == 1 and shape.groups > 1:
            yield from (depthwise_blocks if site.blocked_x else depthwise).configs(shape, site.cpu)
        else:
            forms = ("blocks",) if site.blocked_x else ("channels",) if site.blocked_y else ("pixels", "channels")
            yield from ranked_configs(shape.joined(), site.cpu, forms)

    def pack(self, structure: Structure, site: Site, config: Config) -> dict[str, np.ndarray]:
        shape = ImageShape.of(site)
        matrix = np.asarray(structure.dense())
        lanes = site.cpu.lanes
        if config["form"] == "depthwise":
            return {"weight": depthwise.pack(matrix, shape)}
        if config["form"] == "depthwise blocks":
            return {"weight": depthwise_blocks.pack(matrix, shape, lanes)}
        if config["form"] == "blocks":
            return {"weight": conv_blocks.pack(matrix, shape, lanes, config["nr"])}
        return {"weight": pack_blocks(matrix, shape, block_size(site, config), config["form"] == "pixels")}

    def prim_func(self, structure: Structure, site: Site, config: Config) -> Any:
        shape, e = ImageShape.of(site).joined(), Emitter(site.cpu)
        with prim_func(self.name) as made:
            x = arg("x", site.stored_x)
            weight = arg("weight", self.packed_shape(shape, site, config))
            writer = (BlockWriter if site.blocked_y else ImageWriter)(e, site.epilogue, site.y_shape)
            EMIT[config["form"]](e, shape, config, flat_image(x, site), weight, writer)
        return made.func

    def packed_shape(self, shape: ImageShape, site: Site, config: Config) -> tuple[int, ...]:
        """The shape of `pack`."""
        lanes = site.cpu.lanes
        match config["form"]:
            case "depthwise":
                return (shape.groups, shape.outs, shape.taps)
            case "depthwise blocks":
                return (-(-shape.groups // lanes), shape.taps, lanes)
            case "blocks":
                return conv_blocks.packed_shape(shape, lanes, config["nr"])
        return packed_shape(shape, block_size(site, config))


def flat_image(x: Any, site: Site) -> Any:
    """x as convolutions read it: (batch, channels, pixels), or (batch, blocks, pixels * lanes)."""
    return block_view(x) if site.blocked_x else view(x, (*site.x_shape[:2], math.prod(site.x_shape[2:])))


def block_size(site: Site, config: Config) -> int:
    """Output channels that are computed together."""
    return config["mr"] if config["form"] == "pixels" else config["nr"] * site.cpu.lanes
