"""Encoding, decoding and listing: nothing is lost on the way, whatever the configuration."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_structured.errors import IllegalInstructionError, VTAError
from tvm_structured.vta import Alu, Finish, Gemm, Instruction, Load, Memory, VTAConfig, assemble, decode, disassemble
from tvm_structured.vta.bits import pack_integers, unpack_integers
from tvm_structured.vta.isa import INSTRUCTIONS, encode
from tvm_structured.vta.uops import decode_uops, encode_uops

CONFIGS = [
    VTAConfig(),
    VTAConfig(log_batch=1),
    VTAConfig(log_block=5),
    VTAConfig(log_block=3, log_batch=2),
    VTAConfig(log_inp_width=2, log_wgt_width=2, log_inp_buff_size=14, log_wgt_buff_size=17),
    VTAConfig(log_uop_buff_size=10, log_inp_buff_size=12, log_wgt_buff_size=14, log_acc_buff_size=13),
]


@st.composite
def instructions(draw: st.DrawFn) -> tuple[VTAConfig, Instruction]:
    config = draw(st.sampled_from(CONFIGS))
    cls = draw(st.sampled_from(list(INSTRUCTIONS.values())))
    slots = cls.slots(config)[1:]
    return config, cls(**{slot.name: draw(st.integers(*slot.limits)) for slot in slots})


@given(instructions())
@settings(max_examples=200)
def test_encoding_and_listing_round_trip(case: tuple[VTAConfig, Instruction]) -> None:
    config, instruction = case
    words = instruction.encode(config)
    assert decode(config, words) == instruction
    np.testing.assert_array_equal(assemble(config, disassemble(config, words[None])), words[None])


@given(st.lists(st.tuples(*[st.integers(0, 2**64 - 1)] * 2), max_size=5), st.sampled_from(CONFIGS))
@settings(max_examples=200)
def test_any_128_bits_survive_the_listing(pairs: list[tuple[int, int]], config: VTAConfig) -> None:
    words = np.array(pairs, np.uint64).reshape(-1, 2)
    np.testing.assert_array_equal(assemble(config, disassemble(config, words)), words)


@given(st.sampled_from(CONFIGS), st.randoms())
@settings(max_examples=50)
def test_micro_ops_round_trip(config: VTAConfig, random: object) -> None:
    indices = [[random.randrange(1 << width) for _ in range(4)] for width in config.uop_widths]  # type: ignore[attr-defined]
    for found, expected in zip(decode_uops(config, encode_uops(config, *indices)), indices, strict=True):
        assert found.tolist() == expected


@pytest.mark.parametrize("width", [2, 4, 8, 32])
def test_packed_integers_round_trip_low_bits_first(width: int) -> None:
    values = np.random.default_rng(0).integers(-(1 << (width - 1)), 1 << (width - 1), 64)
    np.testing.assert_array_equal(unpack_integers(pack_integers(values, width), width), values)
    assert pack_integers(np.array([1, -1]), 4).tolist() == [0xF1]


def test_a_listing_reads_like_the_instruction() -> None:
    config = VTAConfig()
    text = """
    LOAD memory_type=INP sram_base=4 dram_base=0x100 y_size=1 x_size=2 x_stride=2 push_next  # one row
    GEMM reset uop_end=1 iter_out=1 iter_in=1 pop_prev
    ALU alu_opcode=SHR use_imm imm=-3 uop_end=1 iter_out=1 iter_in=1
    FINISH
    """
    expected = [
        Load(memory_type=Memory.INP, sram_base=4, dram_base=256, y_size=1, x_size=2, x_stride=2, push_next=1),
        Gemm(reset=1, uop_end=1, iter_out=1, iter_in=1, pop_prev=1),
        Alu(alu_opcode=3, use_imm=1, imm=-3, uop_end=1, iter_out=1, iter_in=1),
        Finish(),
    ]
    np.testing.assert_array_equal(assemble(config, text), encode(config, expected))
    assert "alu_opcode=SHR use_imm imm=-3" in disassemble(config, assemble(config, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FINISH\nJUMP", "line 2: 'JUMP' is no instruction"),
        ("GEMM colour=3", "line 1: .*no field 'colour'"),
        ("LOAD memory_type=RAM", "expected a number or one of UOP"),
        ("LOAD x_size=65536", "does not fit 16 bits"),
        ("LOAD x_size=1 x_size=2", "given twice"),
        (".word 1", "two 64-bit numbers"),
        (".word 1 -1", "two 64-bit numbers"),
    ],
)
def test_a_listing_that_cannot_be_read_names_the_line(text: str, message: str) -> None:
    with pytest.raises(VTAError, match=message):
        assemble(VTAConfig(), text)


def test_a_value_that_does_not_fit_names_instruction_and_field() -> None:
    with pytest.raises(IllegalInstructionError, match="16384 does not fit 14 bits") as caught:
        encode(VTAConfig(), [Finish(), Gemm(iter_out=1 << 14)])
    assert (caught.value.instruction, caught.value.field) == (1, "iter_out")
    with pytest.raises(VTAError, match="dst: 2048 to 2048 does not fit 11 bits"):
        encode_uops(VTAConfig(), 2048)
