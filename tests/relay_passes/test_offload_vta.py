"""Quantized models on the simulated accelerator: bit for bit what the CPU computes, split where they must be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from quantized_samples import Network, inputs_of, int8, module_of, run_on_cpu
from torch import nn
from tvm import relax

import tvm_structured as ts
from tvm_structured.errors import VTAError
from tvm_structured.quantized import QuantizedCall
from tvm_structured.vta import VTAConfig

SMALL = VTAConfig(log_block=3, log_batch=1, log_uop_buff_size=10, log_inp_buff_size=11, log_wgt_buff_size=13)


def offloaded(net: nn.Module, x: torch.Tensor, *, config: Any = None, **options: Any) -> ts.Compiled:
    """Compiled for the accelerator; equal to the same integers on the CPU, and near the float model."""
    net = net.eval()
    mod = ts.quantize(net, (x,), x, **options)
    compiled = ts.compile(mod, target="vta", vta_config=config)
    found = compiled(x.numpy())
    np.testing.assert_array_equal(found, ts.compile(mod, target="host", measure=False)(x.numpy()))
    if not options:
        exact = net(x).detach().numpy()
        assert np.linalg.norm(found - exact) < 0.06 * np.linalg.norm(exact)
    return compiled


def regions(compiled: ts.Compiled) -> list[tuple[str, int]]:
    return [(layer.layer, layer.region) for layer in compiled.vta_stats().layers]


@pytest.mark.parametrize("config", (None, SMALL), ids=("default", "small"))
def test_a_perceptron_is_one_region(config: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(70, 60), nn.ReLU(), nn.Linear(60, 33), nn.ReLU(), nn.Linear(33, 11))
    compiled = offloaded(net, torch.randn(5, 70), config=config)
    assert regions(compiled) == [("0.weight", 0), ("2.weight", 0), ("4.weight", 0)]


def test_leading_dimensions_are_rows() -> None:
    net = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))
    assert regions(offloaded(net, torch.randn(2, 3, 24))) == [("0.weight", 0), ("2.weight", 0)]


def test_what_the_accelerator_lacks_runs_on_the_cpu_in_between() -> None:
    net = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 8), nn.Softmax(-1))
    assert regions(offloaded(net, torch.randn(4, 24))) == [("0.weight", 0), ("2.weight", 1)]


def test_layers_stay_on_the_cpu_by_option() -> None:
    net = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    options = ts.Quantization(keep_first=True, keep_last=True)
    assert regions(offloaded(net, torch.randn(4, 24), quantization=options)) == [("2.weight", 0)]


def test_a_convolutional_network_is_one_region() -> None:
    """Odd sizes, a residual, pools of every kind, groups, a sum, a transposed convolution."""
    torch.manual_seed(0)
    compiled = offloaded(Network(), torch.randn(2, 3, 17, 19))
    assert [layer.operator.removeprefix("Int8") for layer in compiled.vta_stats().layers] == [
        "Conv2d", "MaxPool", "Conv2d", "Conv2d", "Conv2d", "AvgPool", "Conv2d", "AvgPool", "Add", "Conv2dTranspose",
        "AvgPool", "Dense",
    ]  # fmt: skip
    assert {layer.region for layer in compiled.vta_stats().layers} == {0}


@pytest.mark.parametrize(
    ("structure", "size"),
    [
        ("low_rank", {"rank": 12}),
        ("block_circulant", {"block": 8}),
        ("permuted_diagonal", {"block": 5}),
        ("tensor_train", {"out_modes": [4, 5, 3], "in_modes": [5, 2, 7], "rank": 8}),
    ],
)
def test_structured_layers_are_exact(structure: str, size: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(70, 60), nn.ReLU(), nn.Linear(60, 11))
    plan = ts.Plan({"0.weight": ts.planning.Requested(structure, size)}, {})
    compiled = offloaded(net, torch.randn(5, 70), plan=plan)
    assert regions(compiled) == [("0.weight", 0), ("2.weight", 0)]


def test_a_flattened_image_is_read_as_it_lies_in_memory() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24 * 20, 10)
    )
    compiled = offloaded(net, torch.randn(2, 3, 8, 10))
    assert regions(compiled)[-1][0] == "4.weight"
    # the program takes 2 blocks of 16 channels for 24
    assert compiled.vta["4.weight"].inputs[0].shape == (2, 2 * 20 * 16)


def test_a_model_without_quantized_layers_has_no_region() -> None:
    compiled = ts.compile(nn.Softmax(-1).eval(), (torch.randn(2, 3),), target="vta")
    assert compiled.vta is None
    with pytest.raises(ts.ModelError, match="nothing of this module runs on the accelerator"):
        compiled.vta_stats()


def test_integers_in_and_out() -> None:
    """A module whose input and result are int8 themselves."""
    rng = np.random.default_rng(0)
    values = int8(rng, 9, 21), rng.integers(-99, 99, 9, np.int32), np.full(9, 3, np.int32)
    call = QuantizedCall("dense", inputs_of((4, 21)), tuple(map(relax.const, values)), layer="fc", shift=9)
    x = int8(rng, 4, 21)
    compiled = ts.compile(module_of(call), target="vta")
    np.testing.assert_array_equal(compiled(x), run_on_cpu(module_of(call), x))


def test_counters_are_those_of_the_programs() -> None:
    compiled = offloaded(nn.Sequential(nn.Linear(70, 60), nn.ReLU(), nn.Linear(60, 11)), torch.randn(5, 70))
    x = np.zeros((5, 70), np.float32)
    compiled.clear_stats()
    for _ in range(3):
        compiled(x)
    stats = compiled.vta_stats()
    assert stats.runs == 3
    for name, value in stats.counters.items():
        assert value == 3 * sum(layer.counters[name] for layer in stats.layers)
    assert stats.counters["gemm_counter"] == 3 * (5 * (4 * 5 + 1 * 4))
    assert stats.counters["out_store_nbytes"] == 3 * 16 * 5 * (4 + 1)
    compiled.clear_stats()
    assert compiled.vta_stats().counters["gemm_counter"] == 0


def test_tuned_schedules_are_exact_and_never_slower() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(20, 40, 3, padding=1), nn.ReLU()).eval(), torch.randn(1, 20, 14, 14)
    mod = ts.quantize(net, (x,), x)
    default, tuned = (ts.compile(mod, target="vta", vta_trials=trials) for trials in (0, 8))
    np.testing.assert_array_equal(default(x.numpy()), tuned(x.numpy()))
    assert tuned.vta_stats().cycles <= default.vta_stats().cycles


def test_four_bit_activations_are_refused() -> None:
    config = VTAConfig(log_inp_width=2, log_inp_buff_size=14)
    with pytest.raises(VTAError, match="LOG_INP_WIDTH=2"):
        ts.compile(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), target="vta", vta_config=config)
