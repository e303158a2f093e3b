"""A model of what a Winograd convolution costs, good enough to rank its configurations.

Unit: cycles of one core, two vector multiply-adds and two loads to a cycle; round numbers fitted on AVX-512 machines.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from tvm_structured.schedules.base import Config
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.gemm import most_rows
from tvm_structured.schedules.images import ImageShape
from tvm_structured.schedules.winograd_tiles import TileGrid

LEVEL1, LEVEL2, LEVEL3 = 32 * 1024, 512 * 1024, 16 * 1024 * 1024  # bytes that stay there beside other operands
HELD = 640 * 1024  # bytes of transformed tiles that stay in level 2
BYTES_PER_CYCLE = 48.0, 5.0, 3.0  # of weights, read once from level 2, level 3, memory
STAGED = 48.0, 12.0, 5.0  # of transformed tiles, which nothing waits for
AGAIN = 32.0  # bytes to a cycle of a panel that further tiles are multiplied with
GROUP_BYTES = 32 * 1024 * 1024  # of transformed images that are staged at once
MOST_IMAGES = 8
REGION = 8000  # cycles to start and join a parallel region
RECTANGLE_TILES = 32
KEPT = 128  # configurations that are offered for tuning


def ranked_configs(shape: ImageShape, tile: int, cpu: Cpu) -> Iterator[Config]:
    """Configurations of both orders, the cheapest first."""
    candidates = list(all_configs(shape, tile, cpu))
    yield from islice(sorted(candidates, key=lambda config: cost(shape, tile, cpu, config)), KEPT)


def all_configs(shape: ImageShape, tile: int, cpu: Cpu) -> Iterator[Config]:
    height, width = TileGrid(shape, tile, 1, 1).size
    for columns in near_equal_parts(width, 16):
        for rows in near_equal_parts(height, max(1, RECTANGLE_TILES // columns)):
            for mr, nr in register_blocks(cpu, rows * columns):
                yield {"order": "fused", "rows": rows, "columns": columns, "mr": mr, "nr": nr}
    columns = near_equal_parts(width, 16)[0]
    rows = near_equal_parts(height, max(1, 16 // columns))[0]
    images = images_together(shape, tile)
    for mr, nr in register_blocks(cpu, height * width * (images if isinstance(shape.batch, int) else 1)):
        mr = min(mr, height * width)
        yield {"order": "staged", "rows": rows, "columns": columns, "mr": mr, "nr": nr, "images": images}


def near_equal_parts(count: int, most: int) -> list[int]:
    """Sizes of at most `most` that cut `count` into nearly equal parts, the largest first."""
    fewest = -(-count // most)
    return sorted({-(-count // parts) for parts in range(fewest, min(count, 4 * fewest) + 1)}, reverse=True)


def register_blocks(cpu: Cpu, rows: int) -> list[tuple[int, int]]:
    """(tiles, channel vectors) that fit the registers, tiles in nearly equal parts."""
    found = []
    for nr in (1, 2, 3, 4, 6) if cpu.registers >= 32 else (1, 2, 3):
        mr = -(-rows // -(-rows // most_rows(cpu, nr)))
        found.append((mr, nr))
    return found


def images_together(shape: ImageShape, tile: int) -> int:
    """Images whose transforms are held at once."""
    grid = TileGrid(shape, tile, 1, 1)
    each = 4 * grid.points**2 * grid.tiles * (shape.channels + shape.outs)
    most = max(1, min(MOST_IMAGES, GROUP_BYTES // each))
    return min(most, shape.batch) if isinstance(shape.batch, int) else most


def cost(shape: ImageShape, tile: int, cpu: Cpu, config: Config) -> float:
    """Cycles of the busiest core for a batch (of one where its size is not known)."""
    grid = TileGrid(shape, tile, config["rows"], config["columns"])
    batch = shape.batch if isinstance(shape.batch, int) else 1
    points, width = grid.points**2, config["nr"] * cpu.lanes
    blocks, vectors = -(-shape.outs // width), -(-shape.channels // cpu.lanes)
    # a transform: loads, sums and stores of each point twice, and the transposition of its pixels
    per_tile = 5.0 * points + 8.0 * (grid.tile + 1) ** 2
    transforms = per_tile * (vectors + -(-shape.outs // cpu.lanes))
    weight = 4.0 * points * blocks * width * shape.channels
    panel = 4 * shape.channels * width

    def products(rows: int) -> float:
        """All GEMMs of so many tiles, and half of the time to read the weight: prefetching hides the rest."""
        term = max(config["mr"] * config["nr"] / 2, (config["mr"] + config["nr"]) / 2, 4.0)
        if panel > LEVEL1:
            term = max(term, 4.0 * config["nr"])
        passes, finish = -(-rows // config["mr"]), 2.0 * config["mr"] * config["nr"]
        multiply = passes * (shape.channels * term + finish) + (passes - 1) * panel / AGAIN
        return points * blocks * multiply + 0.5 * weight / BYTES_PER_CYCLE[level(weight)]

    if config["order"] == "fused":
        held = 4.0 * points * grid.in_rectangle * (shape.channels + width)
        units = grid.rectangles * batch
        work = grid.in_rectangle * transforms + products(grid.in_rectangle)
        # what does not fit level 2 is read again for every block of outputs
        work += 0.0 if held <= HELD else held * blocks / STAGED[1] / 4
        return turns(units, cpu) * work + REGION
    images = config["images"]
    moved = 4.0 * points * images * grid.tiles * (shape.channels + shape.outs)
    one = images * grid.rectangles * grid.in_rectangle * transforms
    one += products(images * grid.tiles) + 4 * moved / STAGED[level(moved)]  # written and read, twice
    return -(-batch // images) * (one / cpu.cores + 3 * REGION)


def turns(units: int, cpu: Cpu) -> int:
    return -(-units // cpu.cores)


def level(size: float) -> int:
    """0, 1 or 2 for what stays in level 2, in level 3, or in neither."""
    return (size > LEVEL2) + (size > LEVEL3)
