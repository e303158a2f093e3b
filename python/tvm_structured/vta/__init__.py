"""A VTA-style accelerator: its instruction set, a functional simulator and programs with known results.

config = VTAConfig()
simulator = Simulator(config, dram_bytes=1 << 20)
simulator.run(Program(config, assemble(config, "FINISH")))

`isa.py` is the definition; `reference.py` executes it slowly, `simulator.py` fast.
"""

from __future__ import annotations

from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.isa import Alu, Finish, Gemm, Instruction, Load, Store, decode, encode
from tvm_structured.vta.listing import assemble, disassemble
from tvm_structured.vta.program import Program
from tvm_structured.vta.simulator import Simulator
from tvm_structured.vta.uops import decode_uops, encode_uops

__all__ = [
    "Alu",
    "Finish",
    "Gemm",
    "Instruction",
    "Load",
    "Memory",
    "Program",
    "Simulator",
    "Store",
    "VTAConfig",
    "assemble",
    "decode",
    "decode_uops",
    "disassemble",
    "encode",
    "encode_uops",
]
