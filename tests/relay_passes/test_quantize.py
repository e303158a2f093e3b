"""Models in int8: near the float model, whole networks in integers, and what is to stay float32 stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from graph_harness import operators
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_samples import Network
from torch import nn

import tvm_structured as ts
from tvm_structured.relay_passes.integer_scales import LARGEST_SUM, fit_channels, fit_scale, to_int8

RNG = np.random.default_rng(0)


def relative_error(found: Any, expected: torch.Tensor) -> float:
    exact = expected.detach().numpy()
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def quantized_operators(mod: Any) -> list[str]:
    return [name.rpartition(".")[2] for name in operators(mod) if ".quantized." in name]


def test_a_convolutional_network_is_all_integers_and_near_the_float_one() -> None:
    torch.manual_seed(0)
    net, x = Network().eval(), torch.randn(2, 3, 17, 19)
    mod = ts.quantize(net, (x,), torch.randn(8, 3, 17, 19))
    assert [name for name in operators(mod) if ".quantized." not in name] == [
        "relax.quantize", "relax.reshape", "relax.dequantize",
    ]  # fmt: skip
    assert quantized_operators(mod) == [
        "conv2d", "max_pool2d", "conv2d", "conv2d", "conv2d", "avg_pool2d", "conv2d", "avg_pool2d", "add",
        "conv2d_transpose", "avg_pool2d", "dense",
    ]  # fmt: skip
    compiled = ts.compile(mod, target="host", measure=False)
    assert relative_error(compiled(x.numpy()), net(x)) < 0.03


@pytest.mark.parametrize(
    ("structure", "size", "expected"),
    [
        ("low_rank", {"rank": 12}, ["dense", "dense"]),
        ("block_circulant", {"block": 8}, ["dense"]),
        ("block_circulant", {"block": 7}, ["dense"]),
        ("permuted_diagonal", {"block": 5}, ["dense"]),
        ("tensor_train", {"out_modes": [4, 5, 3], "in_modes": [5, 2, 7], "rank": 8}, ["stage"] * 3),
    ],
)
def test_factors_are_quantized(structure: str, size: dict[str, Any], expected: list[str]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(70, 60), nn.ReLU(), nn.Linear(60, 11)).eval()
    x = torch.randn(5, 70)
    plan = ts.Plan({"0.weight": ts.planning.Requested(structure, size)}, {})
    mod = ts.quantize(net, (x,), torch.randn(100, 70), plan=plan)
    assert quantized_operators(mod) == [*expected, "dense"]
    exact = ts.compile(net, (x,), target="host", plan=plan, measure=False)(x.numpy())
    found = ts.compile(mod, target="host", measure=False)(x.numpy())
    assert relative_error(found, torch.from_numpy(exact)) < 0.03


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["dense"] * 3),
        ({"keep_first": True}, ["dense"] * 2),
        ({"keep_last": True}, ["dense"] * 2),
        ({"keep_first": True, "keep_last": True, "keep": ("2.weight",)}, []),
    ],
)
def test_layers_stay_float_by_option(options: dict[str, Any], expected: list[str]) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(4, 8)
    mod = ts.quantize(net, (x,), torch.randn(64, 8), ts.Quantization(**options))
    assert quantized_operators(mod) == expected
    assert relative_error(ts.compile(mod, target="host", measure=False)(x.numpy()), net(x)) < 0.05


def test_what_has_no_integer_form_stays_float() -> None:
    """GELU, softmax and a symbolic batch."""
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3), nn.Softmax(-1)).eval()
    x = torch.randn(4, 8)
    mod = ts.quantize(net, (x,), torch.randn(64, 8))
    assert quantized_operators(mod) == ["dense", "dense"]
    assert relative_error(ts.compile(mod, target="host", measure=False)(x.numpy()), net(x)) < 0.05
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (x,), dynamic_shapes={"input": {0: batch}})
    assert quantized_operators(ts.quantize(program, (x,), torch.randn(64, 8))) == []


def test_concatenated_tensors_share_a_scale() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.a(x), 10 * self.b(x)], dim=1)

    net, x = Branches().eval(), torch.randn(1, 3, 5, 6)
    mod = ts.quantize(net, (x,), torch.cat([x, torch.randn(20, 3, 5, 6)]))  # whose range holds for x, too
    assert quantized_operators(mod) == ["conv2d", "conv2d", "rescale", "rescale"]
    assert relative_error(ts.compile(mod, target="host", measure=False)(x.numpy()), net(x)) < 0.05


# -- integer factors --------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    outs=st.integers(1, 9),
    inner=st.integers(1, 3000),
    spread=st.floats(1e-4, 1),
    scales=st.tuples(st.floats(1e-4, 10), st.floats(1e-4, 10)),
    seed=st.integers(0, 2**31),
)
def test_no_sum_leaves_32_bits_and_no_weight_is_clipped(
    outs: int, inner: int, spread: float, scales: tuple[float, float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((outs, inner)) * np.geomspace(spread, 1, outs)[:, None]
    bias = 10 * rng.standard_normal(outs)
    magnitudes = np.abs(weight)
    channels = fit_channels(magnitudes.max(axis=1), magnitudes.sum(axis=1), inner, bias, *scales)
    assert channels is not None
    integers = np.rint(weight / channels.scale[:, None])
    assert np.abs(integers).max() <= 127
    np.testing.assert_array_equal(to_int8(weight, channels.scale[:, None]), integers)
    offsets = np.rint(bias / (channels.scale * scales[0]))
    bound = 128 * np.abs(integers).sum(axis=1) + np.abs(offsets)
    assert (bound * channels.multiplier + 2.0**channels.shift / 2).max() <= LARGEST_SUM
    # the scale is what the multiplier and the shift make of it
    ratio = channels.scale * scales[0] / scales[1]
    np.testing.assert_allclose(channels.multiplier * 2.0**-channels.shift, ratio, rtol=1e-12)


@given(ratio=st.floats(1e-5, 200), count=st.integers(1, 5000))
def test_a_scale_is_near_its_ratio_and_fits(ratio: float, count: int) -> None:
    made = fit_scale(ratio, count)
    if made is None:
        assert ratio * 128 * count > 2**30 or ratio < 1e-4
        return
    multiplier, shift = made
    assert 0 < multiplier < 1 << 15
    assert 128 * count * multiplier + (1 << shift) // 2 <= LARGEST_SUM
    assert abs(multiplier * 2.0**-shift - ratio) <= max(2.0**-shift / 2, 1e-12)


# -- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ts.Quantization(method="best"), "expected one of minmax"),
        (lambda: ts.Quantization(percentile=0), "above 0"),
        (lambda: ts.Quantization(keep="fc"), "tuple of layer names"),
        (lambda: quantize_small(ts.Quantization(keep=("fc",))), "its layers are 0.weight"),
        (lambda: quantize_small(None, np.zeros((3, 7), np.float32)), "got shape"),
        (lambda: quantize_small(None, np.zeros((3, 8), np.float64)), "float64"),
        (lambda: quantize_small(None, np.full((3, 8), np.nan, np.float32)), "not finite"),
        (lambda: quantize_small(None, []), "no data"),
        (lambda: quantize_small(None, 3), "expected arrays"),
        (lambda: quantize_small(None, [1, 2]), "a batch is an array"),
        (lambda: quantize_small(None, {"y": np.zeros((1, 8), np.float32)}), "is missing"),
    ],
)
def test_bad_input_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ts.ModelError, match=message):
        make()


def quantize_small(options: Any, data: Any = None) -> Any:
    samples = torch.randn(4, 8) if data is None else data
    return ts.quantize(nn.Sequential(nn.Linear(8, 4)).eval(), (torch.zeros(1, 8),), samples, options)
