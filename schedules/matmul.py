"""Products with reuse: batched matrix products of two activations, and convolutions that no structured kernel takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import s_tir

from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.injective import PARALLEL_WORK, schedule_injective
from tvm_structured.schedules.loops import partition, tile
from tvm_structured.schedules.nest import (
    Loop,
    Nest,
    depth_of,
    needed_nest,
    product,
    same_extent,
    size_of,
)
from tvm_structured.schedules.operands import contiguous_operands, dimension_along
from tvm_structured.schedules.predicates import bound_by_extents
from tvm_structured.schedules.producers import open_schedule


@dataclass(frozen=True)
class Roles:
    """What the spatial loops of a product do.

    One operand, the vector, is contiguous along `lanes` and the same for all of `reuse`; others are numbers or
    vectors there. `streamed` loops move the vector only, along `batch` both change.
    """

    lanes: Loop
    reuse: Loop
    streamed: tuple[Loop, ...]
    batch: tuple[Loop, ...]


def apply(func: Any, target: Any) -> Any | None:
    """A register tile of `reuse` x `lanes` accumulators; None without a single reduction that has such loops."""
    opened = open_schedule(func)
    if opened is None or sum(bool(nest.reduced) for nest in opened[1]) != 1:
        return None
    sch, nests = opened
    cpu = Cpu.of(target)
    nests = contiguous_operands(sch, nests)
    position = next(index for index, nest in enumerate(nests) if nest.reduced)
    main, *after = nests[position:]
    roles = find_roles(main)
    if roles is None or len(after) > 1:
        return None
    for nest in nests[:position]:
        schedule_injective(nest, cpu)
    epilogue = split_alike(main, after[0]) if after else None
    if epilogue is not None and not is_epilogue(main, epilogue):
        schedule_injective(epilogue, cpu)
        epilogue = None
    schedule_product(main, roles, epilogue, cpu)
    return sch


def find_roles(nest: Nest) -> Roles | None:
    lanes = next((loop for loop in reversed(nest.spatial) if can_be_lanes(loop)), None)
    if lanes is None or nest.num_stores > 1:
        return None
    loads = range(nest.num_stores, len(nest.buffers))
    vectors = [load for load in loads if lanes.strides[load] == 1]
    numbers = [load for load in loads if lanes.strides[load] == 0]
    rest = [loop for loop in nest.spatial if loop is not lanes]
    candidates = [loop for loop in rest if loop.size > 1 and any(loop.strides[load] == 0 for load in vectors)]
    if not candidates:
        return None
    reuse = max(candidates, key=lambda loop: (isinstance(loop.extent, int), loop.size))
    others = [loop for loop in rest if loop is not reuse]
    streamed = [loop for loop in others if any(loop.strides[load] == 0 for load in numbers)]
    return Roles(lanes, reuse, tuple(streamed), tuple(loop for loop in others if loop not in streamed))


def can_be_lanes(loop: Loop) -> bool:
    is_contiguous = loop.strides[0] == 1 and all(stride in (0, 1) for stride in loop.strides)
    return is_contiguous and loop.size >= 4 and not loop.branches


# -- the block that stores ------------------------------------------------------------------------------


def split_alike(main: Nest, sink: Nest) -> Nest:
    """Split loops of `sink` into the digits into which those of `main` were split."""
    wanted = [loop.extent for loop in main.spatial]
    for loop in sink.loops:
        digits: list[Any] = []
        while wanted and not (digits and same_extent(product(digits), loop.extent)):
            digits.append(wanted.pop(0))
        if len(digits) > 1 and all(isinstance(digit, int) for digit in digits):
            sink.sch.split(loop.rv, digits)
    return needed_nest(sink.sch, sink.block)


def is_epilogue(main: Nest, after: Nest) -> bool:
    """Whether a block does something to every result where it is, so that it can work on a register tile."""
    found = [counterpart(main, loop, after) for loop in main.spatial]
    return len(found) == len(after.loops) and None not in found


def counterpart(main: Nest, loop: Loop, sink: Nest) -> Loop | None:
    """The loop of a block that reads results of `main` in the same direction."""
    reads = [index for index, buffer in enumerate(sink.buffers) if buffer.same_as(main.buffers[0])]
    for candidate in sink.loops:
        strides = [candidate.strides[index] for index in reads]
        if strides and all(same_extent(stride, loop.strides[0]) for stride in strides):
            return candidate if same_extent(candidate.extent, loop.extent) else None
    return None


# -- the tile -------------------------------------------------------------------------------------------


def register_tile(roles: Roles, cpu: Cpu) -> tuple[int, int]:
    """(rows, columns) of accumulators; the vector operand and one broadcast number need registers too."""
    vectors = 4 if cpu.registers >= 32 else 2
    while vectors > 1 and roles.lanes.size < vectors * cpu.lanes:
        vectors //= 2
    columns = min(vectors * cpu.lanes, 1 << (roles.lanes.size.bit_length() - 1))
    most = min(12, (cpu.registers - vectors - 2) // vectors, roles.reuse.size)
    divisors = [rows for rows in range(most, most // 2, -1) if roles.reuse.size % rows == 0]
    return (divisors[0] if divisors and isinstance(roles.reuse.extent, int) else most), columns


def schedule_product(main: Nest, roles: Roles, epilogue: Nest | None, cpu: Cpu) -> None:
    """A tile accumulates over the whole reduction in registers; then come the epilogue and the only store."""
    sch, block = main.sch, main.block
    rows, columns = register_tile(roles, cpu)
    sink = epilogue
    if sink is None:
        written = sch.cache_write(block, 0, "global")
        main = needed_nest(sch, block)
        sink = split_alike(main, needed_nest(sch, written))
    tile_buffer(main, roles, rows, columns)
    innermost = tile_sink(main, sink, roles, rows, columns, cpu)
    sch.compute_at(block, innermost, preserve_unit_loops=True)
    depth = depth_of(sch, block, innermost)
    inside = needed_nest(sch, block, skip=depth)
    row = [loop.rv for loop in inside.spatial if same_loads(loop, roles.reuse)]
    lanes = [loop.rv for loop in inside.spatial if same_loads(loop, roles.lanes)]
    reduced = [loop.rv for loop in inside.reduced]
    sch.reorder(*reduced, *row, *lanes)
    for loop in row:
        sch.unroll(loop)
    for loop in lanes:
        sch.vectorize(loop)
    partition(sch, *row, *lanes)
    start = sch.decompose_reduction(block, reduced[0])
    partition(sch, *sch.get_loops(start)[depth:])
    for accumulating in (start, block):
        bound_by_extents(sch, accumulating)


def tile_buffer(main: Nest, roles: Roles, rows: int, columns: int) -> None:
    """Store each tile of accumulators in one piece: TVM cannot bound part of a symbolic extent, and reserves it all."""
    tiles = ((roles.reuse, rows), (roles.lanes, columns))
    if all(isinstance(loop.extent, int) for loop, _ in tiles):
        return
    sizes = {dimension_along(main.buffers[0], loop.strides[0], loop.extent): size for loop, size in tiles}
    if None in sizes:
        raise s_tir.ScheduleError(f"{main.buffers[0].name} has no dimension for a loop of the tile")
    main.sch.transform_layout(
        main.block,
        ("write", 0),
        lambda *index: [
            *(i // sizes[d] if d in sizes else i for d, i in enumerate(index)),
            *(index[d] % size for d, size in sizes.items()),
        ],
        assume_injective_transform=True,
    )


def same_loads(a: Loop, b: Loop) -> bool:
    return all(same_extent(x, y) for x, y in zip(a.strides[1:], b.strides[1:], strict=True))


def tile_sink(main: Nest, sink: Nest, roles: Roles, rows: int, columns: int, cpu: Cpu) -> Any:
    """Tile and order the loops of the block that stores, with threads over outer ones; the loop around a tile."""
    sch = main.sch

    def in_sink(loop: Loop) -> Any:
        found = counterpart(main, loop, sink)
        if found is None:
            raise s_tir.ScheduleError(f"no loop reads {main.buffers[0].name} along a loop of extent {loop.extent}")
        return found.rv

    row_tiles, row = tile(sch, in_sink(roles.reuse), rows)
    lane_tiles, lane = tile(sch, in_sink(roles.lanes), columns)
    batch, streamed = ([in_sink(loop) for loop in loops] for loops in (roles.batch, roles.streamed))
    # What fits the first-level cache stays there: filters of a convolution while the image streams by, a panel of
    # the right-hand matrix while rows stream by (unless there are too few panels to share among the threads)
    if streamed:
        inner = [row_tiles, *streamed, lane_tiles]
    elif batch or roles.lanes.size >= 2 * cpu.cores * columns:
        inner = [lane_tiles, row_tiles]
    else:
        inner = [row_tiles, lane_tiles]
    sch.reorder(*batch, *inner, row, lane)
    if main.work >= PARALLEL_WORK and cpu.cores > 1:
        if product(loop.size for loop in roles.batch) >= 2 * cpu.cores:
            sch.parallel(sch.fuse(*batch) if len(batch) > 1 else batch[0])
        else:
            wide = (loop for loop in inner if size_of(sch.get(loop).extent) >= cpu.cores)
            sch.parallel(next(wide, inner[0]))
    sch.unroll(row)
    sch.vectorize(lane)
    partition(sch, row, lane)
    return inner[-1]
