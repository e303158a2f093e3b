"""Dense layers on CUDA for few rows, where TVM's own rules leave most of the card idle: the products of `low_rank`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tvm_structured.schedules.base import Config, Kernel
from tvm_structured.schedules.cuda.dense_rows import pack_rows
from tvm_structured.schedules.cuda.few_rows import Few
from tvm_structured.schedules.cuda.functions import numpy_type
from tvm_structured.schedules.cuda.low_rank import product_of_few, product_of_many
from tvm_structured.schedules.cuda.products import MANY, few_space, prefers_few, tiles
from tvm_structured.schedules.cuda.tile import Tile, pack_operand
from tvm_structured.schedules.cuda.writer import RowWriter
from tvm_structured.schedules.emit import arg, prim_func
from tvm_structured.schedules.gpu import GpuSite
from tvm_structured.structures.base import Structure

MOST_ROWS = 64  # above, TVM's tiles are full and faster


class DenseKernel(Kernel):
    """`way` "few" or "many" rows, and its tile."""

    name = "dense"

    def configs(self, structure: Structure, site: GpuSite) -> Iterator[Config]:  # type: ignore[override]
        out, inner = structure.shape
        few = [{"way": "few", "product": s} for s in few_space(site, out, inner)]
        many = [{"way": "many", "product": t} for t in tiles(site, site.rows, out, depth=inner)]
        yield from [*few, *many] if prefers_few(site, 2 * MANY) else [*many, *few]

    def pack(self, structure: Structure, site: GpuSite, config: Config) -> dict[str, np.ndarray]:  # type: ignore[override]
        weight = np.asarray(structure.dense(), np.float32)
        if config["way"] == "few":
            return {"weight": pack_rows(weight, Few.of(config["product"]), site.dtype)}
        return {"weight": pack_operand(weight[None, None], Tile.of(config["product"]), numpy_type(site.dtype))}

    def prim_func(self, structure: Structure, site: GpuSite, config: Config) -> Any:  # type: ignore[override]
        out, inner = structure.shape
        packed = self.pack(structure, site, config)["weight"].shape
        emit = product_of_few if config["way"] == "few" else product_of_many
        with prim_func(self.name) as made:
            x = arg("x", (site.rows, inner), site.dtype)
            weight = arg("weight", packed, site.dtype)
            emit(site, config, "product", x, inner, weight, RowWriter(site, out))
        return made.func
