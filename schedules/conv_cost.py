"""A model of what a direct convolution costs, good enough to rank its configurations.

Unit: cycles of one core, two vector multiply-adds and two loads to a cycle. The constants are round numbers fitted on
AVX-512 machines; tuning replaces the ranking by measurements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from tvm_structured.schedules import conv_blocks, conv_channels, conv_pixels
from tvm_structured.schedules.base import Config
from tvm_structured.schedules.channel_blocks import BlockCopy
from tvm_structured.schedules.conv_units import Units
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.images import ImageShape, PaddedCopy

LATENCY = 4  # of a multiply-add: a block needs twice as many sums to keep both pipes busy
LOADS = 1.15  # they come less evenly than multiply-adds
LEVEL1 = 32 * 1024  # bytes that stay in level 1
LEVEL2 = 768 * 1024
FAR_LOAD = 3.0, 5.0  # cycles for a vector from level 2, and from beyond
# bytes to a cycle from beyond level 2; prefetching hides a half of it where weights are vectors
FAR_WEIGHTS = {"channels": 10, "blocks": 10, "pixels": 5}
CACHE = 384 * 1024  # bytes of level 2 that a strip may fill
UNIT_START = 500  # cycles to start a piece of work
KEPT = 128  # configurations that are offered for tuning


def ranked_configs(shape: ImageShape, cpu: Cpu, forms: Sequence[str]) -> Iterator[Config]:
    """Configurations of these forms, the cheapest first."""
    yield from islice(sorted(all_configs(shape, cpu, forms), key=lambda config: cost(shape, cpu, config)), KEPT)


def all_configs(shape: ImageShape, cpu: Cpu, forms: Sequence[str]) -> Iterator[Config]:
    blocks = {
        "pixels": conv_pixels.register_blocks(cpu),
        "channels": conv_channels.register_blocks(cpu),
        "blocks": conv_blocks.register_blocks(cpu),
    }
    if len(conv_pixels.padded_copy(shape, 1).phases) > conv_pixels.PHASE_LIMIT:
        del blocks["pixels"]
    for rows in strip_heights(shape):
        for parts in sorted({1, 2, cpu.cores}):
            for form in blocks.keys() & set(forms):
                for mr, nr in blocks[form]:
                    yield {"form": form, "mr": mr, "nr": nr, "rows": rows, "parts": parts}


def strip_heights(shape: ImageShape) -> list[int]:
    """The image cut into 1, 2, 3, ... strips of nearly equal height, few enough to look at all of them."""
    height = shape.output[0]
    counts = [n for n in range(1, 17) if n <= height] + [
        n for n in (20, 24, 28, 32, 40, 48, 56, 64, 96, 112, 128) if n <= height
    ]
    return sorted({-(-height // n) for n in counts}, reverse=True)


def cost(shape: ImageShape, cpu: Cpu, config: Config) -> float:
    """Cycles of the busiest core for one image."""
    if config["form"] == "blocks":
        return blocks_cost(shape, cpu, config)
    rows, lanes = config["rows"], cpu.lanes
    if config["form"] == "pixels":
        copy = conv_pixels.padded_copy(shape, rows)
        direct = conv_pixels.is_direct(shape, config, lanes)
        block = config["mr"]
        vectors = -(-conv_pixels.positions(shape, rows) // lanes)
        full, rest = divmod(vectors, config["nr"])
        fetch = load_cost(strip_bytes(shape, copy)) / shape.kernel[1]  # neighbouring taps share cache lines
        step = full * term(cpu, config["mr"], config["nr"], 2, fetch)
        step += rest and term(cpu, config["mr"], rest, 2, fetch)
        finish = 2.5 + 2 * load_cost(4 * config["mr"] * vectors * lanes)
        per_block = shape.depth * step + finish * config["mr"] * vectors
    else:
        copy = conv_channels.padded_copy(shape, rows)
        direct = not any(shape.padding)
        block = config["nr"] * lanes
        height, width = conv_channels.pixel_block(shape, config["mr"])
        height = min(height, rows)
        count = -(-rows // height) * -(-shape.output[1] // width)
        finish = config["nr"] * lanes * 8
        fetch = load_cost(4 * shape.depth * config["nr"] * lanes)
        per_block = count * (shape.depth * term(cpu, height * width, config["nr"], 1, fetch) + finish)
    units = Units(shape, rows, config["parts"], block)
    blocks = units.blocks
    work = -(-blocks // config["parts"]) * per_block + UNIT_START
    if not direct:
        work += copy_cost(shape, copy, lanes)
    work += traffic(shape, copy, -(-blocks // config["parts"]), blocks, config)
    return turns(shape, cpu, units) * work


def turns(shape: ImageShape, cpu: Cpu, units: Units) -> float:
    """Pieces of one image that the busiest core works on; over many images they even out."""
    total = shape.groups * units.strips * units.parts
    return -(-total // cpu.cores) if isinstance(shape.batch, int) and shape.batch == 1 else max(1.0, total / cpu.cores)


def blocks_cost(shape: ImageShape, cpu: Cpu, config: Config) -> float:
    """Cycles of the busiest core for one image in blocks of channels."""
    rows, nr, lanes = config["rows"], config["nr"], cpu.lanes
    units = Units(shape, rows, config["parts"], nr * lanes)
    height, width = conv_channels.pixel_block(shape, config["mr"])
    height = min(height, rows)
    tiles = -(-rows // height) * -(-shape.output[1] // width)
    _, count, depth, _ = conv_blocks.packed_shape(shape, lanes, nr)
    panel, copy = 4 * depth * nr * lanes, BlockCopy.of(shape, lanes, rows)
    used = 1 if shape.taps > 1 else shape.stride[0] * shape.stride[1]  # pixels between two that are read
    image = 4 * conv_blocks.in_blocks(shape, lanes) * copy.block_size / used
    step = term(cpu, height * width, nr, 1, load_cost(panel))
    per_block = tiles * (depth * step + 3 * nr * height * width)
    part = -(-count // config["parts"])
    work = part * per_block + UNIT_START
    if any(shape.padding):
        work += image / (4 * lanes) * 3
    work += part * panel / (64 if count * panel * shape.groups < CACHE else FAR_WEIGHTS["blocks"])
    if image > CACHE:
        work += part * image / 12
    return turns(shape, cpu, units) * work


def term(cpu: Cpu, scalars: int, vectors: int, loads_per_vector: int, fetch: float) -> float:
    """Cycles of one term of the sum for a register block; `fetch` is the cost of a vector from level 2."""
    multiply = scalars * vectors / 2
    loads = (scalars + loads_per_vector * vectors) / 2 * LOADS
    return max(multiply, loads, fetch * vectors, LATENCY)


def load_cost(size: int) -> float:
    """Cycles for a vector of an operand of so many bytes that is read again and again."""
    return 0.0 if size <= LEVEL1 else FAR_LOAD[size > LEVEL2]


def strip_bytes(shape: ImageShape, copy: PaddedCopy) -> int:
    """Bytes of the image that a strip reads."""
    return 4 * shape.channels * copy.plane * len(copy.phases)


def copy_cost(shape: ImageShape, copy: PaddedCopy, lanes: int) -> float:
    """Cycles to fill the scratch: loads, shuffles and a store for each vector, and the overhead of a row."""
    row = -(-copy.pitch // lanes) * (3.0 if copy.stride[1] > 1 else 2.0) + 8
    return shape.channels * len(copy.phases) * copy.rows * row


def traffic(shape: ImageShape, copy: PaddedCopy, unit_blocks: int, blocks: int, config: Config) -> float:
    """Cycles lost to operands that do not stay in cache: weights once a unit, the strip once a block."""
    weights, strip = 4 * shape.groups * shape.outs * shape.depth, strip_bytes(shape, copy)
    per_cycle = 64 if weights < CACHE else FAR_WEIGHTS[config["form"]]
    lost = 4.0 * shape.outs * shape.depth * unit_blocks / blocks / per_cycle
    if strip > CACHE:
        lost += unit_blocks * strip / 12
    return lost
