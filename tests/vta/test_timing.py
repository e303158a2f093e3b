"""The timing model against cycles counted by hand, and its pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering_harness import DEFAULT, int8

from tvm_structured.errors import DeadlockError
from tvm_structured.vta import Program, assemble
from tvm_structured.vta.lower import lower
from tvm_structured.vta.operators import Int8Dense, Requantize
from tvm_structured.vta.timeline import save_timeline
from tvm_structured.vta.timing import TimingModel, model


def cycles(text: str, constants: TimingModel | None = None) -> int:
    return model(Program(DEFAULT, assemble(DEFAULT, text)), constants).cycles


FETCH = 20  # before the first instruction of a burst; then two beats each, and one cycle to hand it on


def test_instructions_take_what_the_model_says() -> None:
    assert cycles("FINISH") == FETCH + 2 + 1 + 2
    assert cycles("GEMM uop_end=3 iter_out=5 iter_in=7\nFINISH") == FETCH + 4 + 1 + (3 * 5 * 7 + 8) + 2
    assert cycles("ALU use_imm uop_end=3 iter_out=5 iter_in=7\nFINISH") == FETCH + 4 + 1 + (105 + 8) + 2
    assert cycles("ALU uop_end=3 iter_out=5 iter_in=7\nFINISH") == FETCH + 4 + 1 + (210 + 8) + 2
    load = "LOAD memory_type=ACC dram_base=64 y_size=3 x_size=10 x_stride=10\nFINISH"
    # three rows of 80 beats; addresses 4096, 4736, 5376 + 640 stay within bursts of 2048 bytes
    assert cycles(load) == FETCH + 4 + 1 + (20 + 240 + 2 * 2) + 2
    # rows of 640 bytes in bursts of 128: 5, and 6 where a row does not begin at a multiple
    assert cycles(load, TimingModel(burst_beats=16)) == FETCH + 4 + 1 + (20 + 240 + 2 * 14) + 2
    padded = "LOAD memory_type=ACC dram_base=64 y_size=1 x_size=10 x_stride=10 y_pad_0=2 x_pad_1=3\nFINISH"
    assert cycles(padded) == FETCH + 4 + 1 + (20 + 80 + 3 * 13 - 10 - 16) + 2
    store = "STORE memory_type=OUT dram_base=512 y_size=2 x_size=4 x_stride=8 push_prev\nFINISH pop_next"
    assert cycles(store) == FETCH + 4 + 1 + (2 + 6 * 2 + 3 * 8) + 2


def test_modules_overlap_and_loads_share_the_port() -> None:
    text = """
    LOAD memory_type=INP dram_base=512 y_size=1 x_size=100 x_stride=100 push_next
    LOAD memory_type=ACC dram_base=64 y_size=1 x_size=20 x_stride=20
    GEMM uop_end=1 iter_out=10 iter_in=100 pop_prev
    FINISH
    """
    timing = model(Program(DEFAULT, assemble(DEFAULT, text)))
    start = FETCH + 8
    assert timing.start.tolist()[:2] == [start + 1, start + 2]
    first = start + 1 + 20 + 200  # the second waits for the port, not only for its own latency
    assert timing.end.tolist()[:2] == [first, first + 160]
    assert timing.cycles == first + 160 + 1008 + 2
    assert timing.gemm_utilisation == 1000 / timing.cycles
    assert timing.busy == {"load": 220, "compute": first + 160 - start - 2 + 1008 + 2, "store": 0}


def test_a_queue_that_is_too_short_is_a_deadlock() -> None:
    loads = "LOAD memory_type=INP push_next pop_next\n" * 3
    text = loads + "GEMM push_prev\n" * 3 + "GEMM pop_prev\n" * 2 + "FINISH pop_prev\n"
    assert cycles(text) > 0
    with pytest.raises(DeadlockError, match="queue of 2"):
        cycles(text, TimingModel(queue=2))


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 200), st.integers(1, 200), st.integers(1, 2))
def test_no_program_beats_its_parts(n: int, inner: int, out: int, threads: int) -> None:
    """No less than each module's own time, or the bytes through the port; no more than all one after the other."""
    layer = Int8Dense(int8(np.random.default_rng(0), out, inner), None, Requantize(shift=7))
    program = lower(layer, [(n, inner)], threads=threads).program
    timing = model(program)
    loaded = int(program.counts[:, :4].sum())
    assert timing.cycles >= max(*timing.busy.values(), timing.read_busy, loaded / 8)
    assert timing.cycles <= sum(timing.busy.values()) + 30 * len(program)
    assert (timing.end >= timing.start).all()
    assert timing.gemm_micro_ops == int(program.counts[:, 5].sum())


def test_timelines_show_every_instruction(tmp_path: Path) -> None:
    layer = Int8Dense(int8(np.random.default_rng(0), 60, 40), None, Requantize(shift=7))
    program = lower(layer, [(5, 40)]).program
    timing = model(program)
    document = json.loads(save_timeline(timing, program, tmp_path / "trace.json").read_text())
    found = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert len(found) == len(program)
    assert {event["name"] for event in found} >= {"LOAD INP", "LOAD WGT", "LOAD UOP", "GEMM", "ALU", "STORE"}
    assert max(event["ts"] + event["dur"] for event in found) == timing.cycles
    gemm = next(event for event in found if event["name"] == "GEMM")
    assert set(gemm["args"]) == {"instruction", "uop_bgn", "uop_end", "iter_out", "iter_in"}
    assert save_timeline(timing, program, tmp_path / "trace.png").read_bytes()[:4] == b"\x89PNG"
