"""Quantized operators on a CPU, against the accelerator's NumPy meaning of the same calls, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from quantized_samples import constants, inputs_of, int8, module_of, run_on_cpu, with_residual
from tvm import relax

from tvm_structured.quantized import QuantizedCall
from tvm_structured.relay_passes.vta_operators import operator_of
from tvm_structured.structures import BlockCirculant

RNG = np.random.default_rng(0)


def check(call: QuantizedCall) -> None:
    arrays = [int8(RNG, *(int(extent) for extent in x.ty.shape)) for x in call.inputs]
    arrays[0].reshape(-1)[:2] = -128, 127  # extremes are there, whatever the size
    operator = operator_of([call])
    assert operator is not None
    expected = operator.reference(*arrays)
    found = run_on_cpu(module_of(call), *arrays)
    assert found.dtype == np.int8
    assert found.shape == tuple(call.output_shape())
    np.testing.assert_array_equal(found, expected)


def weighted(op: str, x: tuple[int, ...], weight: tuple[int, ...], outs: int, **options: Any) -> QuantizedCall:
    made = constants(RNG, int8(RNG, *weight), outs, per_channel=outs % 2 == 1)
    return QuantizedCall(op, inputs_of(x), made, layer="layer", shift=14, **options)


@pytest.mark.parametrize("ending", ("plain", "residual", "joined", "joined, not rounded"))
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(weighted("dense", (3, 7), (5, 7), 5, pre_shift=3), id="dense"),
        pytest.param(weighted("dense", (1, 64), (16, 64), 16, low=0), id="dense-relu"),
        pytest.param(weighted("stage", (2, 3 * 4 * 5), (1, 6, 4), 90, sizes={"lead": 3, "trail": 5}), id="stage"),
        pytest.param(weighted("stage", (2, 12), (1, 6, 4), 18, sizes={"lead": 3, "trail": 1}), id="stage-last"),
        pytest.param(weighted("stage", (2, 24), (6, 5, 4), 30, sizes={"lead": 3, "trail": 2}), id="stage-places"),
        pytest.param(weighted("conv2d", (2, 3, 7, 9), (5, 3, 3, 3), 5, padding=(1, 1, 1, 1)), id="conv"),
        pytest.param(
            weighted("conv2d", (1, 6, 8, 5), (4, 3, 2, 3), 4, strides=(2, 1), padding=(0, 2, 1, 0), groups=2),
            id="conv-groups",
        ),
        pytest.param(
            weighted("conv2d", (1, 3, 9, 8), (5, 3, 3, 2), 5, padding=(2,) * 4, dilation=(2, 3)), id="dilated"
        ),
        pytest.param(weighted("conv2d", (1, 6, 5, 5), (6, 1, 3, 3), 6, padding=(1,) * 4, groups=6), id="depthwise"),
        pytest.param(
            weighted("conv2d_transpose", (2, 4, 3, 5), (4, 3, 3, 2), 3, strides=(2, 3), padding=(1, 0, 0, 1)),
            id="transpose",
        ),
        pytest.param(
            weighted(
                "conv2d_transpose", (1, 4, 3, 3), (4, 3, 3, 3), 6, strides=(2, 2), output_padding=(1, 0), groups=2
            ),
            id="transpose-groups",
        ),
    ],
)  # fmt: skip
def test_a_layer_is_exact(call: QuantizedCall, ending: str) -> None:
    call = replace(call, rounds=int("not" not in ending))
    check(call if ending == "plain" else with_residual(call, "joined" in ending))


@pytest.mark.parametrize(
    "call",
    [
        QuantizedCall("add", inputs_of((2, 3, 5), (2, 3, 5)), multipliers=(77, -50), shifts=(6, 7), low=0),
        QuantizedCall("rescale", inputs_of((2, 3, 4, 5)), multipliers=(3,), shifts=(1,), high=100),
        QuantizedCall("max_pool2d", inputs_of((1, 3, 7, 8)), kernel=(3, 3), strides=(2, 2), padding=(1, 1, 1, 1)),
        QuantizedCall("max_pool2d", inputs_of((1, 3, 7, 8)), kernel=(2, 3), strides=(1, 2), low=0, high=99),
        QuantizedCall("avg_pool2d", inputs_of((2, 5, 7, 6)), kernel=(7, 6), multipliers=(40,), shifts=(10,)),
        QuantizedCall(
            "avg_pool2d", inputs_of((1, 3, 7, 8)), kernel=(3, 2), strides=(2, 1), padding=(1, 0, 1, 1),
            multipliers=(9,), shifts=(6,),
        ),
    ],
    ids=lambda call: f"{call.op}-{call.kernel}",
)  # fmt: skip
def test_an_operator_without_weights_is_exact(call: QuantizedCall) -> None:
    if call.op == "add":
        call = QuantizedCall(
            "add", inputs_of((2, 3), (2, 3)), multipliers=call.multipliers, shifts=call.shifts, low=call.low
        )
    check(call)


def test_a_structured_weight_is_written_out() -> None:
    structure = BlockCirculant((10, 7), 1, int8(RNG, 3, 2, 4))
    bias, multiplier = constants(RNG, int8(RNG, 1, 1), 10)[1:]
    call = QuantizedCall(
        "dense", inputs_of((3, 7)), (relax.const(structure.c), bias, multiplier),
        structure=structure.name, sizes=structure.sizes_of, shift=14,
    )  # fmt: skip
    np.testing.assert_array_equal(call.weight(), structure.dense())
    check(call)
