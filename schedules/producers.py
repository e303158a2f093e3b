"""Before a default schedule: producers go into their consumers, unit loops and hidden digits of indices come out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, tirx
from tvm.s_tir.dlight.analysis import get_root_block, normalize_prim_func
from tvm.s_tir.dlight.analysis.common_analysis import get_sblockrealize

from tvm_structured.schedules import vector_math
from tvm_structured.schedules.nest import REDUCTION, Loop, Nest, calls, nest_of, product, size_of

FORMULAS = tuple(name.removeprefix("tirx.") for name in vector_math.FORMULAS)
EXPENSIVE = (*FORMULAS, "sqrt", "rsqrt", "sin", "cos", "if_then_else")


def open_schedule(func: Any) -> tuple[Any, list[Nest]] | None:
    """A schedule with producers inlined and unit loops dropped, and its nests in order.

    None for functions that are not made of plain blocks (loops written by hand, calls of the runtime).
    """
    if not isinstance(func.body, s_tir.SBlockRealize):
        return None
    sch = s_tir.Schedule(func)
    if not all(is_plain(sch.get(block)) for block in sch.get_child_blocks(get_root_block(sch))):
        return None
    inline_producers(sch)
    infos = normalize_prim_func(sch)
    for info in infos or ():
        if not sch.get_loops(info.block_rv):
            sch.add_unit_loop(info.block_rv)  # rfactor stumbles over neighbours without loops (TVM 0.27)
    nests = [split_digits(sch, info.block_rv) for info in infos or ()]
    found = [nest for nest in nests if nest is not None]
    return (sch, found) if found and len(found) == len(nests) else None


def is_plain(stmt: Any) -> bool:
    """Whether a block computes elements by assignments; not by loops of its own, nor by calls of the runtime."""
    others: list[Any] = []
    tvm_ffi.structural_walk(stmt.body, ((tirx.For, tirx.While, tirx.Evaluate), others.append))
    return not others


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
    if calls(stmt.body, *FORMULAS) and any(calls(consumer.body, *FORMULAS) for consumer in consumers):
        return False  # TVM 0.27 generates code of formulas within formulas in exponential time
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
    return bool(product(size_of(iteration.dom.extent) for iteration in consumer.iter_vars) > inner)


# -- digits ---------------------------------------------------------------------------------------------


def split_digits(sch: Any, block: Any) -> Nest | None:
    """Split loops whose variable v is used as v // q and v % q, as groups and reshapes do, so that strides appear."""
    nest = nest_of(sch, block)
    for loop in nest.loops if nest is not None else ():
        if None in loop.strides and isinstance(loop.extent, int):
            factors = digit_factors(sch, block, loop)
            if factors:
                sch.split(loop.rv, factors)
    return nest_of(sch, block)


def digit_factors(sch: Any, block: Any, loop: Loop) -> list[int]:
    """[extent / q_n, q_n / q_n-1, ..., q_1] for the divisors q of a loop's variable, [] if they do not nest."""
    variable, realize = sch.get(loop.rv).loop_var, get_sblockrealize(sch, block)
    pairs = zip(realize.block.iter_vars, realize.iter_values, strict=True)
    own = [iteration.var for iteration, value in pairs if variable.same_as(value)]
    divisors: set[int] = set()

    def collect(node: Any) -> None:
        if isinstance(node.b, tirx.IntImm) and any(node.a.same_as(each) for each in own):
            divisors.add(int(node.b))

    tvm_ffi.structural_walk(realize.block.body, ((tirx.FloorDiv, collect), (tirx.FloorMod, collect)))
    chain = [1, *sorted(q for q in divisors if 1 < q < loop.extent), loop.extent]
    steps = list(pairwise(chain))
    if len(chain) == 2 or any(larger % smaller for smaller, larger in steps):
        return []
    return [larger // smaller for smaller, larger in reversed(steps)]
