"""Block-circulant on CUDA: in the time domain for few rows, in the frequency domain for many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tvm_structured.schedules.base import Config, Kernel
from tvm_structured.schedules.cuda import circulant_few, circulant_many
from tvm_structured.schedules.cuda.few_rows import Few
from tvm_structured.schedules.cuda.products import few_space, prefers_few, tiles
from tvm_structured.schedules.cuda.tile import Tile
from tvm_structured.schedules.cuda.writer import RowWriter
from tvm_structured.schedules.emit import arg, prim_func
from tvm_structured.schedules.gpu import GpuSite
from tvm_structured.structures.base import Structure
from tvm_structured.structures.circulant_pattern import Blocks


class BlockCirculantKernel(Kernel):
    """`way` "few" or "many" rows, and its settings."""

    name = "block_circulant"

    def configs(self, structure: Structure, site: GpuSite) -> Iterator[Config]:  # type: ignore[override]
        blocks = blocks_of(structure)
        parts, size = circulant_few.parts_of(blocks.length)
        units = circulant_few.few_units(blocks)
        few = [{"way": "few", "few": s} for s in few_space(site, *units, size, group=None if parts == 1 else 1)]
        if blocks.length > circulant_many.LONGEST:
            yield from few
            return
        rows = blocks.rows
        batches = circulant_many.batches_of(blocks.length)
        many = [{"way": "many", "tile": t} for t in tiles(site, site.rows, rows, planes=2, batches=batches)]
        yield from [*few, *many] if prefers_few(site) else [*many, *few]

    def pack(self, structure: Structure, site: GpuSite, config: Config) -> dict[str, np.ndarray]:  # type: ignore[override]
        c = np.asarray(structure.factors["c"], np.float32)
        if config["way"] == "few":
            return {"c": circulant_few.pack_few(c, Few.of(config["few"]), site.dtype)}
        return {"spectra": circulant_many.pack_many(c, Tile.of(config["tile"]), site.dtype)}

    def prim_func(self, structure: Structure, site: GpuSite, config: Config) -> Any:  # type: ignore[override]
        blocks, tensorize = blocks_of(structure), config.get("tensorize", True)
        (name, packed), *_ = self.pack(structure, site, config).items()
        with prim_func(self.name) as made:
            x = arg("x", (site.rows, structure.shape[1]), site.dtype)
            weight = arg(name, packed.shape, site.dtype)
            writer = RowWriter(site, structure.shape[0])
            if config["way"] == "few":
                circulant_few.emit_few(Few.of(config["few"]), blocks, x, weight, writer, tensorize)
            else:
                circulant_many.emit_many(Tile.of(config["tile"]), blocks, x, weight, writer, tensorize)
        return made.func


def blocks_of(structure: Structure) -> Blocks:
    return Blocks.of(structure.shape, structure.sizes_of["taps"], structure.factors["c"].shape[2])
