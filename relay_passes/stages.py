"""Structured matrices as products of stages, each a small matrix, or one for each place, between two permutations:

    y[n, a, i, b] = sum_k weight[(a, b) or 0, i, k] * x[n, a, k, b]

A tensor train has one shared matrix for each core, a DeBut matrix one for each diagonal of each block of a factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_structured.structures import STRUCTURES, Structure, TensorTrain
from tvm_structured.structures.debut_fit import merge_all
from tvm_structured.structures.layer import Array
from tvm_structured.structures.tt_order import core_matrix

STAGED = (TensorTrain.name, "debut")


@dataclass(frozen=True, eq=False)
class Stage:
    """weight: (1 or lead * trail, rows, depth)."""

    name: str
    weight: Array
    lead: int
    trail: int

    def spread(self, by_row: Array) -> Array:
        """Values of rows, (1 or lead * trail, rows), as values of the result's features (a, i, b)."""
        every = np.broadcast_to(by_row, (self.lead * self.trail, by_row.shape[1]))
        return every.reshape(self.lead, self.trail, -1).transpose(0, 2, 1).reshape(-1)

    def gather(self, by_feature: Array) -> Array:
        """The inverse of `spread`; for a shared matrix the values of the first place."""
        parts = by_feature.reshape(self.lead, -1, self.trail).transpose(0, 2, 1).reshape(self.lead * self.trail, -1)
        return parts[: len(self.weight)]

    def apply(self, state: Array) -> Array:
        """(n, lead * depth * trail) -> (n, lead * rows * trail)."""
        rows, depth = self.weight.shape[1:]
        parts = state.reshape(-1, self.lead, depth, self.trail).transpose(1, 3, 0, 2)
        product = parts.reshape(self.lead * self.trail, -1, depth) @ self.weight.transpose(0, 2, 1)
        made = product.reshape(self.lead, self.trail, -1, rows).transpose(2, 0, 3, 1)
        return made.reshape(len(made), -1)


def stages_of(structure: Structure) -> list[Stage] | None:
    """First to run first; None for a structure that is no product of stages."""
    if isinstance(structure, TensorTrain):
        order = structure.order
        matrices = [core_matrix(structure.cores[stage.core], order.is_last_core_first) for stage in order.stages]
        return [
            Stage(f"core{stage.core}", np.asarray(matrix)[None], stage.lead, stage.trail)
            for stage, matrix in zip(order.stages, matrices, strict=True)
        ]
    if isinstance(structure, STRUCTURES["debut"]):
        return [debut_stage(structure, first, end) for first, end in structure.groups]
    return None


def debut_stage(structure: Any, first: int, end: int) -> Stage:
    """Neighbouring factors that are cheaper as one."""
    grid = np.asarray(merge_all(structure.grids[first:end]))
    blocks, r, s, t = grid.shape
    return Stage(f"factor{first}", grid.transpose(0, 3, 1, 2).reshape(blocks * t, r, s), blocks, t)
