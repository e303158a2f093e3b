"""Low rank: y = U (V x), the thin intermediate stays in cache; of a convolution V's filters, then 1 x 1 ones by U."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tvm_structured.schedules.base import Config, Site
from tvm_structured.schedules.conv_chain import ConvChainKernel
from tvm_structured.schedules.dense import gemm, gemm_config
from tvm_structured.schedules.emit import Emitter, arg, prim_func, scratch
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.schedules.gemm import pack_panels
from tvm_structured.structures.base import Structure
from tvm_structured.structures.conv_chain import Step

# starting the other threads twice takes as long as this many operations on one
FEW_OPERATIONS = 2_000_000


class LowRankKernel(ConvChainKernel):
    """Two packed GEMMs in one kernel, or two convolutions."""

    name = "low_rank"

    def configs(self, structure: Structure, site: Site) -> Iterator[Config]:
        if site.conv is not None:
            yield from super().configs(structure, site)
            return
        rank, (out, inner) = structure.factors["v"].shape[0], structure.shape
        is_tiny = isinstance(site.rows, int) and structure.flops(site.rows) < FEW_OPERATIONS
        thin = gemm_config(site.cpu, site.rows, rank, inner)
        wide = gemm_config(site.cpu, site.rows, out, rank)
        threads = 1 if is_tiny else site.cpu.cores
        yield {"thin": thin, "wide": wide, "threads": threads}
        yield {"thin": {**thin, "nr": 1, "kc": inner}, "wide": wide, "threads": threads}
        yield {"thin": {**thin, "kc": inner}, "wide": {**wide, "kc": rank}, "threads": threads}
        yield {"thin": {**thin, "prefetch": 1 - thin["prefetch"]}, "wide": wide, "threads": threads}

    def pack(self, structure: Structure, site: Site, config: Config) -> dict[str, np.ndarray]:
        if site.conv is not None:
            return super().pack(structure, site, config)
        u, v = structure.factors["u"], structure.factors["v"]
        return {
            "v": pack_panels(v, config["thin"]["nr"] * site.cpu.lanes),
            "u": pack_panels(u, config["wide"]["nr"] * site.cpu.lanes),
        }

    def prim_func(self, structure: Structure, site: Site, config: Config) -> Any:
        if site.conv is not None:
            return super().prim_func(structure, site, config)
        (out, inner), rank = structure.shape, structure.factors["v"].shape[0]
        rows, e = site.rows, Emitter(site.cpu)
        packed = {name: array.shape for name, array in self.pack(structure, site, config).items()}
        with prim_func("low_rank") as made:
            x = arg("x", (rows, inner))
            v, u = (arg(name, shape) for name, shape in packed.items())
            writer = RowWriter(e, site.epilogue, rows, out)
            thin = scratch((rows, rank))
            stage = RowWriter.onto(e, thin, rank)
            gemm(e, x, v, stage, rows, inner, {**config["thin"], "threads": config["threads"]})
            gemm(e, thin, u, writer, rows, rank, {**config["wide"], "threads": config["threads"]})
        return made.func

    def steps(self, structure: Structure, site: Site) -> tuple[Step, ...]:
        assert site.conv is not None
        u, v = structure.factors["u"], structure.factors["v"]
        return Step(v, site.conv.kernel, (True, True)), Step(u)
