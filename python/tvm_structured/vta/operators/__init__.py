"""Integer operators: what the accelerator is asked to compute, each with its exact meaning in NumPy.

    layer = Int8Dense(weight, bias, Requantize(shift=7, low=0))
    layer.reference(x)                       # int8 (n, out)
    lower(layer, [x.shape], VTAConfig())     # a program with the same result, bit for bit

Activations are int8, `(n, features)` or `(n, channels, height, width)`; weights int8, biases int32. Constructors prove
that no 32-bit sum can overflow. Nothing here needs TVM.
"""

from __future__ import annotations

from tvm_structured.vta.operators.base import Operator
from tvm_structured.vta.operators.conv import Int8Conv2d, Int8Conv2dTranspose
from tvm_structured.vta.operators.dense import Int8BlockDiagonal, Int8Chain, Int8Dense, Int8StructuredDense
from tvm_structured.vta.operators.elementwise import Int8Add, Int8Rescale
from tvm_structured.vta.operators.pool import Int8AvgPool, Int8MaxPool
from tvm_structured.vta.operators.requantize import Joined, Requantize, Scale

__all__ = [
    "Int8Add",
    "Int8AvgPool",
    "Int8BlockDiagonal",
    "Int8Chain",
    "Int8Conv2d",
    "Int8Conv2dTranspose",
    "Int8Dense",
    "Int8MaxPool",
    "Int8Rescale",
    "Int8StructuredDense",
    "Joined",
    "Operator",
    "Requantize",
    "Scale",
]
