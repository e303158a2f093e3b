"""Bad programs: a typed error with instruction and field, nothing outside the buffers touched, and life goes on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tvm_structured.errors import (
    DeadlockError,
    DramRangeError,
    FinishError,
    IllegalInstructionError,
    ScratchpadOverflowError,
    VTAError,
)
from tvm_structured.vta import Memory, Program, Simulator, VTAConfig, assemble, encode_uops

CONFIG = VTAConfig()
BYTES = 1 << 16
LOAD_UOP = "LOAD memory_type=UOP dram_base=1024 y_size=1 x_size=4 x_stride=4\n"
BAD = [
    (".word 0x5 0x0\nFINISH", IllegalInstructionError, 0, "opcode"),
    ("LOAD memory_type=OUT dram_base=512 y_size=1 x_size=1\nFINISH", IllegalInstructionError, 0, "memory_type"),
    ("LOAD memory_type=7 dram_base=512 y_size=1 x_size=1\nFINISH", IllegalInstructionError, 0, "memory_type"),
    ("STORE memory_type=ACC dram_base=512 y_size=1 x_size=1\nFINISH", IllegalInstructionError, 0, "memory_type"),
    ("STORE memory_type=OUT dram_base=512 x_size=1 x_pad_0=1\nFINISH", IllegalInstructionError, 0, "x_pad_0"),
    ("LOAD memory_type=INP pop_prev\nFINISH", IllegalInstructionError, 0, "pop_prev"),
    ("LOAD memory_type=WGT push_prev\nFINISH", IllegalInstructionError, 0, "push_prev"),
    ("STORE push_next\nFINISH", IllegalInstructionError, 0, "push_next"),
    ("FINISH pop_prev\nALU alu_opcode=6", IllegalInstructionError, 1, "alu_opcode"),
    ("GEMM uop_bgn=3 uop_end=1 iter_out=1 iter_in=1\nFINISH", IllegalInstructionError, 0, "uop_end"),
    ("GEMM uop_bgn=8191 uop_end=8193 iter_out=1 iter_in=1\nFINISH", ScratchpadOverflowError, 0, "uop_end"),
    (
        "LOAD memory_type=ACC sram_base=2046 dram_base=64 y_size=1 x_size=2 x_pad_1=1\nFINISH",
        ScratchpadOverflowError,
        0,
        "sram_base",
    ),
    (
        "STORE memory_type=OUT sram_base=2047 dram_base=512 y_size=1 x_size=2\nFINISH",
        ScratchpadOverflowError,
        0,
        "sram_base",
    ),
    ("LOAD memory_type=ACC y_size=1 x_size=1\nFINISH", DramRangeError, 0, "dram_base"),
    ("LOAD memory_type=ACC dram_base=63 y_size=1 x_size=1\nFINISH", DramRangeError, 0, "dram_base"),
    ("LOAD memory_type=ACC dram_base=1024 y_size=0 x_size=1\nFINISH", DramRangeError, 0, "dram_base"),
    ("LOAD memory_type=ACC dram_base=1023 y_size=1 x_size=2\nFINISH", DramRangeError, 0, "dram_base"),
    ("STORE memory_type=OUT dram_base=4000 y_size=2 x_size=1 x_stride=96\nFINISH", DramRangeError, 0, "dram_base"),
    ("FINISH pop_prev", DeadlockError, 0, "pop_prev"),
    ("LOAD memory_type=INP pop_next push_next\nFINISH pop_prev", DeadlockError, 0, "pop_next"),
    ("FINISH\nSTORE pop_prev", DeadlockError, 1, "pop_prev"),
    ("GEMM", FinishError, 0, "opcode"),
    ("", FinishError, 0, "opcode"),
    ("FINISH\nGEMM", FinishError, 1, "opcode"),
    ("FINISH\nFINISH", FinishError, 1, "opcode"),
    ("LOAD memory_type=INP\nFINISH", FinishError, 0, "opcode"),
    ("GEMM push_next\nSTORE pop_prev\nFINISH", FinishError, 1, "opcode"),
    (LOAD_UOP + "GEMM reset uop_end=4 iter_out=2 iter_in=1 dst_out=2045\nFINISH", ScratchpadOverflowError, 1, "dst"),
    (LOAD_UOP + "GEMM uop_end=4 iter_out=1 iter_in=3 src_in=1023\nFINISH", ScratchpadOverflowError, 1, "src"),
    (LOAD_UOP + "GEMM uop_end=4 iter_out=3 iter_in=1 wgt_out=511\nFINISH", ScratchpadOverflowError, 1, "wgt"),
    (
        LOAD_UOP + "ALU use_imm uop_end=4 iter_out=2 iter_in=2 src_out=2047\nFINISH",
        ScratchpadOverflowError,
        1,
        "src",
    ),
]


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return Simulator(CONFIG, BYTES)


def fresh(simulator: Simulator) -> Simulator:
    simulator.reset()
    simulator.dram[:] = 0
    simulator.dram[4096:4112] = encode_uops(CONFIG, [3, 1, 2, 0], [3, 1, 2, 0], [3, 1, 2, 0]).view(np.uint8)
    return simulator


@pytest.mark.parametrize(("text", "error", "index", "field"), BAD)
def test_a_bad_program_is_refused_with_its_place(
    simulator: Simulator, text: str, error: type[VTAError], index: int, field: str
) -> None:
    before = fresh(simulator).dram.copy()
    with pytest.raises(error, match=f"instruction {index}, field {field}") as caught:
        simulator.run(assemble(CONFIG, text))
    assert (caught.value.instruction, caught.value.field) == (index, field)
    assert not simulator.sram(Memory.ACC).any() and np.array_equal(simulator.dram, before)
    assert not any(simulator.counters.values()) and simulator.tokens == (0, 0, 0, 0)
    simulator.run(assemble(CONFIG, "LOAD memory_type=UOP dram_base=1024 y_size=1 x_size=1\nFINISH"))
    assert simulator.counters["uop_load_nbytes"] == 4


def test_regions_bound_what_a_program_may_touch(simulator: Simulator) -> None:
    words = assemble(CONFIG, "LOAD memory_type=ACC dram_base=126 y_size=1 x_size=4\nFINISH")
    fresh(simulator).run(words)
    with pytest.raises(DramRangeError, match="bytes 8064 to 8320"):
        simulator.run(words, regions=[(4096, 8192), (8192, 12288)])
    simulator.run(words, regions=[(4096, 12288)])
    with pytest.raises(VTAError, match="not inside"):
        simulator.run(words, regions=[(0, BYTES + 1)])


def test_endless_loops_are_refused(simulator: Simulator) -> None:
    words = assemble(CONFIG, "GEMM uop_end=8192 iter_out=16383 iter_in=16383\nFINISH")
    with pytest.raises(VTAError, match="raise max_iterations"):
        fresh(simulator).run(words)


def test_tokens_stay_from_run_to_run(simulator: Simulator) -> None:
    waiting = assemble(CONFIG, "FINISH pop_prev")
    fresh(simulator).tokens = (1, 0, 0, 0)
    with pytest.raises(DeadlockError):
        Program(CONFIG, waiting).order()
    simulator.tokens = (0, 0, 0, 0)
    simulator.run(assemble(CONFIG, "LOAD memory_type=INP push_next\nGEMM pop_prev push_prev\nFINISH"))
    assert simulator.tokens == (0, 1, 0, 0)
    simulator.run(assemble(CONFIG, "LOAD memory_type=INP pop_next push_next\nFINISH pop_prev"))
    assert simulator.tokens == (0, 0, 0, 0)


def test_shifts_by_32_and_more_leave_the_sign_or_zero(simulator: Simulator) -> None:
    for value, amount in itertools.product((5, -5), (31, 32, 100, -32, -100, 32767, -32768)):
        fresh(simulator)
        simulator.run(
            assemble(
                CONFIG,
                f"""LOAD memory_type=UOP dram_base=2048 y_size=1 x_size=1
                ALU alu_opcode=ADD use_imm imm={value} uop_end=1 iter_out=1 iter_in=1
                ALU alu_opcode=SHR use_imm imm={amount} uop_end=1 iter_out=1 iter_in=1
                FINISH""",
            )
        )
        expected = (-1 if value < 0 else 0) if amount > 0 else 0
        assert simulator.sram(Memory.ACC)[:16].tolist() == [expected] * 16


def test_wrong_arguments_are_described(simulator: Simulator) -> None:
    finish = assemble(CONFIG, "FINISH")
    with pytest.raises(VTAError, match="uint64 array"):
        simulator.run(finish.astype(np.int64))
    with pytest.raises(VTAError, match="polling"):
        simulator.run(finish, polling=(0, 1))
    with pytest.raises(VTAError, match="another configuration"):
        simulator.run(Program(VTAConfig(log_batch=1), finish))
