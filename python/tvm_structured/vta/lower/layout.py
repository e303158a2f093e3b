"""How tensors lie in the accelerator's memory: blocks of `batch` rows by `block` channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import VTAError
from tvm_structured.vta.bits import pack_integers, unpack_integers
from tvm_structured.vta.config import VTAConfig


@dataclass(frozen=True)
class Layout:
    """NCHW{B}n{K}c: element ((n / B * C / K + c / K) * H + h) * W + w holds B rows of K channels, rounded up.

    `shape` is (n, c) or (n, c, h, w), `bits` those of a value.
    """

    shape: tuple[int, ...]
    batch: int
    block: int
    bits: int

    @classmethod
    def of(cls, shape: tuple[int, ...], config: VTAConfig) -> Layout:
        return cls(tuple(int(extent) for extent in shape), config.batch, config.block, config.inp_bits)

    @property
    def rows(self) -> int:
        """Blocks of the batch."""
        return -(-self.shape[0] // self.batch)

    @property
    def channels(self) -> int:
        """Blocks of channels."""
        return -(-self.shape[1] // self.block)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, 1 by 1 for features."""
        return (self.shape[2], self.shape[3]) if len(self.shape) == 4 else (1, 1)

    @property
    def elements(self) -> int:
        return self.rows * self.channels * self.size[0] * self.size[1]

    @property
    def nbytes(self) -> int:
        return self.elements * self.batch * self.block * self.bits // 8

    def pack(self, x: NDArray[Any]) -> NDArray[np.uint8]:
        """The bytes of an int8 array; what rounds up is zero. Raises VTAError for another shape, or for values that
        do not fit the accelerator's width."""
        if x.shape != self.shape or x.dtype != np.int8:
            raise VTAError(f"{x.dtype} of shape {x.shape}; expected int8 of shape {self.shape}")
        limit = 1 << (self.bits - 1)
        if x.size and not -limit <= int(x.min()) <= int(x.max()) < limit:
            raise VTAError(f"values from {x.min()} to {x.max()}; the accelerator's inputs have {self.bits} bits")
        whole = np.zeros((self.rows * self.batch, self.channels * self.block, *self.size), np.int8)
        whole[: self.shape[0], : self.shape[1]] = x.reshape(*self.shape[:2], *self.size)
        parts = whole.reshape(self.rows, self.batch, self.channels, self.block, *self.size)
        return pack_integers(parts.transpose(0, 2, 4, 5, 1, 3), self.bits)

    def unpack(self, raw: NDArray[np.uint8]) -> NDArray[np.int8]:
        """The int8 array whose bytes these are."""
        values = unpack_integers(raw, self.bits).astype(np.int8)
        parts = values.reshape(self.rows, self.channels, *self.size, self.batch, self.block).transpose(0, 4, 1, 5, 2, 3)
        whole = parts.reshape(self.rows * self.batch, self.channels * self.block, *self.size)
        return np.ascontiguousarray(whole[: self.shape[0], : self.shape[1]].reshape(self.shape))
