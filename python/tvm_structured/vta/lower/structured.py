"""Dense layers of structured weights: by whole tiles, without the zero ones, or with equal ones loaded once, whichever
takes the fewest modelled cycles."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.vta.config import VTAConfig
from tvm_structured.vta.lower.builder import Builder
from tvm_structured.vta.lower.chain import ChainProblem, tiles_of
from tvm_structured.vta.lower.dense import Product
from tvm_structured.vta.lower.layout import Layout
from tvm_structured.vta.lower.lowered import Lowered
from tvm_structured.vta.lower.problem import Problem, check_values
from tvm_structured.vta.lower.tile_matrix import TileMatrix
from tvm_structured.vta.operators import Int8BlockDiagonal, Int8StructuredDense
from tvm_structured.vta.timing import model

WAYS = {  # skip zero tiles, share equal ones
    "dense tiles": (False, False),
    "zero tiles skipped": (True, False),
    "zero tiles skipped, equal ones loaded once": (True, True),
}


def structured_problem(layer: Int8StructuredDense, inputs: tuple[Layout, ...], config: VTAConfig) -> Problem:
    """The best of the exact ways. A transform is modelled too, for the report: its int8 spectra are rounded, so that it
    does not compute what the operator means."""
    check_values(config, layer.expanded)
    ways = {
        name: Product(
            config,
            layer.expanded,
            TileMatrix.from_dense(layer.expanded.weight, config.block, **options),
            inputs[0].rows,
        )
        for name, options in {
            "dense tiles": {"skip_zeros": False, "share": False},
            "zero tiles skipped": {"skip_zeros": True, "share": False},
            "zero tiles skipped, equal ones loaded once": {"skip_zeros": True, "share": True},
        }.items()
    }
    cycles = {name: modelled_cycles(problem, layer, inputs) for name, problem in ways.items()}
    best = min(cycles, key=lambda name: cycles[name])
    parts = [f"{best}: {cycles[best]} modelled cycles"]
    parts += [f"{name}: {count}" for name, count in cycles.items() if name != best]
    transform = transform_problem(layer, inputs[0].rows, config)
    if transform is not None:
        count = modelled_cycles(transform, layer, inputs)
        parts.append(f"transform as products: {count}, with another, rounded result")
    chosen = ways[best]
    return Product(config, chosen.layer, chosen.matrix, chosen.rows, "; ".join(parts))


def noise(rng: np.random.Generator, *shape: int) -> NDArray[np.int8]:
    return rng.integers(1, 128, shape).astype(np.int8)


def modelled_cycles(problem: Problem, operator: Any, inputs: tuple[Layout, ...]) -> int:
    """Of the default schedule."""
    b, schedule = Builder(problem.config), problem.default_schedule()
    problem.emit(b, schedule, [f"input{i}" for i in range(len(inputs))], "output")
    output = Layout.of(operator.output_shape(*(layout.shape for layout in inputs)), problem.config)
    return model(Lowered.build(operator, schedule, inputs, output, b).program).cycles


def transform_problem(layer: Int8StructuredDense, rows: int, config: VTAConfig) -> ChainProblem | None:
    """Products of the shapes that a block-circulant layer has in the frequency domain: transforms of the input's
    blocks, a small product for each frequency (real and imaginary parts side by side), transforms back. For its
    cycles only; None for what is not block-circulant."""
    structure: Any = layer.structure
    if structure.name != "block_circulant" or structure.taps != 1 or layer.residual is not None:
        return None
    p, q, n = structure.c.shape
    rng, padded = np.random.default_rng(0), n + n % 2
    forward = Int8BlockDiagonal(noise(rng, 1, padded, n), groups=q)
    backward = Int8BlockDiagonal(noise(rng, 1, n, padded), groups=p)
    # one frequency: (real, imaginary) of q blocks to those of p blocks; frequencies lie side by side in each block
    middle = Int8BlockDiagonal(
        noise(rng, padded // 2, 2 * p, 2 * q),
        groups=padded // 2,
        in_order=np.arange(q * padded).reshape(q, -1, 2).transpose(1, 0, 2).reshape(-1),
        out_order=np.argsort(np.arange(p * padded).reshape(p, -1, 2).transpose(1, 0, 2).reshape(-1)),
    )
    products = [Product(config, f, tiles_of(f, config.block), rows) for f in (forward, middle, backward)]
    return ChainProblem(config, layer.name, tuple(products))
