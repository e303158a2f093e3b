"""Elementwise functions, transposes, concatenation, padding, gathers: every output element on its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.loops import partition, tile
from tvm_structured.schedules.nest import Loop, Nest, collapse, open_schedule, product

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
    if not loops:
        return
    outer, inner = loops[:-1], loops[-1]
    if product(loop.size for loop in loops) >= PARALLEL_WORK and cpu.cores > 1:
        if product(loop.size for loop in outer) >= cpu.cores:
            outer = run_parallel(nest, outer, cpu)
        else:
            chunk, rest = tile(nest.sch, inner.rv, CHUNK)
            nest.sch.parallel(chunk)
            inner = replace(inner, rv=rest, extent=CHUNK)
    partition(nest.sch, *(loop.rv for loop in outer if loop.branches))
    vectorize(nest, inner, cpu)


def run_parallel(nest: Nest, outer: list[Loop], cpu: Cpu) -> list[Loop]:
    """Threads over as few of the outermost loops as keep them all busy. The loops that can still be cut."""
    taken = 1
    while taken < len(outer) and product(loop.size for loop in outer[:taken]) < 4 * cpu.cores:
        taken += 1
    nest.sch.parallel(nest.sch.fuse(*(loop.rv for loop in outer[:taken])) if taken > 1 else outer[0].rv)
    return outer if taken == 1 else outer[taken:]


def vectorize(nest: Nest, inner: Loop, cpu: Cpu) -> None:
    """Explicit vectors where every access is one vector or one number; otherwise LLVM decides."""
    if inner.branches:
        partition(nest.sch, inner.rv)
    elif all(stride in (0, 1) for stride in inner.strides) and inner.size >= 4:
        _, lanes = tile(nest.sch, inner.rv, min(cpu.lanes, 1 << (inner.size.bit_length() - 1)))
        nest.sch.vectorize(lanes)
