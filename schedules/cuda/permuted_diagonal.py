"""Permuted-diagonal on CUDA: see `diagonal_few` for few rows and any shifts, `diagonal_many` for separable ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tvm_structured.schedules.base import Config, Kernel
from tvm_structured.schedules.cuda import diagonal_few, diagonal_many
from tvm_structured.schedules.cuda.few_rows import Few
from tvm_structured.schedules.cuda.products import MANY, few_space, prefers_few, tiles
from tvm_structured.schedules.cuda.threads import BYTES, VECTOR_BYTES
from tvm_structured.schedules.cuda.tile import Tile
from tvm_structured.schedules.cuda.writer import RowWriter
from tvm_structured.schedules.diagonal_blocks import DiagonalBlocks
from tvm_structured.schedules.emit import arg, prim_func
from tvm_structured.schedules.gpu import GpuSite
from tvm_structured.structures.base import Structure

LONGEST_MANY = 32  # more products than that are too small


class PermutedDiagonalKernel(Kernel):
    """`way` "turn", "gather" or "many", and its settings."""

    name = "permuted_diagonal"

    def configs(self, structure: Structure, site: GpuSite) -> Iterator[Config]:  # type: ignore[override]
        blocks = DiagonalBlocks.of(structure)
        few = []
        if diagonal_few.turning_offsets(blocks) is not None:
            space = few_space(site, blocks.rows, blocks.columns, blocks.p)
            few += [{"way": "turn", "few": s} for s in space if s[0] >= blocks.p]
        size = VECTOR_BYTES // BYTES[site.dtype]
        space = few_space(site, blocks.rows * -(-blocks.p // size), blocks.columns, size)
        few += [{"way": "gather", "few": s} for s in space]
        many: list[Config] = []
        if blocks.p <= LONGEST_MANY and blocks.separated is not None:
            many = [{"way": "many", "tile": t} for t in tiles(site, site.rows, blocks.rows, batches=blocks.p)]
        yield from [*few, *many] if prefers_few(site, 2 * MANY) else [*many, *few]

    def pack(self, structure: Structure, site: GpuSite, config: Config) -> dict[str, np.ndarray]:  # type: ignore[override]
        blocks = DiagonalBlocks.of(structure)
        if config["way"] == "many":
            return diagonal_many.pack_many(blocks, Tile.of(config["tile"]), site.dtype)
        few = Few.of(config["few"])
        if config["way"] == "gather":
            return diagonal_few.pack_gather(blocks, few, site.dtype)
        offsets = diagonal_few.turning_offsets(blocks)
        assert offsets is not None
        return diagonal_few.pack_turn(blocks, offsets, few, site.dtype)

    def prim_func(self, structure: Structure, site: GpuSite, config: Config) -> Any:  # type: ignore[override]
        blocks, tensorize = DiagonalBlocks.of(structure), config.get("tensorize", True)
        packed = self.pack(structure, site, config)
        with prim_func(self.name) as made:
            x = arg("x", (site.rows, blocks.inner), site.dtype)
            constants = [arg(name, array.shape, str(array.dtype)) for name, array in packed.items()]
            writer = RowWriter(site, blocks.out)
            if config["way"] == "many":
                weight, f, g = constants
                diagonal_many.emit_many(Tile.of(config["tile"]), blocks, x, weight, f, g, writer, tensorize)
            else:
                emit = {"turn": diagonal_few.emit_turn, "gather": diagonal_few.emit_gather}[config["way"]]
                emit(Few.of(config["few"]), blocks, x, *constants, writer, tensorize)
        return made.func
