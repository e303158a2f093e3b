"""How a chain of butterfly factors is run: which neighbours are multiplied at compile time, and in what blocks.

A stage is a factor, or the product of neighbouring ones: y[b, i, d] = sum_j F[b, i, j, d] x[b, j, d]. With t = 1 the
rows i fill the lanes and x is broadcast; with a longer diagonal d fills them. So factors are multiplied until the
first product has enough rows and all others have long diagonals.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tvm_structured.schedules.cpu import Cpu

BLOCK_OVERHEAD = 12  # cycles to set up, store and leave one register block
ROWS_IN_REGISTERS = 8  # input vectors that share a weight there
LARGEST_MERGED = 1 << 19  # numbers in one merged factor: it has to stay in the level-2 cache


@dataclass(frozen=True)
class Stage:
    """A grid of shape (blocks, r, s, t)."""

    blocks: int
    r: int
    s: int
    t: int

    @property
    def inputs(self) -> int:
        return self.blocks * self.s * self.t

    @property
    def outputs(self) -> int:
        return self.blocks * self.r * self.t

    @property
    def num_params(self) -> int:
        return self.blocks * self.r * self.s * self.t

    def merge(self, before: Stage) -> Stage:
        """The product with the stage that runs before it."""
        return Stage(self.blocks, self.r * before.r, self.s * before.s, before.t)


@dataclass(frozen=True)
class Tile:
    """A register block: `rows` input vectors by `vectors` results."""

    rows: int
    vectors: int


def tile_of(stage: Stage, cpu: Cpu, rows: int) -> Tile:
    """As many results as fit the registers beside a vector each of weights and an operand."""
    count = -(-stage.r // cpu.lanes) if stage.t == 1 else stage.r
    rows = min(rows, ROWS_IN_REGISTERS, max(1, (cpu.registers - 2) // 2))
    most = max(1, (cpu.registers - 2) // (rows + 1))
    pieces = -(-count // most)
    return Tile(rows, -(-count // pieces))


def cycles(stage: Stage, cpu: Cpu, rows: int) -> float:
    """Modelled cycles for `rows` input vectors."""
    tile = tile_of(stage, cpu, rows)
    if stage.t == 1:
        columns, groups = -(-stage.r // cpu.lanes), stage.blocks
    else:
        columns, groups = stage.r, stage.blocks * -(-stage.t // cpu.lanes)
    operations = columns * rows * stage.s
    loads = -(-columns // tile.vectors) * rows * stage.s + columns * stage.s * -(-rows // tile.rows)
    blocks = -(-columns // tile.vectors) * -(-rows // tile.rows)
    return groups * (max(operations / 2, loads / 2) + blocks * BLOCK_OVERHEAD + columns * rows)


@functools.lru_cache(maxsize=1024)
def cheapest_cuts(stages: tuple[Stage, ...], cpu: Cpu, rows: int) -> tuple[int, ...]:
    """Which neighbours become one stage: those between two cuts. The shortest path over the bonds."""
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, (0,))]
    for end in range(1, len(stages) + 1):
        choices = []
        for start in range(end):
            merged = merge(stages[start:end])
            if merged.num_params <= LARGEST_MERGED or end == start + 1:
                choices.append((best[start][0] + cycles(merged, cpu, rows), (*best[start][1], end)))
        best.append(min(choices))
    return best[-1][1]


def merge(stages: Sequence[Stage]) -> Stage:
    merged = stages[-1]
    for stage in reversed(stages[:-1]):
        merged = merged.merge(stage)
    return merged


def split_for_threads(stages: Sequence[Stage], cpu: Cpu) -> tuple[int, int]:
    """(stages in the first region, width of a unit in the second), for input vectors too few to share out.

    Up to a stage the blocks of its output are independent, after it the positions within them. Both regions get at
    least as many units as there are threads where the shapes allow; the cut is where their work is most alike.
    """
    if len(stages) == 1:
        return 1, 0
    work = [stage.num_params for stage in stages]

    def key(cut: int) -> tuple[int, int]:
        units = min(stages[cut - 1].blocks, -(-stages[cut].t // cpu.lanes), cpu.cores)
        return -units, max(sum(work[:cut]), sum(work[cut:]))

    cut = min(range(1, len(stages)), key=key)
    vectors = -(-stages[cut].t // cpu.lanes)
    # short units stay in the first level of cache with all that follows
    inner = math.prod(stage.r for stage in stages[cut:])
    most = max(1, min(vectors // cpu.cores, (1 << 12) // (inner * cpu.lanes)))
    width = max(v for v in range(1, most + 1) if vectors % v == 0)
    return cut, width * cpu.lanes


def narrowed(stages: Sequence[Stage], width: int) -> list[Stage]:
    """The stages of one unit of the second region: `width` positions of the first one's diagonals."""
    local, t = [], width
    for stage in stages:
        local.append(replace(stage, t=t))
        t *= stage.r
    return local
