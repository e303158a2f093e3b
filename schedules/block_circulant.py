"""Block-circulant: y_i = irfft(sum_j rfft(c_ij) rfft(x_j)), or without transforms where they would not pay."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from tvm_structured.schedules import circulant_direct, circulant_few, circulant_many, fft
from tvm_structured.schedules.base import Config, Kernel, Site
from tvm_structured.schedules.circulant_few import FewRows
from tvm_structured.schedules.circulant_many import ManyRows
from tvm_structured.schedules.emit import Emitter, arg, prim_func
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.structures.base import Structure
from tvm_structured.structures.block_circulant import BlockCirculant

FEW = 2  # rows for which the streaming kernel is faster than three stages


class BlockCirculantKernel(Kernel):
    """Three ways: `few` rows stream the weight's spectrum, `many` run GEMMs, `direct` multiplies by shifted
    copies of c."""

    name = "block_circulant"

    def configs(self, structure: Structure, site: Site) -> Iterator[Config]:
        member = cast(BlockCirculant, structure)
        direct = circulant_direct.configs(member, site.rows, site.cpu)
        many = circulant_many.configs(member, site.cpu)
        few = circulant_few.configs(member, site.rows, site.cpu) if isinstance(site.rows, int) and site.rows <= 4 else []
        spectral = [*few, *many] if few and site.rows <= FEW else [*many, *few]
        yield from [*direct, *spectral] if direct_is_cheaper(member, site) else [*spectral, *direct]

    def pack(self, structure: Structure, site: Site, config: Config) -> dict[str, np.ndarray]:
        modes = {"few": circulant_few.pack, "many": circulant_many.pack, "direct": circulant_direct.pack}
        return modes[config["mode"]](cast(BlockCirculant, structure), site.cpu, config)

    def prim_func(self, structure: Structure, site: Site, config: Config) -> Any:
        member, e = cast(BlockCirculant, structure), Emitter(site.cpu)
        shapes = {name: array.shape for name, array in self.pack(structure, site, config).items()}
        with prim_func(self.name) as made:
            x = arg("x", (site.rows, member.shape[1]))
            packed = {name: arg(name, shape) for name, shape in shapes.items()}
            writer = RowWriter(e, site.epilogue, site.rows, member.shape[0])
            mode = {"few": FewRows, "many": ManyRows, "direct": circulant_direct.Direct}[config["mode"]]
            mode(e, member.blocks, site.rows, config, x, writer, **packed).emit()
        return made.func


def direct_is_cheaper(member: BlockCirculant, site: Site) -> bool:
    """Compare the vector operations for one row: long blocks in small numbers do not repay their transforms."""
    (p, columns, n), lanes = member.blocks.factor_shape, site.cpu.lanes
    wide, tall = -(-n // lanes), -(-p // lanes)
    direct = p * columns * n * wide
    if site.rows == 1:
        half = circulant_few.half_length(n)
        return direct <= columns * n * wide + 4 * half * columns * tall + 2 * half * p * wide
    transform = n * (1.5 * math.log2(n) + 4) if fft.is_straight(n) else n * (n / 2 + 8)
    product = circulant_many.components(n) * columns * tall
    return direct <= (-(-columns // lanes) + tall) * transform + product
