"""A chain of thin convolutions in one kernel: the steps of spatial low rank, Tucker and CP, and low rank on images.

Every step is emitted by the direct convolution (`conv2d`) onto a workspace that the next one reads, NCHW or in blocks
of channels as the layer's output is. One kernel and not several in the graph: the guard prices and the report names the
layer as a whole, and what lies between the steps never becomes a tensor of the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from tvm_structured.schedules.base import Config, ConvGeometry, Epilogue, Kernel, Site
from tvm_structured.schedules.channel_blocks import BlockWriter
from tvm_structured.schedules.conv2d import EMIT, Conv2dKernel, flat_image
from tvm_structured.schedules.emit import Emitter, arg, prim_func, scratch
from tvm_structured.schedules.images import ImageShape, ImageWriter
from tvm_structured.schedules.space import around
from tvm_structured.structures.base import Structure
from tvm_structured.structures.conv_chain import ConvChain, Step
from tvm_structured.structures.layer import Conv2d
from tvm_structured.structures.unstructured import Unstructured

CONV2D = Conv2dKernel()
OFFERED = 12  # configurations of a step
MOST_CHAINS = 400


class ConvChainKernel(Kernel):
    """The kernel of a `ConvChain`."""

    takes_images: ClassVar[bool] = True

    def configs(self, structure: Structure, site: Site) -> Iterator[Config]:
        """The default of every step, then other choices for one step after the other, then for two."""
        offered = [
            list(itertools.islice(CONV2D.configs(member, place), OFFERED))
            for member, place in zip(*self.parts(structure, site), strict=True)
        ]
        default = {str(step): configs[0] for step, configs in enumerate(offered)}
        others = {str(step): configs[1:] for step, configs in enumerate(offered)}
        for config in itertools.islice(around(default, others), MOST_CHAINS):
            yield {"steps": list(config.values())}

    def pack(self, structure: Structure, site: Site, config: Config) -> dict[str, np.ndarray]:
        parts = zip(*self.parts(structure, site), config["steps"], strict=True)
        return {f"weight{k}": CONV2D.pack(*part)["weight"] for k, part in enumerate(parts)}

    def prim_func(self, structure: Structure, site: Site, config: Config) -> Any:
        shapes = {name: array.shape for name, array in self.pack(structure, site, config).items()}
        with prim_func(self.name) as made:
            x = arg("x", site.stored_x)
            weights = [arg(name, shape) for name, shape in shapes.items()]
            emit_chain(Emitter(site.cpu), self.parts(structure, site)[1], config["steps"], x, weights)
        return made.func

    def steps(self, structure: Structure, site: Site) -> tuple[Step, ...]:
        assert isinstance(structure, ConvChain)
        return structure.steps()

    def parts(self, structure: Structure, site: Site) -> tuple[list[Structure], list[Site]]:
        """The steps' weights as the direct convolution takes them, and where each runs."""
        steps = self.steps(structure, site)
        matrices = [np.asarray(step.matrix) for step in steps]
        return [Unstructured((int(m.shape[0]), int(m.shape[1])), m) for m in matrices], sites_of(steps, site)


def emit_chain(e: Emitter, places: Sequence[Site], configs: Sequence[Config], x: Any, weights: Sequence[Any]) -> None:
    """All steps. The writer of the last one declares the operands, so it is made before any workspace."""
    kind = BlockWriter if places[-1].blocked_y else ImageWriter
    last = kind(e, places[-1].epilogue, places[-1].y_shape)
    source = flat_image(x, places[0])
    for place, config, weight in zip(places, configs, weights, strict=True):
        between = None if place is places[-1] else workspace(place)
        writer = last if between is None else kind.onto(e, between)
        EMIT[config["form"]](e, ImageShape.of(place).joined(), config, source, weight, writer)
        source = between


def workspace(place: Site) -> Any:
    """Room for a step's output. Flat at once: TVM shrinks allocations to what is used, and does not see views."""
    batch, channels, *rest = place.stored_y
    return scratch((batch, channels, math.prod(rest)))


def sites_of(steps: Sequence[Step], site: Site) -> list[Site]:
    """Where each step runs."""
    assert site.conv is not None
    places, shape, blocked = [], site.x_shape, site.blocked_x
    for step in steps:
        conv = geometry_of(step, site.conv)
        outs = int(step.matrix.shape[0])
        weight = np.broadcast_to(np.float32(0), (outs, shape[1] // step.groups, *step.kernel))
        layer = Conv2d("step", weight, conv.stride, conv.padding, conv.dilation, conv.groups, tuple(shape[2:]))
        assert layer.output_hw is not None
        y_shape = (shape[0], outs, *layer.output_hw)
        places.append(Site(shape, y_shape, site.cpu, Epilogue(), conv, blocked, site.blocked_y))
        shape, blocked = y_shape, site.blocked_y
    return [*places[:-1], replace(places[-1], epilogue=site.epilogue)]


def geometry_of(step: Step, conv: ConvGeometry) -> ConvGeometry:
    """The step's share of the layer's stride, padding and dilation."""
    down, right = step.moves
    top, left, bottom, below = conv.padding
    return ConvGeometry(
        step.kernel,
        (conv.stride[0] if down else 1, conv.stride[1] if right else 1),
        (top * down, left * right, bottom * down, below * right),
        (conv.dilation[0] if down else 1, conv.dilation[1] if right else 1),
        step.groups,
    )
