"""Winograd convolution on CUDA: Y = A^T [U * (B^T d B)] A, a product over channels for each point of a tile.

Three kernels: `winograd_tiles` transforms the tiles of the image, `gemm` multiplies point by point, `winograd_tiles`
transforms back with the epilogue. Points are kept in x's type, sums and the inverse transform are float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Config, Kernel
from tvm_structured.schedules.cuda.functions import numpy_type
from tvm_structured.schedules.cuda.gemm import Gemm
from tvm_structured.schedules.cuda.products import tiles
from tvm_structured.schedules.cuda.threads import Threads, all_of, multiple, scratch, under
from tvm_structured.schedules.cuda.tile import Operand, Tile, pack_operand
from tvm_structured.schedules.cuda.winograd_tiles import TileGrid, emit_data_transform, emit_inverse_transform
from tvm_structured.schedules.emit import arg, prim_func
from tvm_structured.schedules.gpu import GpuSite
from tvm_structured.structures.base import Structure
from tvm_structured.structures.winograd import Winograd


class WinogradKernel(Kernel):
    """`tile`: of the products over channels."""

    name = "winograd"
    takes_images = True

    def configs(self, structure: Structure, site: GpuSite) -> Iterator[Config]:  # type: ignore[override]
        assert isinstance(structure, Winograd)
        grid = TileGrid.of(structure, site)
        for tile in tiles(site, grid.count, grid.outs, batches=grid.points**2):
            yield {"tile": tile}

    def pack(self, structure: Structure, site: GpuSite, config: Config) -> dict[str, np.ndarray]:  # type: ignore[override]
        assert isinstance(structure, Winograd)
        transformed = structure.transformed_weight()[:, None]
        return {"weight": pack_operand(transformed, Tile.of(config["tile"]), numpy_type(site.dtype))}

    def prim_func(self, structure: Structure, site: GpuSite, config: Config) -> Any:  # type: ignore[override]
        assert isinstance(structure, Winograd)
        grid, tensorize = TileGrid.of(structure, site), config.get("tensorize", True)
        packed = self.pack(structure, site, config)["weight"].shape
        with prim_func(self.name) as made:
            x = arg("x", site.x_shape, site.dtype)
            weight = arg("weight", packed, site.dtype)
            shapes = {"scale": (grid.outs,), "bias": (grid.outs,), "residual": site.y_shape}
            operands = {
                name: arg(name, shapes[name], site.dtype if name == "residual" else "float32")
                for name in site.epilogue.operands
            }
            y = arg("y", site.y_shape, site.dtype)
            emit_staged(grid, site, Tile.of(config["tile"]), x, weight, operands, y, tensorize)
        return made.func


def emit_staged(
    grid: TileGrid,
    site: GpuSite,
    tile: Tile,
    x: Any,
    weight: Any,
    operands: Mapping[str, Any],
    y: Any,
    tensorize: bool,
) -> None:
    """Three kernels."""
    channels, outs = multiple(grid.channels, 8), multiple(grid.outs, 8)
    data = scratch((grid.points**2, grid.count, channels), site.dtype)
    products = scratch((grid.points**2, grid.count, outs), "float32")
    emit_data_transform(grid, site, x, data, channels, tensorize)
    operand = Operand(data, lambda batch, plane, row, k: (batch, row, k), channels, True)
    batches = grid.points**2
    gemm = Gemm(tile, site.dtype, grid.count, outs, operand, weight, batches=batches, tensorize=tensorize)

    def store(t: Threads, batch: Any, row: Any, exists: Any, column: Any, values: Any) -> None:
        pair = t.registers(2)
        for j in range(2):
            pair[j] = values[j][0]

        def body() -> None:
            I.buffer_store(products, pair.vector(0, 2), [batch, row, I.ramp(column, 1, 2)])

        under(all_of([exists, column < outs]), body)

    gemm.emit(store)
    emit_inverse_transform(grid, site, products, operands, y, tensorize)
