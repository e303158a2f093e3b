"""What a default schedule needs to know of a block: its loops, and how every access moves with them.

A block in normal form has exactly one loop for each iteration variable. The address of every access is written as
a linear function of these variables: a stride of 1 along a loop means vectors, a stride of 0 means reuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, sym, tirx
from tvm.s_tir.dlight.analysis import get_root_block, normalize_prim_func
from tvm.s_tir.dlight.analysis.common_analysis import get_sblockrealize

Predicate = tuple[Any, list[Any]]  # condition over loop variables, iteration variables' values
Stride = Any  # int, an expression of symbolic extents, or None where the address is not linear

DATA_PARALLEL, REDUCTION = tirx.IterVar.DataPar, tirx.IterVar.CommReduce
EXPENSIVE = ("exp", "erf", "tanh", "sigmoid", "log", "pow", "sqrt", "rsqrt", "sin", "cos", "if_then_else")


@dataclass(frozen=True)
class Loop:
    """One loop (or several fused ones) and the stride of every access along it; the stores come first."""

    rv: Any
    extent: Any  # int, or an expression
    is_reduction: bool
    branches: bool  # a condition depends on it, as in padding and concatenation
    strides: tuple[Stride, ...]

    @property
    def size(self) -> int:
        """The extent; a symbolic one counts as large."""
        return self.extent if isinstance(self.extent, int) else 1 << 10


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


def product(sizes: Any) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def open_schedule(func: Any) -> tuple[Any, list[Nest]] | None:
    """A schedule with producers inlined and unit loops dropped, and its nests in order.

    None for functions that are not made of plain blocks (loops written by hand, calls of the runtime).
    """
    if not isinstance(func.body, s_tir.SBlockRealize):
        return None
    sch = s_tir.Schedule(func)
    inline_producers(sch)
    infos = normalize_prim_func(sch)
    if not infos:
        return None
    nests = []
    for info in infos:
        nest = nest_of(sch, info.block_rv)
        nest = nest and split_digits(sch, nest)
        if nest is None:
            return None
        nests.append(nest)
    return sch, nests


def depth_of(sch: Any, block: Any, loop: Any) -> int:
    """How many loops there are around the body of a loop that contains the block."""
    variable = sch.get(loop).loop_var
    return next(depth for depth, each in enumerate(sch.get_loops(block), 1) if sch.get(each).loop_var.same_as(variable))


# -- producers ------------------------------------------------------------------------------------------


def inline_producers(sch: Any) -> None:
    """Fold injective blocks into their consumers where nothing expensive gets computed more often than before."""
    root = get_root_block(sch)
    outputs = {sch.get(block).name_hint for block in sch.get_output_blocks(root)}
    for block in sch.get_child_blocks(root):
        stmt = sch.get(block)
        if stmt.name_hint not in outputs and can_inline(stmt) and is_worth_inlining(sch, block):
            sch.compute_inline(block)


def can_inline(stmt: Any) -> bool:
    """TensorIR inlines blocks of the form B[i, j, ...] = f(i, j, ...)."""
    body = stmt.body
    if not isinstance(body, tirx.BufferStore) or reduces(stmt):
        return False
    variables = [iteration.var for iteration in stmt.iter_vars]
    return len(body.indices) == len(variables) and all(
        any(index.same_as(variable) for variable in variables) for index in body.indices
    )


def is_worth_inlining(sch: Any, block: Any) -> bool:
    stmt = sch.get(block)
    consumers = [sch.get(consumer) for consumer in sch.get_consumers(block)]
    if not consumers:
        return False
    if len(consumers) == 1 and not repeats(stmt, consumers[0]):
        # A branch in the innermost loop of a reduction costs more than a pass over its padded input
        return not (reduces(consumers[0]) and calls(stmt.body, "if_then_else"))
    if any(reduces(consumer) and repeats(stmt, consumer) for consumer in consumers):
        return isinstance(stmt.body.value, ir.TensorLoad)  # only moves data
    return not calls(stmt.body, *EXPENSIVE)


def reduces(stmt: Any) -> bool:
    return any(iteration.iter_type == REDUCTION for iteration in stmt.iter_vars)


def repeats(producer: Any, consumer: Any) -> bool:
    """Whether the consumer has more iterations than the producer."""
    inner = product(size_of(iteration.dom.extent) for iteration in producer.iter_vars)
    return product(size_of(iteration.dom.extent) for iteration in consumer.iter_vars) > inner


def size_of(extent: Any) -> int:
    return int(extent) if isinstance(extent, tirx.IntImm) else 1 << 10


# -- strides --------------------------------------------------------------------------------------------


def nest_of(sch: Any, block: Any, skip: int = 0) -> Nest | None:
    """The nest of a block, its `skip` outermost loops and loops of one iteration left out.

    None where a loop drives both spatial and reduced iteration variables, or neither.
    """
    realize, rvs = get_sblockrealize(sch, block), sch.get_loops(block)
    stmt, values = realize.block, list(realize.iter_values)
    stores, loads = accesses(stmt)
    in_loops = Substitution(sch, rvs, stmt, values)
    addresses = [in_loops.address(buffer, indices) for buffer, indices in stores + loads]
    conditions = [in_loops.expression(condition) for condition in branch_conditions(stmt.body)]
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
                any(uses(condition, [loop.loop_var]) for condition in conditions),
                tuple(stride_of(address, loop.loop_var, in_loops.variables) for address in addresses),
            )
        )
    return Nest(sch, block, tuple(loops), tuple(buffer for buffer, _ in stores + loads), len(stores))


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
        def replaced(variable: Any) -> Any:
            return next((value for each, value in self.values if variable.same_as(each)), variable)

        return self.analyzer.simplify(tvm_ffi.structural_map(expression, (tirx.Var, replaced)))

    def address(self, buffer: Any, indices: Sequence[Any]) -> Any:
        address = tirx.const(0, "int64")
        for index, extent in zip(indices, buffer.shape, strict=True):
            address = address * extent + index
        return self.expression(address)


def stride_of(address: Any, variable: Any, variables: Sequence[Any]) -> Stride:
    """The coefficient of a loop variable; None where the address is not linear in it."""
    coefficients = sym.detect_linear_equation(address, [variable])
    if not coefficients or uses(coefficients[0], variables):
        return None
    return extent_of(coefficients[0])


def uses(expression: Any, variables: Sequence[Any]) -> bool:
    found: list[bool] = []
    tvm_ffi.structural_walk(expression, (tirx.Var, lambda each: found.append(any(each.same_as(v) for v in variables))))
    return any(found)


def split_digits(sch: Any, nest: Nest) -> Nest | None:
    """Split loops whose variable v is used as v // q and v % q, as groups and reshapes do, so that strides appear."""
    for loop in nest.loops:
        if None not in loop.strides or not isinstance(loop.extent, int):
            continue
        factors = digit_factors(sch.get(nest.block), sch, loop)
        if factors:
            sch.split(loop.rv, factors)
    return nest_of(sch, nest.block)


