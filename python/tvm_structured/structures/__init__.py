"""Structures: the mathematics, in numpy (and torch, through `apply`). STRUCTURES is the table."""

from __future__ import annotations

from tvm_structured.structures.base import Size, Structure, as_budget, factor, fits
from tvm_structured.structures.block_circulant import BlockCirculant
from tvm_structured.structures.budget import Budget
from tvm_structured.structures.cp import CP
from tvm_structured.structures.debut import DeBut
from tvm_structured.structures.layer import Conv2d, Dense, Layer, as_layer
from tvm_structured.structures.low_rank import LowRank
from tvm_structured.structures.permuted_diagonal import PermutedDiagonal
from tvm_structured.structures.spatial_low_rank import SpatialLowRank
from tvm_structured.structures.tensor_train import TensorTrain
from tvm_structured.structures.toeplitz_like import ToeplitzLike
from tvm_structured.structures.tucker import Tucker
from tvm_structured.structures.unstructured import Unstructured
from tvm_structured.structures.winograd import Winograd

STRUCTURES: dict[str, type[Structure]] = {
    structure.name: structure
    for structure in (
        BlockCirculant,
        CP,
        DeBut,
        LowRank,
        PermutedDiagonal,
        SpatialLowRank,
        TensorTrain,
        ToeplitzLike,
        Tucker,
        Winograd,
    )
}

__all__ = [
    "STRUCTURES",
    "Budget",
    "Conv2d",
    "Dense",
    "Layer",
    "Size",
    "Structure",
    "Unstructured",
    "Winograd",
    "as_budget",
    "as_layer",
    "factor",
    "fits",
]
