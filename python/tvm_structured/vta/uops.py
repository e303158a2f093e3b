"""Micro-ops: 32-bit words that name one ACC, one INP (or ACC) and one WGT element."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import VTAError
from tvm_structured.vta.config import VTAConfig


def encode_uops(config: VTAConfig, dst: Any, src: Any = 0, wgt: Any = 0) -> NDArray[np.uint32]:
    """Words of micro-ops from indices (numbers or arrays). Raises VTAError for an index that does not fit."""
    words = np.zeros(np.broadcast_shapes(np.shape(dst), np.shape(src), np.shape(wgt)), np.int64)
    shift = 0
    for name, values, width in zip(("dst", "src", "wgt"), (dst, src, wgt), config.uop_widths, strict=True):
        array = np.asarray(values, np.int64)
        if array.size and not 0 <= array.min() <= array.max() < 1 << width:
            raise VTAError(f"micro-op {name}: {array.min()} to {array.max()} does not fit {width} bits", field=name)
        words = words | array << shift
        shift += width
    return np.atleast_1d(words).astype(np.uint32)


def decode_uops(config: VTAConfig, words: NDArray[np.uint32]) -> tuple[NDArray[np.int64], ...]:
    """Indices dst, src, wgt of the words."""
    wide = words.astype(np.int64)
    indices, shift = [], 0
    for width in config.uop_widths:
        indices.append(wide >> shift & ((1 << width) - 1))
        shift += width
    return tuple(indices)
