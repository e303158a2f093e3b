"""CP: a chain of thin convolutions, or the weight rebuilt from its factors and then one convolution.

The chain has fewest operations. Rebuilding saves none, but reads the factors (bytes, where they are integers of up to 8
bits) instead of the weight: for layers whose weight does not stay in cache and meets many positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from tvm import tirx

from tvm_structured.schedules import conv_blocks
from tvm_structured.schedules.base import Config, Site
from tvm_structured.schedules.channel_blocks import BlockWriter
from tvm_structured.schedules.conv2d import EMIT, Conv2dKernel, flat_image
from tvm_structured.schedules.conv_chain import OFFERED, ConvChainKernel
from tvm_structured.schedules.emit import Emitter, arg, parallel, prim_func, scratch, serial
from tvm_structured.schedules.gemm import multiply_block, pack_panels
from tvm_structured.schedules.images import ImageShape
from tvm_structured.structures.base import Structure
from tvm_structured.structures.cp import BYTE_BITS, CP


class CPKernel(ConvChainKernel):
    """Both lowerings. Weights are rebuilt in the layout of images in blocks of channels only."""

    name = "cp"

    def configs(self, structure: Structure, site: Site) -> Iterator[Config]:
        chains = super().configs(structure, site)
        yield from itertools.islice(chains, 3)
        rebuilt = Conv2dKernel().configs(structure, site) if site.blocked_x else iter(())
        yield from ({"rebuilt": config} for config in itertools.islice(rebuilt, OFFERED))
        yield from chains

    def pack(self, structure: Structure, site: Site, config: Config) -> dict[str, np.ndarray]:
        """Rebuilt: outputs (blocks, rank, width) and inputs (channels, rank), bytes where they are integers of up to 8
        bits; taps (kh * kw, rank) with the scales."""
        if "rebuilt" not in config:
            return super().pack(structure, site, config)
        assert isinstance(structure, CP)
        outputs, inputs, vertical, horizontal = structure.values()
        lanes = site.cpu.lanes
        padded = np.zeros((conv_blocks.in_blocks(ImageShape.of(site), lanes) * lanes, structure.rank))
        padded[: len(inputs)] = inputs
        taps = np.einsum("yr,xr,r->yxr", vertical, horizontal, structure.scale).reshape(-1, structure.rank)
        dtype = np.int8 if 0 < structure.bits <= BYTE_BITS else np.float32
        return {
            "outputs": pack_panels(outputs, config["rebuilt"]["nr"] * lanes).astype(dtype),
            "inputs": padded.astype(dtype),
            "taps": taps.astype(np.float32),
        }

    def prim_func(self, structure: Structure, site: Site, config: Config) -> Any:
        if "rebuilt" not in config:
            return super().prim_func(structure, site, config)
        e, shape, direct = Emitter(site.cpu), ImageShape.of(site), config["rebuilt"]
        packed = self.pack(structure, site, config)
        with prim_func(self.name) as made:
            x = arg("x", site.stored_x)
            outputs, inputs, taps = (arg(name, array.shape, str(array.dtype)) for name, array in packed.items())
            writer = BlockWriter(e, site.epilogue, site.y_shape)
            weight = scratch(conv_blocks.packed_shape(shape, e.lanes, direct["nr"]))
            rebuild(e, shape, direct["nr"], outputs, inputs, taps, weight)
            EMIT[direct["form"]](e, shape.joined(), direct, flat_image(x, site), weight, writer)
        return made.func


def rebuild(e: Emitter, shape: ImageShape, nr: int, outputs: Any, inputs: Any, taps: Any, weight: Any) -> None:
    """weight[0, block, (input block, tap, lane), :] = sum_r outputs[block, r, :] inputs[channel, r] taps[tap, r]."""
    rank, rows = int(inputs.shape[1]), 4
    blocks, input_blocks = int(outputs.shape[0]), int(inputs.shape[0]) // e.lanes

    def vector(block: Any, r: Any, q: int) -> Any:
        value = e.load(outputs, block, r, q * e.lanes)
        return value if outputs.dtype == "float32" else tirx.Cast(e.dtype, value)

    def scalar(channel: Any, tap: Any, r: Any) -> Any:
        return tirx.Cast("float32", inputs[channel, r]) * taps[tap, r]

    with parallel(0, blocks * input_blocks) as unit:
        block, group = unit // input_blocks, unit % input_blocks
        with serial(0, shape.taps) as tap:
            with serial(0, e.lanes // rows) as four:
                first = group * e.lanes + four * rows
                acc = multiply_block(
                    e,
                    rows,
                    nr,
                    rank,
                    lambda i, r: scalar(first + i, tap, r),
                    lambda r, q: vector(block, r, q),
                )
                term = (group * shape.taps + tap) * e.lanes + four * rows
                for i in range(rows):
                    for q in range(nr):
                        e.store(weight, acc[i][q][0], 0, block, term + i, q * e.lanes)
