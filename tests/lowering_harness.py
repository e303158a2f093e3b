"""A lowered operator against its reference: through the simulator, under every order of the modules."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tvm_structured.vta import Simulator, VTAConfig
from tvm_structured.vta.golden import POLLINGS
from tvm_structured.vta.lower import Lowered, lower
from tvm_structured.vta.operators import Joined, Operator, Requantize, Scale
from tvm_structured.vta.timing import model

DEFAULT = VTAConfig()
TINY = VTAConfig(log_uop_buff_size=8, log_inp_buff_size=10, log_wgt_buff_size=12, log_acc_buff_size=12)
CONFIGS = {
    "default": DEFAULT,
    "tiny": TINY,
    "batch 2": replace(TINY, log_batch=1),
    "block 8": replace(DEFAULT, log_block=3, log_batch=2),
    "block 32": replace(TINY, log_block=5, log_wgt_buff_size=14),
}
DRAM_BYTES = 1 << 23


@cache
def simulator(config: VTAConfig) -> Simulator:
    """One for each configuration, since building one takes a second; `check` fills its memory with noise."""
    return Simulator(config, DRAM_BYTES)


def int8(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-128, 128, shape).astype(np.int8)


def requantize(rng: np.random.Generator, channels: int) -> Requantize:
    """One of the forms that the ALU can take, keeping results of a few thousand apart."""
    return replace(_requantize(rng, channels), rounds=bool(rng.integers(2)))


def _requantize(rng: np.random.Generator, channels: int) -> Requantize:
    shift = int(rng.integers(0, 9))
    kind = int(rng.integers(5))
    if kind == 4:
        return Requantize(0, rng.integers(1, 9, channels).astype(np.int32), shift + 8)
    if kind == 0:
        return Requantize(shift=shift + 4, low=int(rng.integers(-128, 1)), high=int(rng.integers(1, 128)))
    if kind == 1:
        return Requantize(shift % 4 + 3, int(rng.integers(1, 128)), shift + 7, 0)
    multipliers = rng.integers(1, 1 << 7, channels).astype(np.int32)
    return Requantize(shift % 4 + 3 + 4 * (kind == 3), multipliers, shift + 7 * (kind == 2))


def bias(rng: np.random.Generator, channels: int) -> np.ndarray | None:
    kind = int(rng.integers(3))
    return None if kind == 0 else rng.integers(-(1 << 10 * kind), 1 << 10 * kind, channels).astype(np.int32)


def residual(rng: np.random.Generator, shift: int = 0) -> Scale | None:
    """`shift`: that of the requantisation, of which a joined residual leaves some bits."""
    kind = int(rng.integers(6))
    if kind < 3:
        return None
    if kind == 3:
        return Scale(int(rng.integers(-300, 300)), int(rng.integers(0, 19)))
    if kind == 4:
        return Joined(int(rng.integers(-300, 300)), int(rng.integers(0, shift + 1)))
    return Joined(int(rng.integers(-127, 128)), min(shift, 6))


def check(
    operator: Operator, shapes: list[tuple[int, ...]], config: VTAConfig, rng: np.random.Generator, **options: Any
) -> Lowered:
    """Lower, run under every module order on a machine full of noise, compare bit for bit; model its cycles."""
    lowered = lower(operator, shapes, config, **options)
    inputs = [int8(rng, *shape) for shape in shapes]
    expected = operator.reference(*inputs)
    machine = simulator(config)
    orders = POLLINGS if len(lowered.program) < 300 else POLLINGS[::5]
    for polling in orders:
        machine.reset()
        for buffer in (machine.dram, machine._acc, machine._uop):
            buffer[: 1 << 20].view(np.uint8)[:] = 77
        np.testing.assert_array_equal(lowered.run(*inputs, simulator=machine, polling=polling), expected)
    assert model(lowered.program).cycles > 0
    return lowered


seeds = st.integers(0, 1 << 30)
names = st.sampled_from(sorted(CONFIGS))
