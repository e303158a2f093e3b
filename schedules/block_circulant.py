"""Block-circulant: y_i = irfft(sum_j rfft(c_ij) rfft(x_j)), or without transforms where they would not pay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from tvm_structured.schedules import circulant_direct, circulant_few, circulant_many
from tvm_structured.schedules.base import Config, Extent, Kernel, Site
from tvm_structured.schedules.circulant_direct import Direct
from tvm_structured.schedules.circulant_few import FewRows
from tvm_structured.schedules.circulant_many import ManyRows
from tvm_structured.schedules.emit import Emitter, arg, prim_func
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.structures.base import Structure
from tvm_structured.structures.block_circulant import BlockCirculant

FEW = 2  # rows up to which streaming beats three stages; at 4 the GEMM is ahead
LONGEST_TABLE = 64  # block up to which multiplying by a DFT matrix, as `few` does, is cheap enough for one row
MODES: dict[str, Any] = {"few": circulant_few, "many": circulant_many, "direct": circulant_direct}


class BlockCirculantKernel(Kernel):
    """Three ways: `few` rows stream the weight's spectrum, `many` run GEMMs, `direct` multiplies by shifted
    copies of c."""

    name = "block_circulant"

    def configs(self, structure: Structure, site: Site) -> Iterator[Config]:
        member = cast(BlockCirculant, structure)
        for mode in by_effort(member, site.rows, site.cpu.lanes):
            yield from MODES[mode].configs(member, site.rows, site.cpu)

    def pack(self, structure: Structure, site: Site, config: Config) -> dict[str, np.ndarray]:
        return MODES[config["mode"]].pack(cast(BlockCirculant, structure), site.cpu, config)

    def prim_func(self, structure: Structure, site: Site, config: Config) -> Any:
        member, e = cast(BlockCirculant, structure), Emitter(site.cpu)
        shapes = {name: array.shape for name, array in self.pack(structure, site, config).items()}
        with prim_func(self.name) as made:
            x = arg("x", (site.rows, member.shape[1]))
            packed = {name: arg(name, shape) for name, shape in shapes.items()}
            writer = RowWriter(e, site.epilogue, site.rows, member.shape[0])
            emitter = {"few": FewRows, "many": ManyRows, "direct": Direct}[config["mode"]]
            emitter(e, member.blocks, site.rows, config, x, writer, **packed).emit()
        return made.func


def by_effort(member: BlockCirculant, rows: Extent, lanes: int) -> list[str]:
    """The ways to evaluate, the cheapest first: long blocks in small numbers do not repay their transforms."""
    few = isinstance(rows, int) and rows <= FEW and member.block <= LONGEST_TABLE
    spectral, module = ("few", circulant_few) if few else ("many", circulant_many)
    direct_pays = circulant_direct.effort(member.blocks, lanes) <= module.effort(member.blocks, lanes)
    rest = [mode for mode in ("few", "many") if mode != spectral]
    return ["direct", spectral, *rest] if direct_pays else [spectral, *rest, "direct"]
