"""Low rank: y = U (V x), the thin intermediate stays in cache; of a convolution V's filters, then 1 x 1 ones by U."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from tvm_structured.schedules.base import Config, Site
from tvm_structured.schedules.conv_chain import ConvChainKernel
from tvm_structured.schedules.dense import MOST_ROWS, gemm, gemm_axes, gemm_config
from tvm_structured.schedules.emit import Emitter, arg, prim_func, scratch
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.schedules.gemm import pack_panels
from tvm_structured.schedules.space import around, fits_registers
from tvm_structured.structures.base import Structure
from tvm_structured.structures.conv_chain import Step

# starting the other threads twice takes as long as this many operations on one
FEW_OPERATIONS = 2_000_000
VARIANTS = 24  # of each product, in all pairs


class LowRankKernel(ConvChainKernel):
    """Two packed GEMMs in one kernel, or two convolutions."""

    name = "low_rank"

    def configs(self, structure: Structure, site: Site) -> Iterator[Config]:
        if site.conv is not None:
            yield from super().configs(structure, site)
            return
        rank, (out, inner) = structure.factors["v"].shape[0], structure.shape
        is_tiny = isinstance(site.rows, int) and structure.flops(site.rows) < FEW_OPERATIONS
        thin = {**gemm_config(site.cpu, site.rows, rank, inner), "chunk": MOST_ROWS}
        wide = {**gemm_config(site.cpu, site.rows, out, rank), "chunk": MOST_ROWS}
        threads = 1 if is_tiny else site.cpu.cores
        fits = fits_registers(site.cpu)
        variants = {
            "thin": list(islice(around(thin, gemm_axes(site.cpu, site.rows, rank, inner), fits), VARIANTS)),
            "wide": list(islice(around(wide, gemm_axes(site.cpu, site.rows, out, rank), fits), VARIANTS)),
            "threads": (1, site.cpu.cores),
        }
        yield from around({"thin": thin, "wide": wide, "threads": threads}, variants)

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
