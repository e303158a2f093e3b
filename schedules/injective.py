"""Elementwise functions, transposes, concatenation, padding, gathers: every output element on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.loops import partition, tile
from tvm_structured.schedules.nest import Loop, Nest, collapse, product
from tvm_structured.schedules.producers import open_schedule

PARALLEL_WORK = 1 << 14  # elements; starting threads costs as much as a few thousand
CHUNK = 1 << 12  # elements a thread does at a time where a single loop is left


def apply(func: Any, target: Any) -> Any | None:
    """A schedule for a function all of whose blocks are injective, else None."""
    opened = open_schedule(func)
    if opened is None or any(nest.reduced for nest in opened[1]):
        return None
    for nest in opened[1]:
        schedule_injective(nest, Cpu.of(target))
    return opened[0]


def schedule_injective(nest: Nest, cpu: Cpu) -> None:
    """Threads over the outer loops, vectors along the innermost."""
    loops = collapse(nest, nest.loops)
    go_parallel = nest.work >= PARALLEL_WORK and cpu.cores > 1
    across = transposed_loop(loops, cpu)
    if across is not None:
        schedule_transpose(nest, loops, across, cpu, go_parallel)
        return
    if loops and go_parallel:
        if product(loop.size for loop in loops[:-1]) >= cpu.cores:
            loops = run_parallel(nest, loops, cpu)
        else:
            chunk, rest = tile(nest.sch, loops[-1].rv, CHUNK)
            nest.sch.parallel(chunk)
            loops[-1] = replace(loops[-1], rv=rest, extent=CHUNK)
    schedule_inner(nest, loops, cpu)


def run_parallel(nest: Nest, loops: Sequence[Loop], cpu: Cpu) -> list[Loop]:
    """Threads over as few of the outermost loops as keep them all busy. The loops that are left, and a single one that
    was taken, which conditions may still cut."""
    taken = 1
    while taken < len(loops) - 1 and product(loop.size for loop in loops[:taken]) < 4 * cpu.cores:
        taken += 1
    nest.sch.parallel(nest.sch.fuse(*(loop.rv for loop in loops[:taken])) if taken > 1 else loops[0].rv)
    return list(loops if taken == 1 else loops[taken:])


def to_cut(loops: Sequence[Loop]) -> list[Loop]:
    """The loops to cut where conditions change: of each condition the one that crosses it fastest, then the longest.

    Never two of one condition: of y * 2 + k >= 3, with both marked, LoopPartition takes what holds for the first k to
    hold for all (TVM 0.27).
    """
    chosen: list[Loop] = []
    for number in range(len(loops[0].conditions) if loops else 0):
        free = [loop for loop in loops if loop.conditions[number] != 0 and not any(share(loop, c) for c in chosen)]
        if free:
            chosen.append(max(free, key=lambda loop, n=number: (step_size(loop.conditions[n]), loop.size)))
    return chosen


def share(one: Loop, other: Loop) -> bool:
    """Whether a condition depends on both."""
    return any(a != 0 and b != 0 for a, b in zip(one.conditions, other.conditions, strict=True))


def step_size(step: Any) -> int:
    return abs(step) if isinstance(step, int) else 0


def schedule_inner(nest: Nest, loops: Sequence[Loop], cpu: Cpu) -> None:
    """Explicit vectors where every access is one vector or one number; otherwise LLVM decides."""
    partition(nest.sch, *(loop.rv for loop in to_cut(loops)))
    if not loops or loops[-1].branches:
        return
    inner = loops[-1]
    if all(stride in (0, 1) for stride in inner.strides) and inner.size >= 4:
        _, lanes = tile(nest.sch, inner.rv, min(cpu.lanes, 1 << (inner.size.bit_length() - 1)))
        nest.sch.vectorize(lanes)


def transposed_loop(loops: Sequence[Loop], cpu: Cpu) -> Loop | None:
    """The loop along which a load is contiguous while the store is contiguous along the innermost."""
    if not loops or loops[-1].strides[0] != 1 or min(loop.size for loop in loops[-1:]) < cpu.lanes:
        return None
    for loop in loops[:-1]:
        steps = zip(loop.strides[1:], loops[-1].strides[1:], strict=True)
        if any(along == 1 and across not in (0, 1) for along, across in steps) and loop.size >= cpu.lanes:
            return None if loop.branches or loops[-1].branches else loop
    return None


def schedule_transpose(nest: Nest, loops: Sequence[Loop], across: Loop, cpu: Cpu, go_parallel: bool) -> None:
    """Squares of lanes x lanes elements, so that each cache line is read once."""
    sch = nest.sch
    others = [loop for loop in loops[:-1] if loop is not across]
    rows, row = tile(sch, across.rv, cpu.lanes)
    columns, lanes = tile(sch, loops[-1].rv, cpu.lanes)
    sch.reorder(*(loop.rv for loop in others), rows, columns, row, lanes)
    sch.vectorize(lanes)
    if go_parallel:
        if product(loop.size for loop in others) >= 4 * cpu.cores:
            sch.parallel(sch.fuse(*(loop.rv for loop in others)) if len(others) > 1 else others[0].rv)
        else:
            sch.parallel(rows)
