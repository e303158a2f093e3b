"""Operators that follow each other in one DRAM: no tensor is overwritten while somebody needs it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_structured.vta import Simulator, VTAConfig
from tvm_structured.vta.lower import lower
from tvm_structured.vta.lower.layout import Layout
from tvm_structured.vta.lower.lowered import aligned
from tvm_structured.vta.operators import Int8Dense, Requantize
from tvm_structured.vta.region import DramPlan, Region, Step

CONFIG = VTAConfig()


@settings(max_examples=100)
@given(sizes=st.lists(st.integers(0, 30000), min_size=1, max_size=30), order=st.randoms(use_true_random=False))
def test_memory_in_use_never_overlaps(sizes: list[int], order: object) -> None:
    plan = DramPlan(CONFIG, 8192)
    held: dict[int, int] = {}
    for size in sizes:
        start = plan.take(size)
        assert start % aligned(1, CONFIG) == 0
        for other, length in held.items():
            assert start >= other + length or start + size <= other
        held[start] = size
        assert max(first + length for first, length in held.items()) <= plan.end
        if len(held) > 3:
            victim = order.choice(sorted(held))  # type: ignore[attr-defined]
            plan.give(victim, held.pop(victim))
    for start, size in held.items():
        plan.give(start, size)
    assert plan.free == [(8192, plan.end - 8192)], "all that was given back is one piece again"


def test_what_is_given_back_is_used_again() -> None:
    plan = DramPlan(CONFIG, 4096)
    first, second = plan.take(10000), plan.take(5000)
    plan.give(first, 10000)
    assert plan.take(9000) == first
    assert plan.end == second + aligned(5000, CONFIG)


@pytest.mark.parametrize("config", (CONFIG, VTAConfig(log_batch=2)), ids=("batch1", "batch4"))
def test_steps_share_dram_and_give_what_numpy_gives(config: VTAConfig) -> None:
    """x -> a -> b, and a again: d = f(a) after b, so that a must outlive b."""
    rng = np.random.default_rng(0)

    def dense(out: int, inner: int) -> Int8Dense:
        return Int8Dense(rng.integers(-128, 128, (out, inner), np.int8), None, Requantize(shift=9))

    layers = [dense(40, 33), dense(20, 40), dense(50, 20), dense(7, 40)]
    wiring = [("x", "a"), ("a", "b"), ("b", "c"), ("a", "d")]
    x = rng.integers(-128, 128, (3, 33), np.int8)
    values = {"x": x}
    steps = []
    for layer, (source, target) in zip(layers, wiring, strict=True):
        steps.append(Step(lower(layer, [values[source].shape], config), (source,), target))
        values[target] = layer.reference(values[source])
    layouts = {name: Layout.of(value.shape, config) for name, value in values.items()}
    region = Region.plan(config, steps, {"x": layouts["x"]}, [("c", layouts["c"]), ("d", layouts["d"])])

    simulator = Simulator(config, region.dram_bytes)
    simulator.dram[:] = 77  # nothing counts on zeros
    end = region.first_constant + region.constants.size
    simulator.dram[region.first_constant : end] = region.constants
    (placed,) = region.inputs
    simulator.dram[placed.address : placed.address + placed.layout.nbytes] = placed.layout.pack(x)
    for step in region.steps:
        simulator.run(step.lowered.program, regions=step.lowered.regions)
    for name, result in zip("cd", region.results, strict=True):
        raw = simulator.dram[result.address : result.address + result.layout.nbytes]
        np.testing.assert_array_equal(result.layout.unpack(raw), values[name])
    assert len(region.table) <= sum(len(step.lowered.program) for step in region.steps)
