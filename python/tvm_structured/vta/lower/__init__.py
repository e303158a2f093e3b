"""Operators to static programs.

    lowered = lower(Int8Dense(weight, bias, Requantize(shift=7)), [(1, 512)], VTAConfig())
    y = lowered.run(x)                       # int8, equal to the operator's reference
    model(lowered.program).cycles            # modelled

`LOWERINGS` names the function that makes a `Problem` of each kind of operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm_structured.errors import VTAError
from tvm_structured.vta.config import VTAConfig
from tvm_structured.vta.lower.builder import Builder
from tvm_structured.vta.lower.chain import block_diagonal_problem, chain_problem
from tvm_structured.vta.lower.conv import conv_problem
from tvm_structured.vta.lower.conv_transpose import conv_transpose_problem
from tvm_structured.vta.lower.dense import dense_problem
from tvm_structured.vta.lower.elementwise import add_problem, rescale_problem
from tvm_structured.vta.lower.layout import Layout
from tvm_structured.vta.lower.lowered import Lowered
from tvm_structured.vta.lower.pool import pool_problem
from tvm_structured.vta.lower.problem import Problem
from tvm_structured.vta.lower.schedule import Schedule
from tvm_structured.vta.lower.structured import structured_problem
from tvm_structured.vta.operators import (
    Int8Add,
    Int8AvgPool,
    Int8BlockDiagonal,
    Int8Chain,
    Int8Conv2d,
    Int8Conv2dTranspose,
    Int8Dense,
    Int8MaxPool,
    Int8Rescale,
    Int8StructuredDense,
    Operator,
)

__all__ = ["LOWERINGS", "Layout", "Lowered", "Problem", "Schedule", "lower", "lower_problem", "problem_of"]

LOWERINGS: dict[type[Operator], Callable[[Any, tuple[Layout, ...], VTAConfig], Problem]] = {
    Int8Dense: dense_problem,
    Int8BlockDiagonal: block_diagonal_problem,
    Int8Chain: chain_problem,
    Int8StructuredDense: structured_problem,
    Int8Conv2d: conv_problem,
    Int8Conv2dTranspose: conv_transpose_problem,
    Int8Add: add_problem,
    Int8Rescale: rescale_problem,
    Int8MaxPool: pool_problem,
    Int8AvgPool: pool_problem,
}


def problem_of(operator: Operator, shapes: Sequence[tuple[int, ...]], config: VTAConfig) -> Problem:
    """Raises VTAError for shapes that the operator does not take, or an operator that the accelerator cannot do."""
    operator.output_shape(*(tuple(shape) for shape in shapes))
    if type(operator) not in LOWERINGS:
        raise VTAError(f"{operator.name}: no lowering of {type(operator).__name__}; it must run on the CPU")
    return LOWERINGS[type(operator)](operator, layouts(shapes, config), config)


def layouts(shapes: Sequence[tuple[int, ...]], config: VTAConfig) -> tuple[Layout, ...]:
    return tuple(Layout.of(tuple(shape), config) for shape in shapes)


def lower(
    operator: Operator,
    shapes: Sequence[tuple[int, ...]],
    config: VTAConfig | None = None,
    schedule: Schedule | None = None,
    threads: int = 2,
) -> Lowered:
    """A program for inputs of these shapes, by default with the schedule of the best estimate.

    Raises VTAError where an input's shape is not the operator's, its values do not fit the accelerator's widths, or
    the schedule does not fit its buffers.
    """
    problem = problem_of(operator, shapes, VTAConfig() if config is None else config)
    return lower_problem(problem, operator, shapes, problem.default_schedule(threads) if schedule is None else schedule)


def lower_problem(
    problem: Problem, operator: Operator, shapes: Sequence[tuple[int, ...]], schedule: Schedule
) -> Lowered:
    """The same for a problem that was made before."""
    builder, inputs = Builder(problem.config), layouts(shapes, problem.config)
    problem.emit(builder, schedule, [f"input{i}" for i in range(len(inputs))], "output")
    output = Layout.of(operator.output_shape(*(layout.shape for layout in inputs)), problem.config)
    return Lowered.build(operator, schedule, inputs, output, builder, problem.reason)
