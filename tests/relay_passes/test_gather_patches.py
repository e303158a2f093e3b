"""Images of few channels as patches: the same integers, in fewer modelled cycles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from quantized_samples import constants, inputs_of, int8, module_of, run_on_cpu
from torch import nn

import tvm_structured as ts
from tvm_structured.quantized import QuantizedCall
from tvm_structured.relay_passes.gather_patches import GatherPatches, cycles
from tvm_structured.vta import VTAConfig

RNG = np.random.default_rng(0)


def conv(x: tuple[int, ...], weight: tuple[int, ...], **options: Any) -> QuantizedCall:
    made = constants(RNG, int8(RNG, *weight), weight[0])
    return QuantizedCall("conv2d", inputs_of(x), made, layer="layer", shift=14, **options)


def calls_of(mod: Any) -> list[QuantizedCall]:
    bindings = [binding for block in mod["main"].body.blocks for binding in block.bindings]
    return [call for call in (QuantizedCall.of(binding.value) for binding in bindings) if call is not None]


@pytest.mark.parametrize(
    "call",
    [
        conv((1, 3, 21, 18), (24, 3, 7, 7), strides=(2, 2), padding=(3, 3, 3, 3)),
        conv((3, 1, 9, 11), (5, 1, 3, 2), padding=(2, 0, 1, 3)),
        conv((1, 5, 12, 13), (20, 5, 3, 3), dilation=(2, 3), strides=(1, 2), padding=(0, 1, 2, 0)),
        conv((1, 2, 3, 4), (9, 2, 5, 7), strides=(3, 3), padding=(9, 5, 8, 11)),
    ],
    ids=["stem", "grey", "dilated", "padding"],
)
def test_patches_give_the_same_integers_in_fewer_cycles(call: QuantizedCall) -> None:
    mod = module_of(call)
    (after,) = calls_of(GatherPatches(VTAConfig())(mod))
    assert after.weight_shape()[2:] == (1, 1)
    assert cycles(after, VTAConfig()) < cycles(call, VTAConfig())
    x = int8(RNG, *(int(extent) for extent in call.inputs[0].ty.shape))
    np.testing.assert_array_equal(run_on_cpu(GatherPatches(VTAConfig())(mod), x), run_on_cpu(mod, x))


@pytest.mark.parametrize(
    "call",
    [
        conv((1, 16, 9, 9), (16, 16, 3, 3)),
        conv((1, 3, 9, 9), (16, 3, 1, 1)),
        conv((1, 4, 9, 9), (4, 1, 3, 3), groups=4),
    ],
    ids=["full", "pointwise", "depthwise"],
)
def test_other_convolutions_stay(call: QuantizedCall) -> None:
    (after,) = calls_of(GatherPatches(VTAConfig())(module_of(call)))
    assert after.weight_shape() == call.weight_shape()


def test_only_what_the_cpu_makes_is_gathered() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 20, 5, padding=2)).eval()
    x = torch.randn(1, 1, 12, 10)
    integers = ts.quantize(net, (x,), torch.randn(8, 1, 12, 10), plan=ts.Plan({}, {}))
    shapes = [call.weight_shape() for call in calls_of(GatherPatches(VTAConfig())(integers))]
    assert shapes == [(3, 9, 1, 1), (20, 3, 5, 5)]
    compiled = ts.compile(integers, target="vta")
    np.testing.assert_array_equal(compiled(x.numpy()), ts.compile(integers, target="host", measure=False)(x.numpy()))
    assert {layer.region for layer in compiled.vta_stats().layers} == {0}
