"""Add a structure from outside the package: its mathematics, its kernel, an entry in each of two tables.
Block-diagonal: dense blocks along the diagonal, zeros elsewhere. Run me: python tutorials/03_add_a_structure.py"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import tvm_structured as ts
from tvm_structured.schedules import KERNELS, Kernel
from tvm_structured.schedules.emit import Emitter, arg, parallel, prim_func, row_blocks
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.schedules.gemm import multiply_block, pack_panels
from tvm_structured.structures import STRUCTURES, Dense, Structure, factor


@dataclass(frozen=True, eq=False)
class BlockDiagonal(Structure):
    """y_g = B_g x_g for every group g; blocks (groups, out / groups, in / groups)."""

    name, accepts = "block_diagonal", (Dense,)
    blocks: Any = factor()

    @classmethod
    def sizes(cls, layer):  # smallest model first
        out, inner = layer.matrix.shape
        yield from ({"groups": g} for g in range(min(out, inner), 1, -1) if out % g == 0 == inner % g)

    @classmethod
    def from_dense(cls, layer, *, groups):  # the nearest member
        out, inner = layer.matrix.shape
        grid = layer.matrix.reshape(groups, out // groups, groups, inner // groups)
        return cls((out, inner), np.stack([grid[g, :, g] for g in range(groups)]))

    def apply(self, x):  # the meaning, for numpy and torch alike
        y = x.reshape(-1, len(self.blocks), 1, self.blocks.shape[2]) @ self.blocks.swapaxes(1, 2)
        return y.reshape(*x.shape[:-1], self.shape[0])

    def flops(self, rows):
        return 2 * rows * self.num_params


class BlockDiagonalKernel(Kernel):
    name = "block_diagonal"

    def configs(self, structure, site):  # rows of x in registers; the first is the default, all are tunable
        yield from ({"rows": rows} for rows in (8, 4))

    def pack(self, structure, site, config):  # weights as the kernel reads them
        return {"weight": np.stack([pack_panels(block, site.cpu.lanes) for block in structure.blocks])}

    def prim_func(self, structure, site, config):
        (groups, out, inner), e = structure.blocks.shape, Emitter(site.cpu)
        with prim_func(self.name) as made:
            x = arg("x", (site.rows, structure.shape[1]))
            weight = arg("weight", self.pack(structure, site, config)["weight"].shape)
            writer = RowWriter(e, site.epilogue, site.rows, structure.shape[0])  # adds bias, activation and residual
            with parallel(0, groups * weight.shape[1]) as unit:
                g, panel = unit // weight.shape[1], unit % weight.shape[1]

                def block(row, n):
                    a, b = lambda i, k: x[row + i, g * inner + k], lambda k, _: e.load(weight, g, panel, k, 0)
                    for i, (total,) in enumerate(multiply_block(e, n, 1, inner, a, b)):
                        writer.store(total[0], row + i, g * out + panel * e.lanes, limit=g * out + out)

                row_blocks(site.rows, config["rows"], block)
        return made.func


STRUCTURES["block_diagonal"], KERNELS["block_diagonal"] = BlockDiagonal, BlockDiagonalKernel()
planted = torch.nn.Linear(512, 500)
planted.weight.data = torch.block_diag(*torch.randn(4, 125, 128) / 11)  # found; the layer behind it is trained as such
model = torch.nn.Sequential(planted, torch.nn.ReLU(), ts.nn.StructuredLinear(500, 250, "block_diagonal", groups=5))
compiled = ts.compile(model, inputs=(x := torch.randn(16, 512),), target="host", measure=False)  # by operations
print(compiled.report())
assert torch.allclose(compiled(x), model(x), rtol=1e-4, atol=1e-4)
assert {choice.name for choice in compiled.plan.choices.values()} == {"block_diagonal"}
