"""Permuted diagonal: y[i*p + c] = sum_j q[i, j, c] x[j*p + (c + k_ij) mod p].

Four ways to compute it:

    permute  lanes = block rows, p <= lanes: a register permutation gives each lane its entry of an x block
    gemm     k_ij = f_i + g_j (mod p): p dense products between two static permutations (permuted_diagonal_gemm)
    rows     lanes = rows of x, where there are many (permuted_diagonal_rows)
    slices   any p, any CPU: x blocks doubled to length 2p, so that (c + k) mod p for all c is one slice
             (permuted_diagonal_slices)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Config, Extent, Kernel, Site
from tvm_structured.schedules.diagonal_blocks import DiagonalBlocks
from tvm_structured.schedules.emit import Emitter, arg, ceildiv, parallel, prim_func, row_blocks, serial
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.schedules.permuted_diagonal_gemm import MAX_GEMM_BLOCK, emit_gemm, gemm_space, pack_gemm
from tvm_structured.schedules.permuted_diagonal_rows import emit_rows, pack_rows, rows_space
from tvm_structured.schedules.permuted_diagonal_slices import emit_slices, pack_slices, slices_space
from tvm_structured.schedules.shuffles import interleave
from tvm_structured.structures.base import Structure

UNITS = (32, 64, 16, 128)  # about so many rows of x stay in L2 beside the diagonals of a group of block rows


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
        has_many = isinstance(site.rows, int) and site.rows > cpu.lanes and blocks.p <= cpu.lanes
        ways.insert(0 if has_many else len(ways), "rows")
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
        if rows >= 1 and (not choices or rows > choices[-1]["rows"]):
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


SPACES = {"permute": permute_space, "slices": slices_space, "rows": rows_space, "gemm": gemm_space}
PACKERS = {"permute": pack_permute, "slices": pack_slices, "rows": pack_rows, "gemm": pack_gemm}
EMITTERS = {"permute": emit_permute, "slices": emit_slices, "rows": emit_rows, "gemm": emit_gemm}
