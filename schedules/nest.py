"""What a default schedule needs to know of a block: its loops, and how every access moves with them.

The address of every access is written as a linear function of the loop variables: a stride of 1 along a loop means
vectors, a stride of 0 means reuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, sym, tirx
from tvm.s_tir.dlight.analysis.common_analysis import get_sblockrealize

Stride = Any  # int, an expression of symbolic extents, or None where the address is not linear

DATA_PARALLEL, REDUCTION = tirx.IterVar.DataPar, tirx.IterVar.CommReduce


@dataclass(frozen=True)
class Loop:
    """One loop (or several fused ones) and the stride of every access along it; the stores come first."""

    rv: Any
    extent: Any  # int, or an expression
    is_reduction: bool
    strides: tuple[Stride, ...]
    conditions: tuple[Stride, ...] = ()  # the step of every condition along it, as in padding and concatenation

    @property
    def branches(self) -> bool:
        """Whether a condition depends on it."""
        return any(step != 0 for step in self.conditions)

    @property
    def size(self) -> int:
        return size_of(self.extent)


@dataclass(frozen=True)
class Nest:
    """A block with its loops, outermost first."""

    sch: Any
    block: Any
    loops: tuple[Loop, ...]
    buffers: tuple[Any, ...]  # what the accesses access
    num_stores: int

    @property
    def spatial(self) -> tuple[Loop, ...]:
        return tuple(loop for loop in self.loops if not loop.is_reduction)

    @property
    def reduced(self) -> tuple[Loop, ...]:
        return tuple(loop for loop in self.loops if loop.is_reduction)

    @property
    def taps(self) -> int:
        """Elements that are reduced to one."""
        return product(loop.size for loop in self.reduced)

    @property
    def work(self) -> int:
        """Iterations in all."""
        return product(loop.size for loop in self.loops)


def nest_of(sch: Any, block: Any, skip: int = 0) -> Nest | None:
    """The nest of a block, its `skip` outermost loops and loops of one iteration left out.

    None where a loop drives both spatial and reduced iteration variables, or neither.
    """
    realize, rvs = get_sblockrealize(sch, block), sch.get_loops(block)
    stmt, values = realize.block, list(realize.iter_values)
    stores, loads = accesses(stmt.body)
    in_loops = Substitution(sch, rvs, stmt, values)
    addresses = [in_loops.address(buffer, indices) for buffer, indices in stores + loads]
    branches = [in_loops.expression(condition) for condition in branch_conditions(stmt.body)]
    conditions = [part for condition in branches for part in conjuncts(condition)]
    loops = []
    for rv in rvs[skip:]:
        loop = sch.get(rv)
        if extent_of(loop.extent) == 1:
            continue
        kinds = {i.iter_type for i, v in zip(stmt.iter_vars, values, strict=True) if uses(v, [loop.loop_var])}
        if kinds not in ({DATA_PARALLEL}, {REDUCTION}):
            return None
        loops.append(
            Loop(
                rv,
                extent_of(loop.extent),
                REDUCTION in kinds,
                tuple(stride_of(address, loop.loop_var, in_loops.variables) for address in addresses),
                tuple(condition_step(condition, loop.loop_var, in_loops.variables) for condition in conditions),
            )
        )
    return Nest(sch, block, tuple(loops), tuple(buffer for buffer, _ in stores + loads), len(stores))


def needed_nest(sch: Any, block: Any, skip: int = 0) -> Nest:
    """Like `nest_of` for a block of known form; raises ScheduleError where it has another."""
    nest = nest_of(sch, block, skip)
    if nest is None:
        raise s_tir.ScheduleError(f"loops of block {sch.get(block).name_hint} drive no single kind of iteration")
    return nest


class Substitution:
    """Expressions over iteration variables, rewritten over loop variables and simplified with their ranges."""

    def __init__(self, sch: Any, loops: Sequence[Any], stmt: Any, values: Sequence[Any]) -> None:
        self.values = list(zip((iteration.var for iteration in stmt.iter_vars), values, strict=True))
        self.analyzer = sym.Analyzer()
        self.variables = []
        for loop in map(sch.get, loops):
            self.analyzer.bind(loop.loop_var, ir.Range.from_min_extent(loop.min, loop.extent))
            self.variables.append(loop.loop_var)

    def expression(self, expression: Any) -> Any:
        return self.analyzer.simplify(substitute(expression, self.values))

    def address(self, buffer: Any, indices: Sequence[Any]) -> Any:
        address = tirx.const(0, "int64")
        for index, extent in zip(indices, buffer.shape, strict=True):
            address = address * extent + index
        return self.expression(address)


def substitute(expression: Any, values: Sequence[tuple[Any, Any]]) -> Any:
    """The expression (or statement) with variables replaced by values."""

    def replaced(variable: Any) -> Any:
        return next((value for each, value in values if variable.same_as(each)), variable)

    return tvm_ffi.structural_map(expression, (tirx.Var, replaced))


def stride_of(address: Any, variable: Any, variables: Sequence[Any]) -> Stride:
    """The coefficient of a loop variable; None where the address is not linear in it."""
    coefficients = sym.detect_linear_equation(address, [variable])
    if not coefficients or uses(coefficients[0], variables):
        return None
    return extent_of(coefficients[0])


def accesses(body: Any) -> tuple[list[Any], list[Any]]:
    """(buffer, indices) of stores and of loads; loads of what the block itself writes (accumulators) are left out."""
    stores: list[Any] = []
    loads: list[Any] = []
    tvm_ffi.structural_walk(
        body,
        (
            (tirx.BufferStore, lambda store: stores.append((store.buffer, store.indices))),
            (ir.TensorLoad, lambda load: loads.append((load.source, load.indices))),
        ),
    )
    return stores, [load for load in loads if not any(load[0].same_as(store[0]) for store in stores)]


def calls(body: Any, *names: str) -> bool:
    """Whether an intrinsic with one of these names is called."""
    return any(intrinsic(call) in names for call in all_calls(body))


def branch_conditions(body: Any) -> list[Any]:
    return [call.args[0] for call in all_calls(body) if intrinsic(call) == "if_then_else"]


def conjuncts(condition: Any) -> list[Any]:
    if isinstance(condition, tirx.And):
        return conjuncts(condition.a) + conjuncts(condition.b)
    return [condition]


def condition_step(condition: Any, variable: Any, variables: Sequence[Any]) -> Stride:
    """By how much an iteration moves the sides of a comparison against each other; None where that is no number."""
    if not uses(condition, [variable]):
        return 0
    is_linear = isinstance(condition, (tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ, tirx.NE))
    return stride_of(condition.a - condition.b, variable, variables) if is_linear else None


def all_calls(body: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(body, (ir.Call, found.append))
    return found


def intrinsic(call: Any) -> str:
    """`exp` for tirx.exp, `if_then_else` for prim.if_then_else."""
    return str(getattr(call.op, "name", "")).rpartition(".")[2]


def uses(expression: Any, variables: Sequence[Any]) -> bool:
    found: list[bool] = []
    tvm_ffi.structural_walk(expression, (tirx.Var, lambda each: found.append(any(each.same_as(v) for v in variables))))
    return any(found)


def collapse(nest: Nest, loops: Sequence[Loop]) -> list[Loop]:
    """Fuse neighbouring loops which every access crosses as if they were one, so that inner loops get long."""
    result: list[Loop] = []
    for loop in reversed(loops):
        if result and can_collapse(loop, result[0]):
            inner = result[0]
            result[0] = replace(inner, rv=nest.sch.fuse(loop.rv, inner.rv), extent=loop.extent * inner.extent)
        else:
            result.insert(0, loop)
    return result


def can_collapse(outer: Loop, inner: Loop) -> bool:
    if outer.is_reduction != inner.is_reduction or outer.branches or inner.branches:
        return False
    return all(
        i is not None and same_extent(o, i * inner.extent) for o, i in zip(outer.strides, inner.strides, strict=True)
    )


def depth_of(sch: Any, block: Any, loop: Any) -> int:
    """How many loops there are around the body of a loop that contains the block."""
    variable = sch.get(loop).loop_var
    return next(depth for depth, each in enumerate(sch.get_loops(block), 1) if sch.get(each).loop_var.same_as(variable))


def extent_of(extent: Any) -> Any:
    return int(extent) if isinstance(extent, tirx.IntImm) else extent


def size_of(extent: Any) -> int:
    """A number for decisions; a symbolic extent counts as large."""
    return int(extent) if isinstance(extent, (int, tirx.IntImm)) else 1 << 10


def same_extent(a: Any, b: Any) -> bool:
    """Whether two extents or strides are provably equal; unknown ones (None) never are."""
    if a is None or b is None:
        return False
    return a == b if isinstance(a, int) and isinstance(b, int) else bool(sym.Analyzer().can_prove_equal(a, b))


def product(sizes: Iterable[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total
