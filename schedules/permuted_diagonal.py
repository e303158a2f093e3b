"""Permuted diagonal: y[i*p + c] = sum_j q[i, j, c] x[j*p + (c + k_ij) mod p].

Three ways to compute it:

    permute  lanes = block rows, p <= lanes: a register permutation gives each lane its entry of an x block
    gemm     k_ij = f_i + g_j (mod p): p dense products between two static permutations (permuted_diagonal_gemm)
    slices   any p, any CPU: x blocks doubled to length 2p, so that (c + k) mod p for all c is one slice
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Config, Extent, Kernel, Site
from tvm_structured.schedules.diagonal_blocks import DiagonalBlocks
from tvm_structured.schedules.emit import Emitter, arg, ceildiv, parallel, prim_func, row_blocks, scratch, serial
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.schedules.permuted_diagonal_gemm import MAX_GEMM_BLOCK, emit_gemm, gemm_space, pack_gemm
from tvm_structured.schedules.shuffles import interleave
from tvm_structured.structures.base import Structure

UNITS = (32, 64)  # about so many rows of x stay in L2 beside the diagonals of a group of block rows
ROWS_PER_UNIT = 32


class PermutedDiagonalKernel(Kernel):
    """The default way is chosen by block length, shifts, rows and CPU; the others are alternatives to tune."""

    name = "permuted_diagonal"

    def configs(self, structure: Structure, site: Site) -> Iterator[Config]:
        blocks, cpu = DiagonalBlocks.of(structure), site.cpu
        ways = []
        if permutes(cpu.lanes) is not None and blocks.p <= cpu.lanes:
            ways.append("permute")
        ways.append("slices")
        if lanes_used(blocks.rows, cpu.lanes) < 0.7 * lanes_used(blocks.p, cpu.lanes):
            ways.reverse()
        if blocks.p <= MAX_GEMM_BLOCK and blocks.separated is not None:
            ways.insert(0, "gemm")
        for way in ways:
            yield from SPACES[way](blocks, site)

    def pack(self, structure: Structure, site: Site, config: Config) -> dict[str, np.ndarray]:
        return PACKERS[config["way"]](DiagonalBlocks.of(structure), site.cpu.lanes, config)

    def prim_func(self, structure: Structure, site: Site, config: Config) -> Any:
        blocks, e = DiagonalBlocks.of(structure), Emitter(site.cpu)
        packed = self.pack(structure, site, config)
        with prim_func(self.name) as made:
            x = arg("x", (site.rows, blocks.inner))
            constants = {name: arg(name, array.shape, str(array.dtype)) for name, array in packed.items()}
            writer = RowWriter(e, site.epilogue, site.rows, blocks.out)
            EMITTERS[config["way"]](e, blocks, site.rows, x, constants, writer, config)
        return made.func


def lanes_used(count: int, lanes: int) -> float:
    """The share of lanes that does useful work when `count` things fill vectors."""
    return count / (-(-count // lanes) * lanes)


# -- permute ------------------------------------------------------------------------------------------------


def permutes(lanes: int) -> str | None:
    """LLVM's name of the instruction that gives every lane any lane of a vector."""
    return {16: "llvm.x86.avx512.permvar.sf.512", 8: "llvm.x86.avx2.permps"}.get(lanes)


