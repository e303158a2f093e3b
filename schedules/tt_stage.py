"""One stage of a tensor train: new[a, i, b] = sum_k A[i, k] old[a, k, b], in register blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Extent
from tvm_structured.schedules.emit import Emitter, row_blocks
from tvm_structured.schedules.gemm import multiply_block
from tvm_structured.schedules.tt_plan import Tile
from tvm_structured.structures.tt_order import Stage


class Source:
    """Where a stage reads old[a, k, b]: a flat intermediate, or a row of a matrix from some element on."""

    def __init__(self, e: Emitter, stage: Stage, buffer: Any, start: tuple[Any, ...], padded: bool) -> None:
        self.e, self.stage, self.buffer = e, stage, buffer
        *self.row, self.first = start
        self.masked = not padded and stage.trail % e.lanes != 0

    def at(self, a: Any, k: Any, b: Any) -> tuple[Any, ...]:
        return (*self.row, self.first + (a * self.stage.depth + k) * self.stage.trail + b)

    def scalar(self, a: Any, k: Any, b: Any) -> Any:
        return self.buffer[self.at(a, k, b)]

    def vector(self, a: Any, k: Any, b: Any) -> Any:
        if self.masked:
            return self.e.load_masked(self.buffer, self.e.mask(b, self.stage.trail), *self.at(a, k, b))
        return self.e.load(self.buffer, *self.at(a, k, b))


# store(vector, first element, the element at which lanes end; None if all lanes count)
Store = Callable[[Any, Any, Any], None]


def into(e: Emitter, buffer: Any, *start: Any) -> Store:
    """Stores of a stage's output into an intermediate."""
    *row, origin = start

    def store(value: Any, first: Any, limit: Any) -> None:
        if limit is None:
            e.store(buffer, value, *row, origin + first)
        else:
            e.store_masked(buffer, value, e.bind_mask(first, limit), *row, origin + first)

    return store


def emit_stage(
    e: Emitter,
    stage: Stage,
    tile: Tile,
    weight: Any,
    source: Source,
    store: Store,
    first_block: Any = 0,
    vectors: tuple[Any, Extent] | None = None,
) -> None:
    """All of new[a, i, b], or only the given vectors (first, count) of b; `weight` from its block `first_block` on."""
    if tile.lanes_on_rows:
        emit_on_rows(e, stage, tile, weight, source, store, first_block)
    else:
        emit_on_trail(e, stage, tile, weight, source, store, first_block, vectors or (0, -(-stage.trail // e.lanes)))


def emit_on_trail(
    e: Emitter,
    stage: Stage,
    tile: Tile,
    weight: Any,
    source: Source,
    store: Store,
    first_block: Any,
    vectors: tuple[Any, Extent],
) -> None:
    """Vectors of trailing indices; `weight` is (row blocks, depth, scalars)."""

    def block(a: Any, na: int, v: Any, nv: int, i: Any, ni: int) -> None:
        acc = multiply_block(
            e,
            ni,
            na * nv,
            stage.depth,
            lambda r, k: weight[first_block + i // tile.scalars, k, r],
            lambda k, q: source.vector(a + q // nv, k, (v + q % nv) * e.lanes),
        )
        for r in range(ni):
            for q in range(na * nv):
                row = ((a + q // nv) * stage.rows + i + r) * stage.trail
                end = row + stage.trail if stage.trail % e.lanes else None
                store(acc[r][q][0], row + (v + q % nv) * e.lanes, end)

    first, count = vectors
    row_blocks(
        stage.lead,
        tile.leads,
        lambda a, na: row_blocks(
            count,
            tile.vectors,
            lambda v, nv: row_blocks(stage.rows, tile.scalars, lambda i, ni: block(a, na, v, nv, i, ni)),
            first,
        ),
    )


def emit_on_rows(
    e: Emitter, stage: Stage, tile: Tile, weight: Any, source: Source, store: Store, first_block: Any
) -> None:
    """Vectors of rows, interleaved with the trailing index; `weight` is (panels, depth, vectors * lanes)."""
    trail = stage.trail

    def block(a: Any, na: int, p: Any, nv: int) -> None:
        acc = multiply_block(
            e,
            na * trail,
            nv,
            stage.depth,
            lambda r, k: source.scalar(a + r // trail, k, r % trail),
            lambda k, q: e.load(weight, first_block + p // tile.vectors, k, q * e.lanes),
        )
        for lead in range(na):
            end = (a + lead + 1) * stage.rows * trail if stage.rows % e.lanes else None
            for q in range(nv):
                first = ((a + lead) * stage.rows + (p + q) * e.lanes) * trail
                group = [acc[lead * trail + b][q][0] for b in range(trail)]
                for j, value in enumerate(interleaved(e, group)):
                    store(value, first + j * e.lanes, end)

    row_blocks(
        stage.lead,
        tile.leads,
        lambda a, na: row_blocks(-(-stage.rows // e.lanes), tile.vectors, lambda p, nv: block(a, na, p, nv)),
    )


def interleaved(e: Emitter, vectors: list[Any]) -> list[Any]:
    """Lane by lane: first lanes of all vectors, then the second lanes, ..."""
    count = len(vectors)
    if count == 1:
        return vectors
    order = [(n % count) * e.lanes + n // count for n in range(count * e.lanes)]
    return [
        I.Shuffle(vectors, [I.int32(lane) for lane in order[j * e.lanes : (j + 1) * e.lanes]]) for j in range(count)
    ]
