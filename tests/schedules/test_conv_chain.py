"""Chains of convolutions in one kernel: geometry, layouts, low rank on images, and inside a compiled model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kernel_harness import EVERYTHING, check_all_guarded, runnable_machines, target_for

import tvm_structured as ts
from tvm_structured.schedules import KERNELS, ConvGeometry, Cpu, Site
from tvm_structured.schedules.conv_chain import geometry_of, sites_of
from tvm_structured.structures import STRUCTURES, Conv2d
from tvm_structured.structures.conv_chain import Step

STRIDED = ConvGeometry((3, 3), (2, 1), (1, 2, 0, 1), (1, 2))
SIZES: dict[str, dict[str, Any]] = {
    "low_rank": {"rank": 5},
    "spatial_low_rank": {"rank": 5},
    "tucker": {"ranks": (6, 5)},
    "cp": {"rank": 5, "bits": 8},
}


def member_of(family: str, out: int = 20, inner: int = 18, conv: ConvGeometry = STRIDED) -> Any:
    weight = np.random.default_rng(0).standard_normal((out, inner, *conv.kernel)).astype(np.float32)
    layer = Conv2d("conv", weight, conv.stride, conv.padding, conv.dilation)
    return STRUCTURES[family].from_dense(layer, **SIZES[family])


@pytest.mark.parametrize("family", SIZES)
def test_strides_dilations_and_layouts(guarded: Any, family: str) -> None:
    """NCHW, blocks, and an image that begins them."""
    cases = [
        {
            "structure": member_of(family),
            "rows": (2,),
            "conv": STRIDED,
            "image": (9, 12),
            "epilogue": EVERYTHING,
            "machine": runnable_machines()[-1],
            "blocked": blocked,
        }
        for blocked in ((False, False), (True, True), (False, True))
    ]
    assert guarded(check_all_guarded, cases) == len(cases)


@pytest.mark.parametrize("family", SIZES)
def test_every_configuration_is_right_for_any_batch(guarded: Any, family: str) -> None:
    conv = ConvGeometry((3, 3), padding=(1, 1, 1, 1))
    fixed = {"structure": member_of(family, conv=conv), "conv": conv, "image": (8, 8)}
    cases = [{**fixed, "rows": (1,), "config": config, "blocked": (True, True)} for config in range(1, 5)]
    cases += [
        {**fixed, "rows": (1, 3), "symbolic": True, "blocked": blocked} for blocked in ((False,) * 2, (True,) * 2)
    ]
    assert guarded(check_all_guarded, cases) >= 5


def test_a_pointwise_low_rank_convolution(guarded: Any) -> None:
    conv = ConvGeometry((1, 1), (2, 2))
    case = {"structure": member_of("low_rank", conv=conv), "rows": (2,), "conv": conv, "image": (7, 6)}
    assert guarded(check_all_guarded, [case, {**case, "blocked": (True, True)}]) == 2


def test_each_part_of_the_geometry_goes_to_one_step() -> None:
    vertical, horizontal = Step(None, (3, 1), (True, False)), Step(None, (1, 3), (False, True))
    assert geometry_of(vertical, STRIDED) == ConvGeometry((3, 1), (2, 1), (1, 0, 0, 0), (1, 1))
    assert geometry_of(horizontal, STRIDED) == ConvGeometry((1, 3), (1, 1), (0, 2, 0, 1), (1, 2))
    site = Site((1, 18, 9, 12), (1, 20, 4, 11), Cpu.of(target_for()), conv=STRIDED)
    places = sites_of(member_of("tucker").steps(), site)
    assert [place.y_shape for place in places] == [(1, 5, 9, 12), (1, 6, 4, 11), (1, 20, 4, 11)]
    assert places[-1].y_shape == site.y_shape


def test_matrix_families_do_not_take_images() -> None:
    assert {name for name, kernel in KERNELS.items() if kernel.takes_images} >= {"conv2d", "winograd", *SIZES}
    assert not KERNELS["block_circulant"].takes_images


@pytest.mark.parametrize("family", SIZES)
def test_compiled_models_run_the_chain(family: str) -> None:
    """Two convolutions in a row, so that images are in blocks; the layer is named in the report."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, 48, 3, stride=2, padding=1),
        torch.nn.BatchNorm2d(48),
        torch.nn.ReLU(),
        torch.nn.Conv2d(48, 32, 3, padding=1),
    ).eval()
    layer = model[2]
    weight = layer.weight.detach().numpy()
    member = STRUCTURES[family].from_dense(Conv2d("2.weight", weight, (2, 2), (1, 1, 1, 1)), **SIZES[family])
    planted = Conv2d("2.weight", weight).with_matrix(np.asarray(member.dense(), np.float32)).weight
    layer.weight.data = torch.from_numpy(np.ascontiguousarray(planted))
    x = torch.randn(2, 3, 20, 20)
    compiled = ts.compile(model, inputs=(x,), target="host", plan=ts.Plan({"2.weight": member}))
    expected = model(x).detach().numpy()
    np.testing.assert_allclose(compiled(x.numpy()), expected, atol=2e-5 * np.abs(expected).max())
    assert compiled.plan.choices["2.weight"].name == family
