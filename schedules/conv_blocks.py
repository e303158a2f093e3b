"""Direct convolution of an image in blocks of channels into another: weights are vectors, pixels are broadcast.

A block of pixels times `nr` vectors of output channels stays in registers through the whole sum. A padded image is
copied strip by strip, others are read where they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx

from tvm_structured.schedules.base import Config
from tvm_structured.schedules.channel_blocks import BlockCopy, BlockWriter
from tvm_structured.schedules.conv_channels import pixel_block
from tvm_structured.schedules.conv_units import Units
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.emit import Emitter, parallel, scratch, serial, when
from tvm_structured.schedules.gemm import most_rows
from tvm_structured.schedules.images import ImageShape

UNROLL = 4  # terms; of more LLVM loads all operands ahead and runs out of registers
CHUNK_BYTES = 96 * 1024  # of weights that stay in cache beside the image


def register_blocks(cpu: Cpu) -> tuple[tuple[int, int], ...]:
    """(most pixels, channel vectors) that fit the registers."""
    return tuple((most_rows(cpu, nr), nr) for nr in (1, 2, 3, 4, 6) if most_rows(cpu, nr) > 1)


def in_blocks(shape: ImageShape, lanes: int) -> int:
    """Blocks of one group's input channels."""
    return -(-shape.channels // lanes)


def packed_shape(shape: ImageShape, lanes: int, nr: int) -> tuple[int, int, int, int]:
    """(groups, blocks of nr * lanes outputs, terms, nr * lanes); a term is (input block, tap, lane)."""
    depth = in_blocks(shape, lanes) * shape.taps * lanes
    return shape.groups, -(-shape.outs // (nr * lanes)), depth, nr * lanes


def pack(matrix: np.ndarray, shape: ImageShape, lanes: int, nr: int) -> np.ndarray:
    """(groups * outs, kh * kw * channels), channel fastest -> `packed_shape`, zeros where there is no channel."""
    groups, count, depth, width = packed_shape(shape, lanes, nr)
    blocks = in_blocks(shape, lanes)
    padded = np.zeros((groups, count * width, shape.taps, blocks * lanes), np.float32)
    padded[:, : shape.outs, :, : shape.channels] = matrix.reshape(groups, shape.outs, shape.taps, shape.channels)
    split = padded.reshape(groups, count, width, shape.taps, blocks, lanes)
    return np.ascontiguousarray(split.transpose(0, 1, 4, 3, 5, 2)).reshape(groups, count, depth, width)


def emit(e: Emitter, shape: ImageShape, config: Config, x: Any, weight: Any, writer: BlockWriter) -> None:
    """The whole convolution; x is (batch, blocks, pixels * lanes)."""
    units = Units(shape, config["rows"], config["parts"], config["nr"] * e.lanes)
    blocks, copy = in_blocks(shape, e.lanes), BlockCopy.of(shape, e.lanes, config["rows"])
    with parallel(0, units.total) as unit:
        image, group, first_row, first_block, num_blocks = units.at(unit)
        start = first_row * shape.stride[0]
        if any(shape.padding):
            source = scratch((copy.size(blocks),))
            copy.emit(e, x, source, image, group * blocks, blocks, start)
            strip = Strip(e, shape, config, weight, copy.pitch, lambda block, at: source[block * copy.block_size + at])
        else:
            pitch = shape.image[1]

            def pixel(block: Any, at: Any) -> Any:
                return x[image, group * blocks + block, start * (pitch * e.lanes) + at]

            strip = Strip(e, shape, config, weight, pitch, pixel)
        sums = scratch((strip.num_tiles * strip.tile_size,)) if strip.chunks > 1 else None
        with serial(0, num_blocks) as b:
            strip.multiply(group, first_block + b, sums, Target(writer, image, group, first_row))


@dataclass(frozen=True)
class Target:
    """Where the results of a strip go."""

    writer: BlockWriter
    image: Any
    group: Any
    first_row: Any


@dataclass(frozen=True)
class Strip:
    """A strip of output rows, cut into tiles of pixels that stay in registers.

    Where the weights of a block of outputs do not fit the first levels of cache, all tiles take a chunk of the sum's
    terms before the next chunk is read, and ask for that one while they work.
    """

    e: Emitter
    shape: ImageShape
    config: Config
    weight: Any
    pitch: int
    pixel: Callable[[Any, Any], Any]  # (block, offset in the strip) -> the image's element

    @property
    def tile(self) -> tuple[int, int]:
        """(rows, columns)."""
        rows, columns = pixel_block(self.shape, self.config["mr"])
        return min(rows, self.config["rows"]), columns

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles, vertically and horizontally."""
        rows, columns = self.tile
        return -(-self.config["rows"] // rows), -(-self.shape.output[1] // columns)

    @property
    def num_tiles(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tile_size(self) -> int:
        """Elements of a tile's sums."""
        return self.tile[0] * self.tile[1] * self.config["nr"] * self.e.lanes

    @property
    def chunk(self) -> int:
        """Input blocks whose weights are read together, nearly equal shares of all."""
        blocks = in_blocks(self.shape, self.e.lanes)
        size = 4 * self.shape.taps * self.e.lanes**2 * self.config["nr"]
        most = max(1, CHUNK_BYTES // size) if self.num_tiles > 1 else blocks
        return -(-blocks // -(-blocks // most))

    @property
    def chunks(self) -> int:
        return -(-in_blocks(self.shape, self.e.lanes) // self.chunk)

    def multiply(self, group: Any, index: Any, sums: Any, target: Target) -> None:
        """One block of output channels."""
        if sums is None:
            self.each_tile(lambda tile: self.finish(self.accumulate(group, index, tile, 0, None), index, tile, target))
            return
        e, count, size = self.e, self.tile_size // self.e.lanes, self.tile_size
        with serial(0, self.num_tiles * count) as i:
            e.store(sums, e.splat(0.0), i * e.lanes)

        def add(tile: Tile) -> None:
            acc = self.accumulate(group, index, tile, chunk, (sums, tile.number * size))
            for i, register in enumerate(flat(acc)):
                e.store(sums, register[0], tile.number * size + i * e.lanes)

        with serial(0, self.chunks) as chunk:
            self.each_tile(add)
        nr = self.config["nr"]

        def done(tile: Tile) -> None:
            loads = [
                [(e.load(sums, tile.number * size + i * e.lanes),) for i in range(k, k + nr)]
                for k in range(0, count, nr)
            ]
            self.finish(loads, index, tile, target)

        self.each_tile(done)

    def each_tile(self, body: Callable[[Tile], None]) -> None:
        """The last tile of a row or column moves back where pixels are left over."""
        (rows, columns), (down, across) = self.tile, self.grid
        with serial(0, down) as r:
            with serial(0, across) as c:
                row = tirx.min(r * rows, self.config["rows"] - rows)
                body(Tile(r * across + c, row, tirx.min(c * columns, self.shape.output[1] - columns)))

    def accumulate(
        self, group: Any, index: Any, tile: Tile, chunk: Any, sums: tuple[Any, Any] | None
    ) -> list[list[Any]]:
        """Registers of the tile, [pixel][vector]: `sums` (or zero) plus the terms of a chunk."""
        e, lanes, nr, shape = self.e, self.e.lanes, self.config["nr"], self.shape
        (sv, sh), (dv, dh), (kh, kw), (rows, columns) = shape.stride, shape.dilation, shape.kernel, self.tile
        offsets = [(r * sv * self.pitch + c * sh) * lanes for r in range(rows) for c in range(columns)]
        acc = [e.registers(nr) for _ in offsets]
        for i, register in enumerate(flat(acc)):
            e.set(register, e.splat(0.0) if sums is None else e.load(sums[0], sums[1] + i * lanes))
        origin = (tile.row * (sv * self.pitch) + tile.column * sh) * lanes
        blocks = in_blocks(shape, lanes)
        count = self.chunk if blocks % self.chunk == 0 else tirx.min(self.chunk, blocks - chunk * self.chunk)

        def term(k: Any, block: Any, at: Any) -> None:
            panel = [e.bind(e.load(self.weight, group, index, k, q * lanes)) for q in range(nr)]
            for i, offset in enumerate(offsets):
                scalar = e.bind(e.splat(self.pixel(block, at + offset)))
                for q in range(nr):
                    e.set(acc[i][q], acc[i][q][0] + scalar * panel[q])

        with serial(0, count) as b:
            with serial(0, kh) as ky:
                with serial(0, kw) as kx:
                    block = chunk * self.chunk + b
                    at = origin + (ky * (dv * self.pitch) + kx * dh) * lanes
                    step = (b * kh + ky) * kw + kx
                    first = (chunk * (self.chunk * shape.taps) + step) * lanes
                    self.prefetch(group, index, tile, chunk, step)
                    if shape.taps == 1:  # more taps meet the pixels of their neighbours
                        for offset in offsets:
                            e.prefetch_element(self.pixel(block + 1, at + offset), level=1)
                    with serial(0, lanes // UNROLL) as four:
                        for lane in range(UNROLL):
                            term(first + four * UNROLL + lane, block, at + four * UNROLL + lane)
        return acc

    def prefetch(self, group: Any, index: Any, tile: Tile, chunk: Any, step: Any) -> None:
        """Each tile asks for its share of the next chunk's weights; behind the last chunk lies the next block."""
        steps, rows = self.chunk * self.shape.taps, self.e.lanes
        share = -(-rows // self.num_tiles)
        with when(tile.number < -(-rows // share)):
            first = ((chunk + 1) * steps + step) * rows + tile.number * share
            for row in range(share):
                for q in range(self.config["nr"]):
                    self.e.prefetch(self.weight, group, index, first + row, q * self.e.lanes)

    def finish(self, acc: list[list[Any]], index: Any, tile: Tile, target: Target) -> None:
        """A tile's sums through the epilogue; blocks behind the last output channel do not exist."""
        nr, outs, width = self.config["nr"], -(-self.shape.outs // self.e.lanes), self.shape.output[1]
        pixel = (target.first_row + tile.row) * width + tile.column
        columns = self.tile[1]

        def store(q: int) -> None:
            block = target.group * (self.shape.outs // self.e.lanes) + index * nr + q
            features = target.writer.features(block)
            for i, registers in enumerate(acc):
                at = pixel + (i // columns * width + i % columns)
                target.writer.store(registers[q][0], target.image, block, at, features)

        for q in range(nr):
            with when(index * nr + q < outs) if outs % nr else nullcontext():
                store(q)


@dataclass(frozen=True)
class Tile:
    """The tile's number and its first pixel."""

    number: Any
    row: Any
    column: Any


def flat(acc: list[list[Any]]) -> list[Any]:
    return [register for registers in acc for register in registers]
