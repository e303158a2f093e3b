"""Products with reuse: batched matrix products of two activations, and convolutions that no structured kernel takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.injective import PARALLEL_WORK, schedule_injective
from tvm_structured.schedules.loops import partition, tile
from tvm_structured.schedules.nest import Loop, Nest, bound_by_extents, depth_of, extent_of, nest_of, open_schedule, product, same_extent


@dataclass(frozen=True)
class Roles:
    """What the spatial loops of a product do. Its vector operand is contiguous along `lanes` and constant along `reuse`."""

    lanes: Loop
    reuse: Loop
    others: tuple[Loop, ...]


def apply(func: Any, target: Any) -> Any | None:
    """A register tile of `reuse` x `lanes` accumulators; None without a single reduction that has such loops."""
    opened = open_schedule(func)
    if opened is None or sum(bool(nest.reduced) for nest in opened[1]) != 1:
        return None
    sch, nests = opened
    cpu = Cpu.of(target)
    nests = deinterleave(sch, nests)
    position = next(index for index, nest in enumerate(nests) if nest.reduced)
    main, *after = nests[position:]
    if len(after) > 1 or find_roles(main) is None:
        return None
    for nest in nests[:position]:
        schedule_injective(nest, cpu)
    epilogue = split_alike(main, after[0]) if after else None
    if epilogue is not None and not is_epilogue(main, epilogue):
        schedule_injective(epilogue, cpu)
        epilogue = None
    schedule_product(main, epilogue, cpu)
    return sch


def deinterleave(sch: Any, nests: list[Nest]) -> list[Nest]:
    """Convolutions of stride s > 1 read every s-th pixel: store rows of the (padded) image as s rows of such pixels."""
    position = next(index for index, nest in enumerate(nests) if nest.reduced)
    main = nests[position]
    strided = {stride for loop in main.spatial if loop.strides[0] == 1 for stride in loop.strides if stride not in (0, 1)}
    step = strided.pop() if len(strided) == 1 else None
    if not isinstance(step, int) or step > 4 or len(main.reduced) < 2:
        return nests
    source = next(
        index
        for index in range(main.num_stores, len(main.buffers))
        if any(loop.strides[0] == 1 and loop.strides[index] == step for loop in main.spatial)
    )
    writers = [nest for nest in nests[:position] if nest.buffers[0].same_as(main.buffers[source])]
    writer = writers[0].block if writers else sch.cache_read(main.block, source - main.num_stores, "global")
    sch.transform_layout(
        writer,
        ("write", 0),
        lambda *index: [*index[:-1], index[-1] % step, index[-1] // step],
        assume_injective_transform=True,
    )
    blocks = [nest.block for nest in nests] if writers else [writer, *(nest.block for nest in nests)]
    renewed = [nest_of(sch, block) for block in blocks]
    return [nest for nest in renewed if nest is not None]


def find_roles(nest: Nest) -> Roles | None:
    loads = range(nest.num_stores, len(nest.buffers))
    lanes = next(
        (
            loop
            for loop in reversed(nest.spatial)
            if loop.size >= 4 and loop.strides[0] == 1 and all(s in (0, 1) for s in loop.strides) and not loop.branches
        ),
        None,
    )
    if lanes is None or nest.num_stores > 1:
        return None
    candidates = [
        loop
        for loop in nest.spatial
        if loop is not lanes and any(loop.strides[load] == 0 and lanes.strides[load] == 1 for load in loads)
    ]
    if not candidates:
        return None
    reuse = max(candidates, key=lambda loop: loop.size)
    return Roles(lanes, reuse, tuple(loop for loop in nest.spatial if loop not in (lanes, reuse)))


def split_alike(main: Nest, sink: Nest) -> Nest:
    """Split loops of `sink` into the digits into which those of `main` were split."""
    wanted = [loop.extent for loop in main.spatial]
    for loop in sink.loops:
        digits: list[Any] = []
        while wanted and not (digits and same_extent(product_of(digits), loop.extent)):
            digits.append(wanted.pop(0))
        if len(digits) > 1 and all(isinstance(digit, int) for digit in digits):
            sink.sch.split(loop.rv, digits)
    found = nest_of(sink.sch, sink.block)
    assert found is not None
    return found


def product_of(extents: Sequence[Any]) -> Any:
    total: Any = 1
    for extent in extents:
        total = total * extent
    return total


def is_epilogue(main: Nest, after: Nest) -> bool:
    """Whether a block does something to every result where it is, so that it can work on a register tile."""
    return len(main.spatial) == len(after.loops) and all(counterpart(main, loop, after) for loop in main.spatial)


def counterpart(main: Nest, loop: Loop, sink: Nest) -> Loop | None:
    """The loop of a block that reads results of `main` in the same direction."""
    reads = [index for index, buffer in enumerate(sink.buffers) if buffer.same_as(main.buffers[0])]
    for candidate in sink.loops:
        strides = [candidate.strides[index] for index in reads]
        if same_extent(candidate.extent, loop.extent) and strides and all(same_extent(s, loop.strides[0]) for s in strides):
            return candidate
    return None


def register_tile(roles: Roles, cpu: Cpu) -> tuple[int, int]:
    """(rows, columns) of accumulators; the vector operand and one broadcast number need registers too."""
    vectors = 4 if cpu.registers >= 32 else 2
    while vectors > 1 and roles.lanes.size < vectors * cpu.lanes:
        vectors //= 2
    columns = min(vectors * cpu.lanes, 1 << (roles.lanes.size.bit_length() - 1))
    most = min(12, (cpu.registers - vectors - 2) // vectors, roles.reuse.size)
    divisors = [rows for rows in range(most, most // 2, -1) if roles.reuse.size % rows == 0]
    return (divisors[0] if divisors else most), columns


def schedule_product(main: Nest, epilogue: Nest | None, cpu: Cpu) -> None:
    """A tile accumulates over the whole reduction in registers; then come the epilogue and the only store."""
    sch, block, roles = main.sch, main.block, find_roles(main)
    assert roles is not None
    rows, columns = register_tile(roles, cpu)
    sink = epilogue
    if sink is None:
        written = nest_of(sch, sch.cache_write(block, 0, "global"))
        accumulating = nest_of(sch, block)
        assert written is not None and accumulating is not None
        main, sink = accumulating, split_alike(accumulating, written)
    tile_buffer(main, roles, rows, columns)
    outer, row, lane = tile_loops(main, sink, roles, rows, columns, cpu)
    sch.compute_at(block, outer[-1], preserve_unit_loops=True)
    sch.unroll(row)
    sch.vectorize(lane)
    partition(sch, row, lane)
    depth = depth_of(sch, block, outer[-1])
    inside = nest_of(sch, block, skip=depth)
    assert inside is not None
    tiled = [loop for loop in inside.spatial if same_loads(loop, roles.reuse)]
    across = [loop for loop in inside.spatial if same_loads(loop, roles.lanes)]
    reduced = [loop.rv for loop in inside.reduced]
    sch.reorder(*reduced, *(loop.rv for loop in tiled + across))
    for loop in tiled:
        sch.unroll(loop.rv)
    for loop in across:
        sch.vectorize(loop.rv)
    partition(sch, *(loop.rv for loop in tiled + across))
    start = sch.decompose_reduction(block, reduced[0])
    partition(sch, *sch.get_loops(start)[depth:])
    for accumulating in (start, block):
        bound_by_extents(sch, accumulating)


def tile_buffer(main: Nest, roles: Roles, rows: int, columns: int) -> None:
    """Store tiles of accumulators in one piece. Else TVM cannot bound a tile of symbolic extents, and reserves it all."""
    if isinstance(roles.reuse.extent, int) and isinstance(roles.lanes.extent, int):
        return
    sizes = {dimension_of(main.buffers[0], roles.reuse): rows, dimension_of(main.buffers[0], roles.lanes): columns}
    main.sch.transform_layout(
        main.block,
        ("write", 0),
        lambda *index: [
            *(i // sizes[d] if d in sizes else i for d, i in enumerate(index)),
            *(index[d] % size for d, size in sizes.items()),
        ],
        assume_injective_transform=True,
    )


def dimension_of(buffer: Any, loop: Loop) -> int:
    """The dimension of a buffer along which a loop walks."""
    stride: Any = 1
    for dimension in reversed(range(len(buffer.shape))):
        extent = extent_of(buffer.shape[dimension])
        if same_extent(stride, loop.strides[0]) and same_extent(extent, loop.extent):
            return dimension
        stride = stride * extent
    raise AssertionError(f"no dimension of {buffer.name} has stride {loop.strides[0]}")


def same_loads(a: Loop, b: Loop) -> bool:
    return all(same_extent(x, y) for x, y in zip(a.strides[1:], b.strides[1:], strict=True))


def tile_loops(
    main: Nest, sink: Nest, roles: Roles, rows: int, columns: int, cpu: Cpu
) -> tuple[list[Any], Any, Any]:
    """Tile and order the loops of the block that stores; threads over the outermost. (outer loops, row, lane)."""
    sch = main.sch

    def in_sink(loop: Loop) -> Loop:
        found = counterpart(main, loop, sink)
        assert found is not None
        return found

    scalars = [i for i, stride in enumerate(roles.lanes.strides) if stride == 0 and i >= main.num_stores]
    streamed = [loop for loop in roles.others if any(loop.strides[i] == 0 for i in scalars)]
    batch = [loop for loop in roles.others if loop not in streamed]
    row_tiles, row = tile(sch, in_sink(roles.reuse).rv, rows)
    lane_tiles, lane = tile(sch, in_sink(roles.lanes).rv, columns)
    batch_loops, stream_loops = ([in_sink(loop).rv for loop in group] for group in (batch, streamed))
    # Of the two operands, the part that fits the first-level cache stays: filters of a convolution while the image
    # streams by, a panel of the right-hand matrix while rows stream by
    many_panels = roles.lanes.size >= 2 * cpu.cores * columns
    if streamed:
        inner = [row_tiles, *stream_loops, lane_tiles]
    elif many_panels or batch:
        inner = [lane_tiles, row_tiles]
    else:
        inner = [row_tiles, lane_tiles]
    sch.reorder(*batch_loops, *inner, row, lane)
    if main.work >= PARALLEL_WORK and cpu.cores > 1:
        if product(loop.size for loop in batch) >= 2 * cpu.cores:
            batch_loops = [sch.fuse(*batch_loops) if len(batch_loops) > 1 else batch_loops[0]]
            sch.parallel(batch_loops[0])
        else:
            sch.parallel(inner[0])
    return [*batch_loops, *inner], row, lane
