"""How a tensor train is run: which cores are merged, in which direction, in what chunks and register blocks.

Merging neighbouring cores at compile time costs multiplications and gains full vectors; the plan weighs one
against the other with a small model of the machine: two vector multiply-adds and two loads a cycle, a latency of
four cycles, lanes that are wasted and a price for every block and every parallel region.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tvm_structured.schedules.cpu import Cpu
from tvm_structured.structures.tt_order import Stage, first_core_first, last_core_first

PLANS = 8  # how many partitions are weighed for each direction
OFFERED = 64  # plans that are offered for tuning
LARGEST_MERGED = 1 << 20  # numbers in one merged core: it has to stay in the level-2 cache
INTERLEAVED = 8  # up to so many trailing indices are interleaved in registers
BLOCK_OVERHEAD = 12  # cycles to set up, store and leave one register block
REGION_OVERHEAD = 10_000  # cycles to start and join threads: 2 to 4 microseconds
ASSUMED_ROWS = 16  # where the number of rows is known at run time only
L1_FLOATS, L2_FLOATS = 8 << 10, 128 << 10  # what a unit's intermediates may take, with room for the rest


@dataclass(frozen=True)
class Tile:
    """A register block: `leads` indices a by `scalars` broadcast values by `vectors`.

    With `lanes_on_rows` the vectors hold rows i of A^T and the broadcasts are old[a, k, b] (all b at once);
    otherwise the vectors hold old[a, k, b...] and the broadcasts are A[i, k].
    """

    lanes_on_rows: bool
    leads: int
    scalars: int
    vectors: int
    cycles: float


@dataclass(frozen=True)
class TrainPlan:
    """Groups of cores `cuts[g]:cuts[g + 1]`, a direction, the chunk of the first mode done at a time, and how many
    threads to use: all, or one where starting the others takes longer than the work."""

    is_last_core_first: bool
    cuts: tuple[int, ...]
    chunk: int
    threads: int


@dataclass(frozen=True)
class MergedTrain:
    """The extents of a train after merging. `ranks` includes the two ones at the ends."""

    out_modes: tuple[int, ...]
    in_modes: tuple[int, ...]
    ranks: tuple[int, ...]

    def merge(self, cuts: Sequence[int]) -> MergedTrain:
        pairs = list(itertools.pairwise(cuts))
        return MergedTrain(
            tuple(math.prod(self.out_modes[i:j]) for i, j in pairs),
            tuple(math.prod(self.in_modes[i:j]) for i, j in pairs),
            tuple(self.ranks[i] for i in cuts),
        )

    def stages(self, is_last_core_first: bool, chunk: int) -> list[Stage]:
        """The stages of one chunk of the first mode, in order.

        First core first, the chunk is one of the first out mode and runs through all stages. Last core first, it
        is one of the first in mode and runs through all but the last stage, which needs the whole of it.
        """
        if not is_last_core_first:
            first, *others = first_core_first(self.out_modes, self.in_modes, self.ranks).stages
            share = self.out_modes[0] // chunk
            return [replace(first, rows=first.rows // share), *(replace(s, lead=s.lead // share) for s in others)]
        *others, last = last_core_first(self.out_modes, self.in_modes, self.ranks).stages
        share = self.in_modes[0] // chunk
        return [*(replace(s, lead=s.lead // share) for s in others), last]


def plans(train: MergedTrain, cpu: Cpu, rows: int | None) -> Iterator[TrainPlan]:
    """Plans for a number of input vectors (None: any), the fastest by the model first."""
    found = []
    for direction in (False, True):
        for cuts in cheapest_cuts(train, direction, cpu.lanes):
            merged = train.merge(cuts)
            first = merged.in_modes[0] if direction else merged.out_modes[0]
            for chunk in (c for c in range(1, first + 1) if first % c == 0):
                for threads in {1, cpu.cores} if rows is not None else {cpu.cores}:
                    plan = TrainPlan(direction, cuts, chunk, threads)
                    found.append((cycles(merged, plan, cpu, ASSUMED_ROWS if rows is None else rows), plan))
    found.sort(key=lambda entry: entry[0])
    yield from (plan for _, plan in found[:OFFERED])


def cheapest_cuts(train: MergedTrain, is_last_core_first: bool, lanes: int) -> list[tuple[int, ...]]:
    """The `PLANS` partitions into at least two groups with the fewest vector operations: paths over the bonds."""
    count = len(train.out_modes)
    if count == 1:
        return [(0, 1)]
    order = last_core_first if is_last_core_first else first_core_first
    best: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, (0,))]]
    for end in range(1, count + 1):
        paths = []
        for start in range(end):
            if start == 0 and end == count:
                continue
            # one group between two that hold the cores around it: only its own stage is looked at
            merged = train.merge(tuple(sorted({0, start, end, count})))
            stage = next(
                s
                for s in order(merged.out_modes, merged.in_modes, merged.ranks).stages
                if s.core == (1 if start else 0)
            )
            if stage.rows * stage.depth > LARGEST_MERGED and end > start + 1:
                continue
            paths += [(total + vector_operations(stage, lanes), (*cuts, end)) for total, cuts in best[start]]
        best.append(sorted(paths)[:PLANS])
    return [cuts for _, cuts in best[count]]


def vector_operations(stage: Stage, lanes: int) -> float:
    """Vector multiply-adds of a stage, by the better choice of lanes."""
    on_trail = stage.lead * stage.rows * stage.depth * -(-stage.trail // lanes)
    if stage.trail > INTERLEAVED:
        return on_trail
    return min(on_trail, stage.lead * stage.trail * stage.depth * -(-stage.rows // lanes))


def cycles(merged: MergedTrain, plan: TrainPlan, cpu: Cpu, rows: int) -> float:
    """Modelled cycles for all input vectors."""
    stages = merged.stages(plan.is_last_core_first, plan.chunk)
    each = [tile_for(cpu, stage.lead, stage.rows, stage.depth, stage.trail).cycles for stage in stages]
    held = max(s.lead * s.rows * s.trail for s in stages[:-1]) if len(stages) > 1 else 0
    slowdown = 1.0 if held <= L1_FLOATS else 1.1 if held <= L2_FLOATS else 1.5
    start = REGION_OVERHEAD if plan.threads > 1 else 0
    if not plan.is_last_core_first:
        units = rows * (merged.out_modes[0] // plan.chunk)
        return start + slowdown * sum(each) * -(-units // plan.threads)
    chunks = merged.in_modes[0] // plan.chunk
    if rows >= plan.threads:
        return start + slowdown * (chunks * sum(each[:-1]) + each[-1]) * -(-rows // plan.threads)
    units = -(-rows * chunks // plan.threads)
    return 2 * start + slowdown * (units * sum(each[:-1]) + rows * each[-1] / plan.threads)


@functools.lru_cache(maxsize=4096)
def tile_for(cpu: Cpu, lead: int, rows: int, depth: int, trail: int) -> Tile:
    """The register block of a stage with the fewest modelled cycles."""
    vectors = -(-trail // cpu.lanes)
    tiles = [
        Tile(False, na, mr, nv, tiled_cycles(depth, [(rows, mr)], [(lead, na), (vectors, nv)]))
        for nv in range(1, min(4, vectors) + 1)
        for na in range(1, min(8, lead) + 1)
        if nv == vectors or na == 1
        for mr in range(1, min(16, rows) + 1)
        if fits(cpu, mr, na * nv)
    ]
    if trail <= INTERLEAVED:
        panels = -(-rows // cpu.lanes)
        tiles += [
            Tile(True, na, trail, nv, tiled_cycles(depth, [(lead, na), (trail, trail)], [(panels, nv)], trail > 1))
            for nv in range(1, min(4, panels) + 1)
            for na in range(1, min(16, lead) + 1)
            if fits(cpu, na * trail, nv)
        ]
    return min(tiles, key=lambda tile: tile.cycles)


def fits(cpu: Cpu, scalars: int, vectors: int) -> bool:
    """Whether accumulators, one panel of vectors and a broadcast stay in registers."""
    return scalars * vectors + vectors + 1 <= cpu.registers or scalars * vectors == 1


def tiled_cycles(
    depth: int, scalars: Sequence[tuple[int, int]], vectors: Sequence[tuple[int, int]], shuffles: bool = False
) -> float:
    """Cycles to cover extents by register blocks; each extent comes with its block and leaves a remainder."""
    total = 0.0
    for sizes in itertools.product(*(pieces(*extent) for extent in (*scalars, *vectors))):
        broadcasts = math.prod(size for size, _ in sizes[: len(scalars)])
        columns = math.prod(size for size, _ in sizes[len(scalars) :])
        operations = broadcasts * columns
        # few accumulators leave the multiply-adds waiting for each other
        step = max(operations / 2, (broadcasts + columns) / 2, min(4.0, operations))
        after = BLOCK_OVERHEAD + operations * (3.0 if shuffles else 1.0)
        total += math.prod(times for _, times in sizes) * (depth * step + after)
    return total


def pieces(extent: int, block: int) -> list[tuple[int, int]]:
    """(size, how many) of the full blocks and of the remainder."""
    full, rest = divmod(extent, block)
    return [(block, full)] * (full > 0) + [(rest, 1)] * (rest > 0)
