"""Reductions: rows (softmax, layer_norm, mean), columns, pooling windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.injective import PARALLEL_WORK, schedule_injective, schedule_inner
from tvm_structured.schedules.loops import partition, tile
from tvm_structured.schedules.nest import Loop, Nest, can_collapse, collapse, nest_of, product, same_extent
from tvm_structured.schedules.predicates import predicate_of, restore_predicate
from tvm_structured.schedules.producers import open_schedule

MAX_TAPS = 32  # reductions up to this size are unrolled: pooling windows, depthwise filters
ACCUMULATORS = 4  # vectors; enough to hide the latency of additions


def apply(func: Any, target: Any) -> Any | None:
    """All that happens to one row (image plane, group) in one iteration of a parallel loop: the row stays in cache.

    None where the blocks share no outer loops, or too few to keep all threads busy.
    """
    opened = open_schedule(func)
    if opened is None or not any(nest.reduced for nest in opened[1]):
        return None
    sch, nests = opened
    cpu = Cpu.of(target)
    shared = shared_loops(nests, cpu)
    if is_large(nests, cpu) and num_rows(nests, shared) < cpu.cores and len(nests) > 1:
        return None
    schedule_rows(sch, nests, shared, cpu)
    return sch


def schedule_alone(nest: Nest, cpu: Cpu) -> None:
    """A block that shares no loops with others."""
    if nest.reduced:
        schedule_rows(nest.sch, [nest], shared_loops([nest], cpu), cpu)
    else:
        schedule_injective(nest, cpu)


def is_large(nests: Sequence[Nest], cpu: Cpu) -> bool:
    """Whether the work is worth starting threads."""
    return cpu.cores > 1 and sum(nest.work for nest in nests) >= PARALLEL_WORK


def num_rows(nests: Sequence[Nest], shared: int) -> int:
    return product(loop.size for loop in nests[-1].loops[:shared])


def shared_loops(nests: Sequence[Nest], cpu: Cpu) -> int:
    """How many outer loops the blocks have in common: of one extent, crossing what they exchange in one way."""
    count = 0
    for position, loops in enumerate(zip(*(nest.loops for nest in nests), strict=False)):
        if any(loop.is_reduction or not same_extent(loop.extent, loops[0].extent) for loop in loops):
            break
        if any(nest.reduced and loop is vector_loop(nest, cpu) for nest, loop in zip(nests, loops, strict=True)):
            break
        if not agree_on_exchange(nests, position):
            break
        count += 1
    return count


def agree_on_exchange(nests: Sequence[Nest], position: int) -> bool:
    """Whether every buffer between two blocks is written and read with one stride along their loops at `position`."""
    written: list[tuple[Any, Any]] = []
    for nest in nests:
        strides = nest.loops[position].strides
        for index, (buffer, stride) in enumerate(zip(nest.buffers, strides, strict=True)):
            if index < nest.num_stores:
                written.append((buffer, stride))
            elif any(b.same_as(buffer) and not same_extent(stride, s) for b, s in written):
                return False
    return True


def vector_loop(nest: Nest, cpu: Cpu) -> Loop | None:
    """The spatial loop along which a reduction is vectorised; None: along the reduction itself."""
    along = next((loop for loop in nest.spatial if loop.strides[0] == 1 and not loop.branches), None)
    if along is not None and all(stride in (0, 1) for stride in along.strides):
        return along
    return None if contiguous_run(nest) >= 2 * cpu.lanes else along


def contiguous_run(nest: Nest) -> int:
    """How many consecutive elements the innermost loops of the reduction read."""
    if not nest.reduced or nest.reduced[-1].branches or 1 not in nest.reduced[-1].strides:
        return 0
    length = nest.reduced[-1].size
    for inner, outer in zip(nest.reduced[::-1], nest.reduced[-2::-1], strict=False):
        if not can_collapse(outer, inner):
            break
        length *= outer.size
    return length


# -- one row --------------------------------------------------------------------------------------------


def schedule_rows(sch: Any, nests: Sequence[Nest], shared: int, cpu: Cpu) -> None:
    """Place all blocks in one loop over the `shared` loops of the last block, then schedule each inside of it."""
    go_parallel = is_large(nests, cpu)
    parts = [part for nest in nests for part in split_lanes(nest, cpu)]
    predicates = [predicate_of(sch, part.block) for part in parts]
    if shared:
        loops = [loop.rv for loop in parts[-1].loops[:shared]]
        row = sch.fuse(*loops) if shared > 1 else loops[0]
        if go_parallel:
            sch.parallel(row)
        for part in reversed(parts[:-1]):
            sch.compute_at(part.block, row, preserve_unit_loops=True)
    for part, predicate in zip(parts, predicates, strict=True):
        inner = nest_of(sch, part.block, skip=1 if shared else 0)
        if inner is not None:
            if predicate is not None:
                partition(sch, *(loop.rv for loop in inner.loops))
            schedule_part(inner, cpu, go_parallel and not shared)
    if shared:
        for part, predicate in zip(parts, predicates, strict=True):
            if predicate is not None:
                restore_predicate(sch, part.block, predicate)


def split_lanes(nest: Nest, cpu: Cpu) -> list[Nest]:
    """A reduction of consecutive elements --> partial results in lanes, then their reduction; else the nest itself."""
    if vector_loop(nest, cpu) is not None or contiguous_run(nest) < 2 * cpu.lanes:
        return [nest]
    length = collapse(nest, nest.reduced)[-1]
    lanes = cpu.lanes * (ACCUMULATORS if length.size >= 4 * ACCUMULATORS * cpu.lanes else 1)
    parts, rv = [], length.rv
    while lanes >= 4:
        _, lane = tile(nest.sch, rv, lanes)
        parts.append(nest.sch.rfactor(lane, factor_axis=len(nest.buffers[0].shape)))
        rv = nest.sch.get_loops(nest.block)[-1]
        lanes = cpu.lanes if lanes > cpu.lanes else lanes // 4
    found = [nest_of(nest.sch, block) for block in (*parts, nest.block)]
    return [each for each in found if each is not None]


def schedule_part(nest: Nest, cpu: Cpu, go_parallel: bool) -> None:
    """One block, inside of its row."""
    if not nest.reduced:
        schedule_inner(nest, collapse(nest, nest.loops), cpu)
        return
    along = vector_loop(nest, cpu)
    if along is not None and all(stride in (0, 1) for stride in along.strides) and along.size >= 4:
        schedule_columns(nest, along, cpu, go_parallel)
    else:
        schedule_window(nest, along, go_parallel)


def schedule_columns(nest: Nest, along: Loop, cpu: Cpu, go_parallel: bool) -> None:
    """A tile of columns at a time, its accumulators in registers."""
    sch, block = nest.sch, nest.block
    reduced = [loop.rv for loop in nest.reduced]
    outer = [loop.rv for loop in nest.spatial if loop.rv is not along.rv]
    width = min(ACCUMULATORS * cpu.lanes, 1 << (along.size.bit_length() - 1))
    lanes = along.rv
    if along.extent != width:
        tiles, lanes = tile(sch, along.rv, width)
        outer.append(tiles)
    sch.reorder(*outer, *reduced, lanes)
    if along.extent != width and nest.num_stores == 1:
        written = sch.cache_write(block, 0, "global")
        sch.reverse_compute_at(written, tiles, preserve_unit_loops=True)
        vectorize_last(sch, written)
    if go_parallel and outer:
        sch.parallel(outer[0])
    sch.vectorize(lanes)
    if nest.taps <= MAX_TAPS:
        unroll(sch, reduced)
    sch.decompose_reduction(block, reduced[0])


def vectorize_last(sch: Any, block: Any) -> None:
    sch.vectorize(sch.get_loops(block)[-1])


def schedule_window(nest: Nest, along: Loop | None, go_parallel: bool) -> None:
    """Few elements to reduce, read with strides: unroll them inside of the loop that LLVM is to vectorise."""
    sch = nest.sch
    reduced = [loop.rv for loop in nest.reduced]
    outer = [loop.rv for loop in nest.spatial if along is None or loop.rv is not along.rv]
    inner = [] if along is None else [along.rv]
    if nest.taps <= MAX_TAPS:
        sch.reorder(*outer, *inner, *reduced)
        unroll(sch, reduced)
    else:
        sch.reorder(*outer, *reduced, *inner)
    if go_parallel and outer:
        sch.parallel(outer[0])
    sch.decompose_reduction(nest.block, reduced[0])


def unroll(sch: Any, loops: Sequence[Any]) -> None:
    for loop in loops:
        sch.unroll(loop)
