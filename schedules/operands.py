"""Products whose vector operand does not lie as vectors: write it once more, so that it does."""

from __future__ import annotations

from typing import Any

from tvm_structured.schedules.nest import Loop, Nest, extent_of, needed_nest, same_extent

MAX_STRIDE = 4  # of a convolution
MIN_REUSE = 8  # times an element must be read to pay for a copy


def contiguous_operands(sch: Any, nests: list[Nest]) -> list[Nest]:
    """The nests with an operand laid out anew where that makes the block that reduces vectorisable."""
    position = next(index for index, nest in enumerate(nests) if nest.reduced)
    main = nests[position]
    along = next((loop for loop in main.spatial if loop.strides[0] == 1), None)
    if along is None or len(main.buffers) < 3:
        return nests
    scattered = [index for index, stride in enumerate(along.strides) if stride not in (0, 1)]
    if len(scattered) != 1:
        return nests
    operand, step = scattered[0], along.strides[scattered[0]]
    if isinstance(step, int) and 1 < step <= MAX_STRIDE:
        return deinterleave(sch, nests, position, operand, step)
    return transpose(sch, nests, position, operand, along)


def deinterleave(sch: Any, nests: list[Nest], position: int, operand: int, step: int) -> list[Nest]:
    """Convolutions of stride s read every s-th pixel: store a row of the (padded) image as s rows of such pixels."""
    main = nests[position]
    writers = [nest.block for nest in nests[:position] if nest.buffers[0].same_as(main.buffers[operand])]
    writer = writers[0] if writers else sch.cache_read(main.block, operand - main.num_stores, "global")
    sch.transform_layout(
        writer,
        ("write", 0),
        lambda *index: [*index[:-1], index[-1] % step, index[-1] // step],
        assume_injective_transform=True,
    )
    return renewed(sch, nests, [] if writers else [writer])


def transpose(sch: Any, nests: list[Nest], position: int, operand: int, along: Loop) -> list[Nest]:
    """x y^T: copy y to y^T, a row of which holds one number for each column of the result."""
    main = nests[position]
    is_reused = any(loop.strides[operand] == 0 and loop.size >= MIN_REUSE for loop in main.spatial)
    last = dimension_along(main.buffers[operand], along.strides[operand], along.extent)
    if last is None or not is_reused or along.size < MIN_REUSE:
        return nests
    writer = sch.cache_read(main.block, operand - main.num_stores, "global")
    sch.transform_layout(writer, ("write", 0), lambda *index: [*index[:last], *index[last + 1 :], index[last]])
    copy = needed_nest(sch, writer)
    sch.reorder(*(loop.rv for loop in sorted(copy.loops, key=lambda loop: bool(loop.strides[0] == 1))))
    return renewed(sch, nests, [writer])


def dimension_along(buffer: Any, stride: Any, extent: Any) -> int | None:
    """The dimension of a buffer that has this stride and this extent."""
    size: Any = 1
    for dimension in reversed(range(len(buffer.shape))):
        own = extent_of(buffer.shape[dimension])
        if same_extent(size, stride) and same_extent(own, extent):
            return dimension
        size = size * own
    return None


def renewed(sch: Any, nests: list[Nest], new_blocks: list[Any]) -> list[Nest]:
    return [needed_nest(sch, block) for block in (*new_blocks, *(nest.block for nest in nests))]
