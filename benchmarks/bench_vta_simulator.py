"""Speed of the accelerator's functional simulator: an int8 product, and the fixed cost of a run.

    python benchmarks/bench_vta_simulator.py [--quick] [--json FILE]

The product is one program of the default configuration (weights stay on chip, 64 rows at a time); NumPy (float64, exact
for these values) and torch (int8, int32 sums) compute the same product, on the same machine in turns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
from measuring import describe_machine, interleaved, milliseconds, print_table, write_json

from tvm_structured.vta import (
    Alu,
    Finish,
    Gemm,
    Instruction,
    Load,
    Memory,
    Program,
    Simulator,
    Store,
    VTAConfig,
    encode,
    encode_uops,
)

SIZE, ROWS, BLOCK = 512, 64, 16
UOPS, INPUTS, WEIGHTS = 1 << 12, 1 << 15, 1 << 20  # byte addresses


def product_program(size: int) -> Program:
    """OUT = low bytes of (x W^T) >> 8, x and W (size, size) int8 in blocks of 16; size at most 512."""
    tiles = size // BLOCK
    block = ROWS * tiles
    stream: list[Instruction] = [
        transfer(Memory.UOP, UOPS // 4, tiles * tiles),
        transfer(Memory.WGT, WEIGHTS // 256, tiles * tiles),
    ]
    loops = {"uop_end": tiles * tiles, "iter_out": ROWS, "iter_in": 1, "dst_out": tiles}
    outputs = WEIGHTS + size * size
    for part in range(size // ROWS):
        first = int(part == 0)
        stream += [
            transfer(Memory.INP, INPUTS // 16 + part * block, block, pop_next=1 - first, push_next=1),
            Gemm(reset=1, pop_prev=1, pop_next=1 - first, **loops),
            Gemm(src_out=tiles, push_prev=1, **loops),
            Alu(alu_opcode=3, use_imm=1, imm=8, push_next=1, **{**loops, "uop_end": tiles, "src_out": tiles}),
            Store(
                memory_type=Memory.OUT, dram_base=outputs // 16 + part * block, y_size=1, x_size=block, x_stride=block,
                pop_prev=1, push_prev=1,
            ),
        ]  # fmt: skip
    stream += [Load(memory_type=Memory.INP, pop_next=1, push_next=1), Finish(pop_prev=1, pop_next=1)]
    return Program(VTAConfig(), encode(VTAConfig(), stream))


def transfer(memory: Memory, base: int, count: int, **tokens: int) -> Load:
    return Load(memory_type=memory, dram_base=base, y_size=1, x_size=count, x_stride=count, **tokens)


def tiled(matrix: np.ndarray) -> np.ndarray:
    """WGT elements (out tile, in tile), each (out, in)."""
    tiles = matrix.shape[0] // BLOCK
    return matrix.reshape(tiles, BLOCK, tiles, BLOCK).transpose(0, 2, 1, 3)


def prepared(size: int, x: np.ndarray, weight: np.ndarray) -> Simulator:
    simulator = Simulator(VTAConfig(), WEIGHTS + 2 * size * size)
    tiles = size // BLOCK
    out, inner = (index.reshape(-1) for index in np.meshgrid(np.arange(tiles), np.arange(tiles), indexing="ij"))
    # the inputs of all outputs first, so that consecutive sums do not wait for each other; the ALU uses the first ones
    out, inner = out.reshape(tiles, tiles).T.reshape(-1), inner.reshape(tiles, tiles).T.reshape(-1)
    uops = encode_uops(VTAConfig(), out, inner, out * tiles + inner)
    for address, array in ((UOPS, uops), (INPUTS, x), (WEIGHTS, np.ascontiguousarray(tiled(weight)))):
        raw = array.reshape(-1).view(np.uint8)
        simulator.dram[address : address + raw.size] = raw
    return simulator


def measure(size: int, rounds: int) -> dict[str, Any]:
    """Seconds of the product, checked, and of a run that only finishes."""
    import torch

    rng = np.random.default_rng(0)
    x, weight = rng.integers(-128, 128, (2, size, size)).astype(np.int8)
    simulator, program = prepared(size, x, weight), product_program(size)
    empty = Program(VTAConfig(), encode(VTAConfig(), [Finish()]))
    wide, wide_weight = x.astype(np.float64), weight.astype(np.float64)
    narrow, narrow_weight = torch.from_numpy(x.copy()), torch.from_numpy(weight.T.copy())
    simulator.run(program)
    outputs = WEIGHTS + size * size
    found = simulator.dram[outputs : outputs + size * size].view(np.int8).reshape(size, size)
    np.testing.assert_array_equal(found, ((x.astype(np.int32) @ weight.T.astype(np.int32)) >> 8).astype(np.int8))
    calls = {
        "simulator": lambda: simulator.run(program),
        "simulator, unseen stream": lambda: simulator.run(Program(VTAConfig(), program.words)),
        "numpy float64": lambda: wide @ wide_weight.T,
        "torch int8": lambda: torch._int_mm(narrow, narrow_weight),
        "FINISH alone": lambda: simulator.run(empty),
    }
    return {"macs": size**3, "times": interleaved(calls, rounds)}


@click.command()
@click.option("--quick", is_flag=True, help="A smaller product, few rounds.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write the numbers here.")
def main(quick: bool, path: Path | None) -> None:
    """Measure the simulator beside NumPy and torch."""
    size = 256 if quick else SIZE
    row = measure(size, 3 if quick else 9)
    cells = [
        [name, milliseconds(timing), "-" if "FINISH" in name else f"{row['macs'] / timing.seconds / 1e9:.1f}"]
        for name, timing in row["times"].items()
    ]
    print_table(f"int8 product, {size} x {size} x {size}", ["", "ms", "GMAC/s"], cells, [describe_machine()])
    write_json(path, [{**row, "times": {name: timing.seconds for name, timing in row["times"].items()}}])


if __name__ == "__main__":
    main()
