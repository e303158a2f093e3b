"""A small dense layer and a small convolution in Relax, and constants around them."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from graph_harness import const, weight
from tvm import relax

_RNG = np.random.default_rng(0)
OP = relax.op
W56, W66, B6, S6 = weight(_RNG, 5, 6), weight(_RNG, 6, 6), weight(_RNG, 6), weight(_RNG, 6)
CONV = weight(_RNG, 6, 3, 3, 3)
N = tvm.tirx.Var("n", "int64")


def dense(emit: Any, x: Any) -> Any:
    """x (..., 5) -> (..., 6)"""
    return emit(OP.matmul(x, const(W56)))


def conv(emit: Any, x: Any) -> Any:
    """x (n, 3, h, w) -> (n, 6, h, w)"""
    return emit(OP.nn.conv2d(x, const(CONV), padding=(1, 1)))
