"""What the GEMM core can add to sums, at one cycle an element, in place of the ALU: a bias, and a residual.

Both are products of int8 numbers. A bias is a fixed input times a tile of weights for each block of output channels;
a residual comes as an input, which the load module brings while others compute, times a diagonal tile.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.lower.builder import Builder
from tvm_structured.vta.operators.requantize import Integers, Joined, Scale

LARGEST = 127


def fixed_input(b: Builder, sram: int) -> None:
    """INP[sram] = 127 in all lanes but the last one, which is 1."""
    block, batch = b.config.block, b.config.batch
    row = np.full(block, LARGEST, np.int8)
    row[-1] = 1
    first = b.constant(Memory.WGT, "fixed input", 1, lambda: np.broadcast_to(row, (1, block, block)))
    # a tile of weights has `block` such rows, an input needs `batch` of them
    b.load(Memory.INP, sram, "WGT", first * block // batch, 1)


def can_be_product(config: VTAConfig, values: Integers) -> bool:
    """Whether the fixed input times int8 weights makes these numbers."""
    is_usual = config.inp_bits == config.wgt_bits == 8 and config.batch <= config.block
    return is_usual and int(np.abs(values).max()) <= LARGEST * (LARGEST * (config.block - 1) - 1)


def as_weights(values: Integers, block: int) -> NDArray[np.int8]:
    """(blocks, block, block): the fixed input times row o of tile i is values[i * block + o]."""
    count = -(-len(values) // block)
    whole = np.zeros(count * block, np.int64)
    whole[: len(values)] = values
    high, last = np.divmod(whole, LARGEST)
    each, more = np.divmod(high, block - 1)
    lanes = each[:, None] + (np.arange(block) < more[:, None])
    lanes[:, -1] = last
    return lanes.reshape(count, block, block).astype(np.int8)


def residual_by_product(config: VTAConfig, residual: Scale | None) -> bool:
    """Whether a diagonal tile scales the residual: it needs no shift of its own, and a small multiplier."""
    if residual is None or config.inp_bits != 8 or config.wgt_bits != 8:
        return False
    return (isinstance(residual, Joined) or residual.shift == 0) and abs(residual.multiplier) <= LARGEST


def diagonal(b: Builder, sram: int, multiplier: int) -> None:
    """WGT[sram] = multiplier * identity."""
    tile = np.eye(b.config.block, dtype=np.int8) * np.int8(multiplier)
    b.load(Memory.WGT, sram, "WGT", b.constant(Memory.WGT, ("diagonal", multiplier), 1, lambda: tile[None]), 1)
