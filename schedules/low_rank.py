"""Low rank: y = U (V x), the thin intermediate stays in cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tvm_structured.schedules.base import Config, Kernel, Site
from tvm_structured.schedules.dense import gemm
from tvm_structured.schedules.emit import Emitter, arg, prim_func, scratch
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.schedules.gemm import pack_panels, register_block
from tvm_structured.structures.base import Structure

# starting the other threads twice takes as long as this many operations on one
FEW_OPERATIONS = 2_000_000


class LowRankKernel(Kernel):
    """Two packed GEMMs in one kernel."""

    name = "low_rank"

    def configs(self, structure: Structure, site: Site) -> Iterator[Config]:
        rank, (out, _) = structure.factors["v"].shape[0], structure.shape
        few = isinstance(site.rows, int) and site.rows <= 16
        is_tiny = isinstance(site.rows, int) and structure.flops(site.rows) < FEW_OPERATIONS
        block, wide = (register_block(site.cpu, site.rows, n) for n in (rank, out))
        default = 1 << 20 if site.rows == 1 else 256 if few else 512
        threads = 1 if is_tiny else site.cpu.cores
        for kc in dict.fromkeys((default, 256, 512, 1024)):
            for thin in dict.fromkeys((block, (block[0], 1))):
                yield {"thin": thin, "wide": wide, "kc": kc, "prefetch": 128, "threads": threads}

    def pack(self, structure: Structure, site: Site, config: Config) -> dict[str, np.ndarray]:
        u, v = structure.factors["u"], structure.factors["v"]
        return {
            "v": pack_panels(v, config["thin"][1] * site.cpu.lanes),
            "u": pack_panels(u, config["wide"][1] * site.cpu.lanes),
        }

    def prim_func(self, structure: Structure, site: Site, config: Config) -> Any:
        (out, inner), rank = structure.shape, structure.factors["v"].shape[0]
        rows, e = site.rows, Emitter(site.cpu)
        packed = {name: array.shape for name, array in self.pack(structure, site, config).items()}
        with prim_func("low_rank") as made:
            x = arg("x", (rows, inner))
            v, u = (arg(name, shape) for name, shape in packed.items())
            writer = RowWriter(e, site.epilogue, rows, out)
            thin = scratch((rows, rank))
            stage = RowWriter.onto(e, thin, rank)
            gemm(e, x, v, stage, rows, inner, {**config, "mr": config["thin"][0], "nr": config["thin"][1]})
            gemm(e, thin, u, writer, rows, rank, {**config, "mr": config["wide"][0], "nr": config["wide"][1]})
        return made.func