def permute_space(blocks: DiagonalBlocks, site: Site) -> Iterator[Config]:
    """`depth` diagonals by `rows` rows of x are in registers; beside them x, the index, q and a product."""
    most = site.rows if isinstance(site.rows, int) else 8
    room = site.cpu.registers - 4
    choices = []
    for pieces in range(1, blocks.p + 1):
        depth = -(-blocks.p // pieces)
        rows = min(most, 8, room // (depth + 1))
        if rows >= 1 and (pieces == 1 or rows > choices[-1]["rows"]):
            choices.append({"way": "permute", "depth": depth, "rows": rows})
    choices.sort(key=lambda c: c["rows"] < min(3, most))  # stable: as few passes over x as three rows allow
    for unit in UNITS:
        for choice in choices:
            yield {**choice, "unit": choice["rows"] * max(1, unit // choice["rows"])}


def pack_permute(blocks: DiagonalBlocks, lanes: int, config: Config) -> dict[str, np.ndarray]:
    """diagonals (groups of block rows, p * columns * lanes): pieces of `depth` diagonals [columns][depth][lanes];
    shifts (groups, columns, lanes)."""
    groups, p, depth = -(-blocks.rows // lanes), blocks.p, config["depth"]
    diagonals = np.zeros((groups * lanes, blocks.columns, p), np.float32)
    diagonals[: blocks.rows] = blocks.diagonals
    diagonals = diagonals.reshape(groups, lanes, blocks.columns, p).transpose(0, 2, 3, 1)
    pieces = [diagonals[:, :, c : c + depth].reshape(groups, -1) for c in range(0, p, depth)]
    shifts = np.zeros((groups * lanes, blocks.columns), np.uint8)
    shifts[: blocks.rows] = blocks.shifts
    packed = {
        "diagonals": np.ascontiguousarray(np.concatenate(pieces, axis=1)),
        "shifts": np.ascontiguousarray(shifts.reshape(groups, lanes, -1).transpose(0, 2, 1)),
    }
    return packed | blocks.column_table()


def emit_permute(
    e: Emitter,
    blocks: DiagonalBlocks,
    rows: Extent,
    x: Any,
    constants: dict[str, Any],
    writer: RowWriter,
    config: Config,
) -> None:
    p, lanes, depth = blocks.p, e.lanes, config["depth"]
    q, shifts, table = constants["diagonals"], constants["shifts"], constants.get("columns")
    groups = -(-blocks.rows // lanes)
    masked = blocks.out % (p * lanes) != 0
    index_type = f"uint32x{lanes}"

    twice = 2 * p <= lanes  # x blocks repeat along the register, so that c + k < 2p needs no remainder

    def wrapped(index: Any) -> Any:
        """(c + k) mod p where that is needed. The instruction itself wraps at `lanes`."""
        if twice or p == lanes:
            return index
        one_turn = I.broadcast(tirx.const(p, "uint32"), lanes)
        return I.min(index, index - one_turn)  # unsigned: below p the difference is huge

    def multiply(acc: list[list[Any]], group: Any, row: Any, first: int, count: int) -> None:
        """acc[i][c - first] += sum_j q[:, j, c] x[row + i, j*p + (c + k) mod p] for `count` diagonals c."""

        def step(j: Any, at_edge: bool) -> None:
            start = blocks.column_start(j, table)
            mask = e.bind_mask(start, blocks.inner) if at_edge else None
            met = []
            for i in range(len(acc)):
                value = e.load_masked(x, mask, row + i, start) if at_edge else e.load(x, row + i, start)
                value = e.bind(tirx.Select(mask, value, e.splat(0.0)) if at_edge else value)
                met.append(e.bind(e.shuffle(value, value, [lane % p for lane in range(lanes)])) if twice else value)
            shift = I.alloc_buffer((1,), index_type)
            e.set(shift, tirx.Cast(index_type, e.load(shifts, group, j, 0)))
            for c in range(count):
                index = I.alloc_buffer((1,), index_type)
                e.set(index, wrapped(shift[0] + I.broadcast(tirx.const(first + c, "uint32"), lanes)))
                diagonal = e.bind(e.load(q, group, ((first * blocks.columns) + j * count + c) * lanes))
                for i in range(len(acc)):
                    permuted = I.call_llvm_pure_intrin(e.dtype, permutes(lanes), met[i], index[0])
                    e.set(acc[i][c], acc[i][c][0] + permuted * diagonal)

        inside = blocks.columns_inside(lanes)
        if inside:
            with serial(0, inside) as j:
                step(j, False)
        if inside < blocks.columns:
            with serial(inside, blocks.columns) as j:
                step(j, True)

    def block(group: Any, row: Any, count: int) -> None:
        done: list[list[Any]] = [[] for _ in range(count)]
        for first in range(0, p, depth):
            acc = [e.registers(min(depth, p - first)) for _ in range(count)]
            for registers in acc:
                e.zero(registers)
            multiply(acc, group, row, first, len(acc[0]))
            for i in range(count):
                done[i] += [register[0] for register in acc[i]]
        for i in range(count):
            for n, value in enumerate(interleave(e, done[i])):
                writer.store(value, row + i, (group * p + n) * lanes, masked)

    with parallel(0, groups * ceildiv(rows, config["unit"])) as unit:
        first = unit // groups * config["unit"]
        count = rows if isinstance(rows, int) and rows <= config["unit"] else tirx.min(config["unit"], rows - first)
        row_blocks(count, config["rows"], lambda row, n: block(unit % groups, row, n), first)


# -- slices -------------------------------------------------------------------------------------------------


def slices_space(blocks: DiagonalBlocks, site: Site) -> Iterator[Config]:
    """`rows` rows of x by `vectors` vectors of a diagonal in registers."""
    vectors = -(-blocks.p // site.cpu.lanes)
    room = site.cpu.registers // 2
    most = site.rows if isinstance(site.rows, int) else 8
    seen = set()
    for limit in (room // 4, room // 8, room):
        wide = -(-vectors // -(-vectors // limit))  # strips of equal width
        if wide not in seen:
            seen.add(wide)
            yield {"way": "slices", "vectors": wide, "rows": max(1, min(most, room // wide, 8))}


def pack_slices(blocks: DiagonalBlocks, lanes: int, config: Config) -> dict[str, np.ndarray]:
    """diagonals (block rows, columns, p in whole vectors); shifts (block rows, columns)."""
    padding = -blocks.p % lanes
    return {
        "diagonals": np.pad(blocks.diagonals, ((0, 0), (0, 0), (0, padding))).astype(np.float32),
        "shifts": blocks.shifts.astype(np.int32),
    } | blocks.column_table()


def emit_slices(
    e: Emitter,
    blocks: DiagonalBlocks,
    rows: Extent,
    x: Any,
    constants: dict[str, Any],
    writer: RowWriter,
    config: Config,
) -> None:
    p, lanes, wide = blocks.p, e.lanes, config["vectors"]
    q, shifts, table = constants["diagonals"], constants["shifts"], constants.get("columns")
    vectors = -(-p // lanes)
    # a slice starts below p and has whole vectors; what it reads behind 2p meets zeros of q and must be finite
    doubled = scratch((rows, blocks.columns, 2 * vectors * lanes))
    double_blocks(e, blocks, rows, x, doubled, table)
    strips = -(-vectors // wide)

    def strip(i: Any, first_vector: Any, row: Any, count: int) -> None:
        acc = [e.registers(wide) for _ in range(count)]
        for registers in acc:
            e.zero(registers)
        with serial(0, blocks.columns) as j:
            shift = I.Bind(shifts[i, j])
            for v in range(wide):
                position = tirx.min(first_vector + v, vectors - 1) * lanes
                diagonal = e.bind(e.load(q, i, j, position))
                for r in range(count):
                    e.set(acc[r][v], acc[r][v][0] + diagonal * e.load(doubled, row + r, j, shift + position))
        end = tirx.min(i * p + p, blocks.out)
        for r in range(count):
            for v in range(wide):
                writer.store(acc[r][v][0], row + r, i * p + (first_vector + v) * lanes, limit=end)

    units = blocks.rows * strips
    with parallel(0, units * ceildiv(rows, ROWS_PER_UNIT)) as unit:
        first = unit // units * ROWS_PER_UNIT
        count = rows if isinstance(rows, int) and rows <= ROWS_PER_UNIT else tirx.min(ROWS_PER_UNIT, rows - first)
        i, strip_number = unit % units // strips, unit % strips
        row_blocks(count, config["rows"], lambda row, n: strip(i, strip_number * wide, row, n), first)


def double_blocks(e: Emitter, blocks: DiagonalBlocks, rows: Extent, x: Any, doubled: Any, table: Any) -> None:
    """doubled[row, j] = block j of x, twice, then zeros (or what finite values come after it in memory)."""
    p, lanes = blocks.p, e.lanes
    vectors = -(-p // lanes)

    def copy(row: Any) -> None:
        with serial(0, blocks.columns) as j:
            start = I.Bind(blocks.column_start(j, table))
            end = I.Bind(tirx.min(start + p, blocks.column_end(j)))
            for v in range(vectors, 2 * vectors):
                e.store(doubled, e.splat(0.0), row, j, v * lanes)
            # in this order: the second copy overwrites what the first one's last vector has behind p
            for offset in (0, p):
                with serial(0, vectors) as v:
                    mask = e.bind_mask(start + v * lanes, end)
                    # two statements: inside the Select TVM would take the load's mask for true
                    loaded = e.bind(e.load_masked(x, mask, row, start + v * lanes))
                    e.store(doubled, tirx.Select(mask, loaded, e.splat(0.0)), row, j, offset + v * lanes)

    with parallel(0, rows) as row:
        copy(row)


SPACES = {"permute": permute_space, "slices": slices_space, "gemm": gemm_space}
PACKERS = {"permute": pack_permute, "slices": pack_slices, "gemm": pack_gemm}
EMITTERS = {"permute": emit_permute, "slices": emit_slices, "gemm": emit_gemm}
