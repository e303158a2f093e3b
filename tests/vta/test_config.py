"""Configurations: the documented numbers, and refusal of what cannot be built."""

from __future__ import annotations

import json

import pytest

from tvm_structured.errors import VTAError
from tvm_structured.vta import Memory, VTAConfig
from tvm_structured.vta.isa import Alu, Gemm, Load

SMALL = VTAConfig(log_uop_buff_size=10, log_inp_buff_size=12, log_wgt_buff_size=14, log_acc_buff_size=13)


def test_the_default_has_the_sizes_of_the_sample_configurations() -> None:
    config = VTAConfig()
    assert (config.batch, config.block, config.inp_bits, config.wgt_bits, config.out_bits) == (1, 16, 8, 8, 8)
    assert {m.name: config.element_bytes(m) for m in Memory} == {
        "UOP": 4, "WGT": 256, "INP": 16, "ACC": 64, "OUT": 16, "ACC_8BIT": 16,
    }  # fmt: skip
    assert [config.depth(m) for m in Memory] == [8192, 1024, 2048, 2048, 2048, 2048]
    assert config.uop_widths == (11, 11, 10)


def positions(cls: type, config: VTAConfig) -> dict[str, tuple[int, int]]:
    return {slot.name: (slot.width, slot.word * 64 + slot.shift) for slot in cls.slots(config)}


def test_fields_lie_where_the_documentation_says() -> None:
    load, gemm, alu = (positions(cls, VTAConfig()) for cls in (Load, Gemm, Alu))
    assert (load["opcode"], load["push_next"], load["memory_type"]) == ((3, 0), (1, 6), (3, 7))
    assert (load["sram_base"], load["dram_base"], load["y_size"]) == ((16, 10), (32, 26), (16, 64))
    assert (load["y_pad_0"], load["x_pad_1"]) == ((4, 112), (4, 124))
    assert (gemm["uop_bgn"], gemm["uop_end"], gemm["iter_in"]) == ((13, 8), (14, 21), (14, 49))
    assert (gemm["dst_out"], gemm["src_in"], gemm["wgt_in"]) == ((11, 64), (11, 97), (10, 118))
    assert (alu["alu_opcode"], alu["use_imm"], alu["imm"]) == ((3, 108), (1, 111), (16, 112))


def test_a_field_that_would_cross_the_words_starts_the_second() -> None:
    gemm, alu = positions(Gemm, SMALL), positions(Alu, SMALL)
    assert (gemm["uop_end"], gemm["dst_out"], gemm["dst_in"]) == ((9, 16), (7, 53), (7, 64))
    assert (gemm["src_out"], gemm["wgt_in"]) == ((8, 71), (6, 93))
    assert (alu["src_out"], alu["alu_opcode"], alu["imm"]) == ((7, 71), (3, 85), (16, 89))


def test_json_round_trips() -> None:
    assert VTAConfig.from_json(SMALL.to_json()) == SMALL
    assert VTAConfig.from_json(json.loads(SMALL.to_json())) == SMALL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"LOG_BLOCK": 9}, "LOG_BLOCK=9: expected 1 to 7"),
        ({"LOG_BLOCK": "4"}, "LOG_BLOCK='4'"),
        ({"LOG_ACC_WIDTH": 4}, "LOG_ACC_WIDTH=4: expected 5"),
        ({"LOG_INP_WIDTH": 5}, "LOG_INP_WIDTH=5"),
        ({"LOG_WGT_BUFF_SIZE": 8}, "LOG_WGT_BUFF_SIZE=8: two elements need at least 9"),
        ({"LOG_ACC_BUFF_SIZE": 20, "LOG_INP_BUFF_SIZE": 18}, "micro-op needs 38 bits"),
        ({"LOG_BLOCK": 1, "LOG_INP_WIDTH": 1}, "INP element has 4 bits"),
        ({"LOG_BLOK": 4}, "unknown key 'LOG_BLOK'"),
        ({"TARGET": 3}, "TARGET=3"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(VTAError, match=message):
        VTAConfig.from_json({**json.loads(VTAConfig().to_json()), **change})


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_text_that_is_no_configuration_is_refused(text: str) -> None:
    with pytest.raises(VTAError, match="the configuration is"):
        VTAConfig.from_json(text)


def test_a_missing_size_is_named() -> None:
    with pytest.raises(VTAError, match=r"LOG_INP_WIDTH.*LOG_ACC_BUFF_SIZE"):
        VTAConfig.from_json({"TARGET": "sim"})
