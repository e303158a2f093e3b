"""Dense layers as programs."""

from __future__ import annotations

import lowering_harness as harness
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering_harness import CONFIGS, bias, check, int8, requantize, residual

from tvm_structured.errors import VTAError
from tvm_structured.vta import VTAConfig
from tvm_structured.vta.lower import Schedule, lower
from tvm_structured.vta.operators import Int8Dense, Requantize, Scale


def dense(rng: np.random.Generator, inner: int, out: int) -> Int8Dense:
    return Int8Dense(int8(rng, out, inner), bias(rng, out), requantize(rng, out), residual(rng), "fc")


@settings(max_examples=30)
@given(harness.names, harness.seeds, st.integers(1, 9), st.integers(1, 150), st.integers(1, 90), st.integers(1, 2))
def test_dense_layers_of_any_shape(config: str, seed: int, n: int, inner: int, out: int, threads: int) -> None:
    rng = np.random.default_rng(seed)
    layer = dense(rng, inner, out)
    check(layer, [(n, inner)] + [(n, out)] * (layer.num_inputs - 1), CONFIGS[config], rng, threads=threads)


@pytest.mark.parametrize("stay", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_schedule_gives_the_same_result(threads: int, stay: bool) -> None:
    rng = np.random.default_rng(0)
    layer = dense(rng, 70, 90)
    shapes = [(5, 70)] + [(5, 90)] * (layer.num_inputs - 1)
    for out, inner, rows in [(1, 1, 1), (2, 3, 4), (6, 1, 5), (4, 5, 2)]:
        check(layer, shapes, CONFIGS["default"], rng, schedule=Schedule(threads, out, inner, rows, weights_stay=stay))


def test_int4_layers() -> None:
    rng = np.random.default_rng(1)
    config = VTAConfig(log_inp_width=2, log_wgt_width=2, log_inp_buff_size=14, log_wgt_buff_size=17)
    layer = Int8Dense(
        rng.integers(-8, 8, (21, 50)).astype(np.int8), bias(rng, 21), Requantize(shift=4, low=-8, high=7), name="fc"
    )
    x = rng.integers(-8, 8, (3, 50)).astype(np.int8)
    lowered = lower(layer, [x.shape], config)
    np.testing.assert_array_equal(lowered.run(x), layer.reference(x))
    with pytest.raises(VTAError, match="inputs have 4 bits"):
        lowered.run(int8(rng, 3, 50))
    for wrong, words in [
        (Int8Dense(int8(rng, 21, 50), None, Requantize(low=-8, high=7), name="fc"), "fc: its weights need more"),
        (Int8Dense(layer.weight, None, Requantize(), name="fc"), r"clip to -8\.\.7"),
        (Int8Dense(layer.weight, None, layer.requantize, Scale(), "fc"), "a residual needs 8-bit"),
    ]:
        with pytest.raises(VTAError, match=words):
            lower(wrong, [x.shape, (3, 21)][: wrong.num_inputs], config)


def test_a_program_runs_where_it_is_placed() -> None:
    rng = np.random.default_rng(2)
    layer = dense(rng, 40, 20)
    shapes = [(2, 40)] + [(2, 20)] * (layer.num_inputs - 1)
    lowered = lower(layer, shapes)
    moved = lowered.placed({"input0": 1 << 20, "output": 1 << 16, "constants": 1 << 18})
    inputs = [int8(rng, *shape) for shape in shapes]
    machine = harness.simulator(VTAConfig())
    np.testing.assert_array_equal(moved.run(*inputs, simulator=machine), layer.reference(*inputs))
    with pytest.raises(VTAError, match="no region 'weights'"):
        lowered.placed({"weights": 4096})
    with pytest.raises(VTAError, match="output at byte 100"):
        lowered.placed({"output": 100})


def test_what_does_not_fit_is_refused() -> None:
    rng = np.random.default_rng(3)
    layer = Int8Dense(int8(rng, 20, 30), name="fc")
    with pytest.raises(VTAError, match="fc: Schedule"):
        lower(layer, [(1, 30)], schedule=Schedule(2, 4000, 1))
    with pytest.raises(VTAError, match="fc: an input of shape"):
        lower(layer, [(1, 31)])
    with pytest.raises(VTAError, match="bytes of DRAM"):
        lower(layer, [(1, 30)]).run(int8(rng, 1, 30), simulator=harness.Simulator(VTAConfig(), 4096))
