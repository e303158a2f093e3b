"""Chains of products. What one factor hands to the next goes through DRAM, since nothing leads from ACC to INP on chip:
one STORE and one LOAD of int8 vectors, in the order in which the next factor wants them; the CPU sees none of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tvm_structured.vta.config import VTAConfig
from tvm_structured.vta.lower.builder import Builder
from tvm_structured.vta.lower.dense import Product
from tvm_structured.vta.lower.layout import Layout
from tvm_structured.vta.lower.problem import Problem, check_values
from tvm_structured.vta.lower.schedule import Schedule
from tvm_structured.vta.lower.tile_matrix import TileMatrix
from tvm_structured.vta.operators import Int8BlockDiagonal, Int8Chain, Int8Dense

VARIATIONS = 6  # schedules of each part that tuning looks at


@dataclass(frozen=True, eq=False)
class ChainProblem(Problem):
    """Products one after the other; the schedule's `parts` are theirs."""

    config: VTAConfig
    name: str
    products: tuple[Product, ...]
    reason: str = ""

    def schedules(self, threads: int = 2) -> Iterator[Schedule]:
        """The defaults, then one part at a time another one."""
        defaults = [product.default_schedule(threads) for product in self.products]
        yield Schedule(threads, parts=tuple(defaults))
        for k, product in enumerate(self.products):
            for _, other in zip(range(VARIATIONS), product.schedules(threads), strict=False):
                if other != defaults[k]:
                    yield Schedule(threads, parts=(*defaults[:k], other, *defaults[k + 1 :]))

    def emit(self, b: Builder, s: Schedule, sources: Sequence[str], target: str) -> None:
        self.check_fits(len(s.parts) == len(self.products), s)
        source = sources[0]
        for k, (product, part) in enumerate(zip(self.products[:-1], s.parts[:-1], strict=True)):
            between = f"between{k}"
            b.add_scratch(between, product.rows * product.matrix.rows)
            product.emit(b, part, [source], between)
            source = between
        self.products[-1].emit(b, s.parts[-1], [source, *sources[1:]], target)


def tiles_of(layer: Int8Dense | Int8BlockDiagonal, block: int) -> TileMatrix:
    """Without zero tiles, equal ones shared."""
    if isinstance(layer, Int8Dense):
        return TileMatrix.from_dense(layer.weight, block, skip_zeros=True, share=True)
    shared, out, inner = layer.weight.shape
    group, i, j = np.nonzero(np.broadcast_to(layer.weight != 0, (layer.groups, out, inner)))
    values = layer.weight[group if shared > 1 else 0, i, j]
    row, column = group * out + i, group * inner + j
    if layer.out_order is not None:
        row = np.argsort(layer.out_order)[row]
    if layer.in_order is not None:
        column = layer.in_order[column]
    return TileMatrix.from_coordinates((layer.out_channels, layer.in_features), row, column, values, block)


def block_diagonal_problem(layer: Int8BlockDiagonal, inputs: tuple[Layout, ...], config: VTAConfig) -> Problem:
    check_values(config, layer)
    return Product(config, layer, tiles_of(layer, config.block), inputs[0].rows)


def chain_problem(chain: Int8Chain, inputs: tuple[Layout, ...], config: VTAConfig) -> Problem:
    """Vectors between two factors lie as they come, or as the next factor takes them: what makes fewer products."""
    for factor in chain.factors:
        check_values(config, factor)
    rows = inputs[0].rows
    natural = [Product(config, f, tiles_of(f, config.block), rows) for f in chain.factors]
    turned = [Product(config, f, tiles_of(f, config.block), rows) for f in turned_factors(chain.factors)]
    best = min(natural, turned, key=lambda products: sum(len(product.matrix.entries) for product in products))
    return ChainProblem(config, chain.name, tuple(best), "vectors between the factors pass through DRAM once")


def turned_factors(factors: Sequence[Int8Dense | Int8BlockDiagonal]) -> list[Int8Dense | Int8BlockDiagonal]:
    """The same chain where every factor but the first takes its features as they lie."""
    result = list(factors)
    for k in range(len(result) - 1):
        before, after = result[k], result[k + 1]
        if not isinstance(after, Int8BlockDiagonal) or after.in_order is None:
            continue
        result[k] = with_order(before, after.in_order)
        result[k + 1] = replace(after, in_order=None)
    return result


def with_order(layer: Int8Dense | Int8BlockDiagonal, order: NDArray[np.int64]) -> Int8Dense | Int8BlockDiagonal:
    """The layer whose result's feature i is feature order[i] of this layer's."""
    q = layer.requantize
    multiplier = q.multiplier if isinstance(q.multiplier, int) else q.multiplier[order]
    common = {
        "bias": None if layer.bias is None else layer.bias[order],
        "requantize": replace(q, multiplier=multiplier),
    }
    if isinstance(layer, Int8Dense):
        return replace(layer, weight=np.ascontiguousarray(layer.weight[order]), **common)  # type: ignore[arg-type]
    given = np.arange(layer.out_channels) if layer.out_order is None else layer.out_order
    return replace(layer, out_order=given[order], **common)  # type: ignore[arg-type]