def digit_factors(stmt: Any, sch: Any, loop: Loop) -> list[int]:
    """[extent / q_n, q_n / q_n-1, ..., q_1] for the divisors q of a loop's variable, [] if they do not nest."""
    variable = sch.get(loop.rv).loop_var
    realize_values = get_sblockrealize(sch, sch.get_sblock(stmt.name_hint)).iter_values
    own = [i.var for i, v in zip(stmt.iter_vars, realize_values, strict=True) if variable.same_as(v)]
    divisors: set[int] = set()

    def collect(node: Any) -> None:
        if isinstance(node.b, tirx.IntImm) and any(node.a.same_as(each) for each in own):
            divisors.add(int(node.b))

    tvm_ffi.structural_walk(stmt.body, ((tirx.FloorDiv, collect), (tirx.FloorMod, collect)))
    chain = [1, *sorted(q for q in divisors if 1 < q < loop.extent), loop.extent]
    pairs = list(zip(chain, chain[1:], strict=False))
    if len(chain) == 2 or any(larger % smaller for smaller, larger in pairs):
        return []
    return [larger // smaller for smaller, larger in reversed(pairs)]


def predicate_of(sch: Any, block: Any) -> Predicate | None:
    """The condition under which a block runs, to be given back after `compute_at`, which loses it (TVM 0.27)."""
    realize = get_sblockrealize(sch, block)
    return None if isinstance(realize.predicate, tirx.IntImm) else (realize.predicate, list(realize.iter_values))


def restore_predicate(sch: Any, block: Any, predicate: Predicate) -> None:
    """Last of all: primitives refuse blocks with such a condition."""
    condition, old_values = predicate
    realize = get_sblockrealize(sch, block)

    def moved(variable: Any) -> Any:
        pairs = zip(old_values, realize.iter_values, strict=True)
        return next((new for old, new in pairs if variable.same_as(old)), variable)

    condition = tvm_ffi.structural_map(condition, (tirx.Var, moved))
    if not isinstance(realize.predicate, tirx.IntImm):
        condition = tirx.And(realize.predicate, condition)
    set_predicate(sch, block, condition)


def bound_by_extents(sch: Any, block: Any) -> None:
    """Let a block run where its iteration variables are within their extents, and ask for nothing else.

    With symbolic extents `compute_at` derives conditions that are true but too involved to be simplified again.
    """
    realize = get_sblockrealize(sch, block)
    condition: Any = tirx.const(True, "bool")
    for iteration, value in zip(realize.block.iter_vars, realize.iter_values, strict=True):
        if not isinstance(iteration.dom.extent, tirx.IntImm):
            condition = tirx.And(condition, value < iteration.dom.extent)
    set_predicate(sch, block, condition)


def set_predicate(sch: Any, block: Any, condition: Any) -> None:
    realize, innermost = get_sblockrealize(sch, block), sch.get_loops(block)[-1]
    old = sch.get(innermost)
    body = s_tir.SBlockRealize(realize.iter_values, condition, realize.block)
    loop = tirx.For(old.loop_var, old.min, old.extent, old.kind, body, old.thread_binding, old.annotations)
    sch.state.replace(sch.get_sref(innermost), loop, {})


def extent_of(extent: Any) -> Any:
    return int(extent) if isinstance(extent, tirx.IntImm) else extent


def accesses(stmt: Any) -> tuple[list[Any], list[Any]]:
    """(buffer, indices) of stores and of loads; loads of what the block itself writes (accumulators) are left out."""
    stores: list[Any] = []
    loads: list[Any] = []
    tvm_ffi.structural_walk(
        stmt.body,
        (
            (tirx.BufferStore, lambda store: stores.append((store.buffer, store.indices))),
            (ir.TensorLoad, lambda load: loads.append((load.source, load.indices))),
        ),
    )
    return stores, [load for load in loads if not any(load[0].same_as(store[0]) for store in stores)]


def strides_of(buffer: Any, indices: Sequence[Any], iter_vars: Sequence[Any]) -> list[Stride]:
    """Strides of an access along the iteration variables, None for those in which its address is not linear."""
    analyzer = sym.Analyzer()
    for iteration in iter_vars:
        analyzer.bind(iteration.var, iteration.dom)
    address = tirx.const(0, "int64")
    for index, extent in zip(indices, buffer.shape, strict=True):
        address = address * extent + index
    address = analyzer.simplify(address)
    variables = [iteration.var for iteration in iter_vars]
    return [stride_of(address, variable, variables) for variable in variables]


def stride_of(address: Any, variable: Any, variables: Sequence[Any]) -> Stride:
    coefficients = sym.detect_linear_equation(address, [variable])
    if not coefficients or uses(coefficients[0], variables):
        return None
    return extent_of(coefficients[0])


def uses(expression: Any, variables: Sequence[Any]) -> bool:
    found: list[bool] = []
    tvm_ffi.structural_walk(expression, (tirx.Var, lambda each: found.append(any(each.same_as(v) for v in variables))))
    return any(found)


def calls(body: Any, *names: str) -> bool:
    """Whether an intrinsic with one of these names is called."""
    return any(intrinsic(call) in names for call in all_calls(body))


def branch_conditions(body: Any) -> list[Any]:
    return [call.args[0] for call in all_calls(body) if intrinsic(call) == "if_then_else"]


def all_calls(body: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(body, (ir.Call, found.append))
    return found


def intrinsic(call: Any) -> str:
    """`exp` for tirx.exp, `if_then_else` for prim.if_then_else."""
    return str(getattr(call.op, "name", "")).rpartition(".")[2]


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
        i is not None and same_extent(o, i * inner.extent)
        for o, i in zip(outer.strides, inner.strides, strict=True)
    )


def same_extent(a: Any, b: Any) -> bool:
    """Whether two extents or strides are provably equal; unknown ones (None) never are."""
    if a is None or b is None:
        return False
    return a == b if isinstance(a, int) and isinstance(b, int) else bool(sym.Analyzer().can_prove_equal(a, b))
