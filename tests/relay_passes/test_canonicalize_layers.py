"""Many spellings of dense and convolution become one; everything else stays as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import tvm
from graph_harness import (
    CLOSE,
    canonical,
    check_torch,
    const,
    relax_main,
    run,
    weight,
    with_input,
)
from torch import nn
from tvm import ir, relax
from tvm.script import ir as I
from tvm.script import relax as R

from tvm_structured import dialect
from tvm_structured.dialect import LayerCall
from tvm_structured.errors import ModelError
from tvm_structured.relay_passes.canonicalize_layers import CanonicalizeLayers
from tvm_structured.relay_passes.find_layers import find_calls
from tvm_structured.schedules.base import ConvGeometry

# torch's own export and serialisation code warns of its own deprecations
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

RNG = np.random.default_rng(0)
dialect.register()


# -- Before / Expected ---------------------------------------------------------------------------------------


@I.ir_module
class Linear:
    @R.function
    def main(x: R.Tensor((4, 8), "float32"), w: R.Tensor((16, 8), "float32"), b: R.Tensor((16,), "float32")):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            wt = R.permute_dims(w, axes=[1, 0])
            h = R.matmul(x, wt, out_dtype="float32")
            y = R.add(b, h)
            R.output(y)
        return y


@I.ir_module
class ChannelsLast:
    @R.function
    def main(x: R.Tensor((2, 9, 8, 3), "float32"), w: R.Tensor((3, 2, 3, 5), "float32")):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.nn.conv2d(x, w, strides=[2, 1], padding=[1, 0, 0, 2], data_layout="NHWC", kernel_layout="HWIO")
            R.output(y)
        return y


@I.ir_module
class Conv1d:
    @R.function
    def main(x: R.Tensor((2, 4, 9), "float32"), w: R.Tensor((6, 2, 3), "float32")):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.nn.conv1d(x, w, strides=2, padding=[1, 0], dilation=2, groups=2)
            R.output(y)
        return y


def test_a_linear_layer_keeps_its_bias_outside_and_its_name() -> None:
    w, b = weight(RNG, 16, 8), weight(RNG, 16)
    layer = LayerCall("dense", "fc.weight", None, (const(w),))
    expected = relax_main(lambda emit, x: relax.op.add(const(b), emit(with_input(layer, x))), (4, 8))
    found = CanonicalizeLayers({"w": w, "b": b}, {"w": "fc.weight", "b": "fc.bias"})(Linear)
    ir.assert_structural_equal(found, expected, map_free_vars=True)


def test_a_channels_last_convolution_is_permuted_around() -> None:
    w = weight(RNG, 3, 2, 3, 5)
    geometry = ConvGeometry((3, 2), (2, 1), (1, 0, 0, 2))
    layer = LayerCall("conv2d", "w", None, (const(w.transpose(3, 2, 0, 1)),), conv=geometry)

    def body(emit: Any, x: Any) -> Any:
        y = emit(with_input(layer, emit(relax.op.permute_dims(x, [0, 3, 1, 2]))))
        return relax.op.permute_dims(y, [0, 2, 3, 1])

    ir.assert_structural_equal(CanonicalizeLayers({"w": w})(ChannelsLast), relax_main(body, (2, 9, 8, 3)))


def test_a_one_dimensional_convolution_is_one_of_height_one() -> None:
    w = weight(RNG, 6, 2, 3)
    geometry = ConvGeometry((1, 3), (1, 2), (0, 1, 0, 0), (1, 2), groups=2)
    layer = LayerCall("conv2d", "w", None, (const(w[:, :, None]),), conv=geometry)

    def body(emit: Any, x: Any) -> Any:
        return relax.op.squeeze(emit(with_input(layer, emit(relax.op.expand_dims(x, 2)))), [2])

    ir.assert_structural_equal(CanonicalizeLayers({"w": w})(Conv1d), relax_main(body, (2, 4, 9)))


# -- what stays as it was ------------------------------------------------------------------------------------

W65, W56, IMAGE = weight(RNG, 6, 5), weight(RNG, 5, 6), weight(RNG, 4, 3, 3, 3)


def conv(x: Any, w: Any, **options: Any) -> Any:
    return relax.op.nn.conv2d(x, w, **options)


N, H = tvm.tirx.Var("n", "int64"), tvm.tirx.Var("h", "int64")
LEFT_ALONE = {
    "attention_scores": (lambda emit, a, b: relax.op.matmul(a, b), [(2, 4, 5), (2, 5, 4)]),
    "weight_as_input": (lambda emit, x, w: relax.op.matmul(x, emit(relax.op.permute_dims(w))), [(4, 5), (6, 5)]),
    "stack_of_matrices": (lambda emit, x: relax.op.matmul(x, const(weight(RNG, 2, 5, 6))), [(2, 3, 5)]),
    "weight_is_a_vector": (lambda emit, x: relax.op.matmul(x, const(weight(RNG, 5))), [(2, 5)]),
    "weight_left_of_a_batch": (lambda emit, x: relax.op.matmul(const(W65), x), [(2, 5, 3)]),
    "repeated_batch": (lambda emit, x: relax.op.matmul(x, const(np.stack([W56, W56]))), [(1, 3, 5)]),
    "two_constants": (lambda emit, x: relax.op.add(x, emit(relax.op.matmul(const(W65), const(W56)))), [(6, 6)]),
    "symbolic_image": (lambda emit, x: conv(x, const(IMAGE)), [(1, 3, H, 8)]),
    "convolution_by_an_input": (lambda emit, x, w: conv(x, w), [(1, 3, 8, 8), (4, 3, 3, 3)]),
    "convolution_of_a_constant": (lambda emit, w: conv(const(weight(RNG, 1, 3, 8, 8)), w), [(4, 3, 3, 3)]),
    "three_dimensional": (
        lambda emit, x: relax.op.nn.conv3d(x, const(weight(RNG, 4, 3, 1, 2, 2))), [(1, 3, 2, 8, 8)],
    ),
    "transposed": (lambda emit, x: relax.op.nn.conv2d_transpose(x, const(weight(RNG, 3, 4, 2, 2))), [(1, 3, 4, 4)]),
    "packed_layout": (
        lambda emit, x: conv(x, const(weight(RNG, 4, 1, 3, 3, 4)), data_layout="NCHW4c", kernel_layout="OIHW4i"),
        [(1, 1, 8, 8, 4)],
    ),
    "einsum_that_mixes": (lambda emit, x: relax.op.einsum((x, const(W65)), "bi,oi->ob"), [(3, 5)]),
    "no_layer": (lambda emit, x: relax.op.nn.softmax(x), [(3, 5)]),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_is_no_layer_stays_exactly_as_it_was(case: str) -> None:
    body, shapes = LEFT_ALONE[case]
    before = relax_main(body, *shapes)
    ir.assert_structural_equal(CanonicalizeLayers()(before), before)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8"])
def test_layers_of_other_types_stay_exactly_as_they_were(dtype: str) -> None:
    w = relax.const(np.ones((5, 6), dtype), dtype)
    image = relax.const(np.ones((4, 3, 2, 2), dtype), dtype)
    for body, shape in (
        (lambda emit, x: relax.op.matmul(x, w), (3, 5)),
        (lambda emit, x: relax.op.nn.conv2d(x, image), (1, 3, 4, 4)),
    ):
        before = relax_main(body, shape, dtype=dtype)
        ir.assert_structural_equal(CanonicalizeLayers()(before), before)


def test_a_product_with_another_output_type_stays() -> None:
    before = relax_main(lambda emit, x: relax.op.matmul(x, const(W56), out_dtype="float64"), (3, 5))
    ir.assert_structural_equal(CanonicalizeLayers()(before), before)


def test_parameters_of_what_stays_are_bound() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((2, 3, 5), "float32"), w: R.Tensor((2, 5, 6), "float32"), unused: R.Tensor((1,), "float32")
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.matmul(x, w)
                R.output(y)
            return y

    w = weight(RNG, 2, 5, 6)
    found = CanonicalizeLayers({"w": w, "unused": np.zeros(1, "f4")})(Before)
    ir.assert_structural_equal(found, relax_main(lambda emit, x: relax.op.matmul(x, const(w)), (2, 3, 5)))


def test_canonicalising_twice_changes_nothing_more() -> None:
    once = canonical(relax_main(lambda emit, x: relax.op.matmul(x, const(W56)), (3, 5)), fuse=False)
    ir.assert_structural_equal(CanonicalizeLayers()(once), once)


def test_layers_outside_dataflow_blocks_and_in_branches_are_found() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((4, 5), "float32"), flag: R.Tensor((), "bool"), w: R.Tensor((5, 5), "float32")):
            R.func_attr({"num_input": 2})
            h = R.matmul(x, w)
            if flag:
                a = R.matmul(h, w)
                y = R.nn.relu(a)
            else:
                y = R.matmul(x, R.permute_dims(w))
            return y

    w = weight(RNG, 5, 5)
    mod = CanonicalizeLayers({"w": w})(Before)
    relax.analysis.well_formed(mod)
    assert {name: len(calls) for name, calls in find_calls(mod).items()} == {"w": 2, "w#2": 1}
    x = weight(RNG, 4, 5)
    np.testing.assert_allclose(run(mod, x, np.array(True)), np.maximum(x @ w @ w, 0), **CLOSE)
    np.testing.assert_allclose(run(mod, x, np.array(False)), x @ w.T, **CLOSE)


def test_a_symbolic_batch_stays_symbolic() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5)).eval()
    batch = torch.export.Dim("batch", min=1)
    mod = check_torch(net, torch.randn(3, 3, 4, 4), dynamic_shapes=({0: batch},), names=["0.weight", "2.weight"])
    x = torch.randn(7, 3, 4, 4)
    np.testing.assert_allclose(run(mod, x), net(x).detach().numpy(), **CLOSE)


# -- errors --------------------------------------------------------------------------------------------------


def test_a_parameter_without_a_value_is_named() -> None:
    with pytest.raises(ModelError, match="'b' of 'main' has no value"):
        CanonicalizeLayers({"w": weight(RNG, 16, 8)})(Linear)


@pytest.mark.parametrize("value", [np.zeros((8, 16), "f4"), np.zeros((16, 8)), np.zeros(16, "f4")])
def test_a_value_of_another_type_is_named(value: np.ndarray) -> None:
    with pytest.raises(ModelError, match=r"'w': the model declares \(16, 8\) float32"):
        CanonicalizeLayers({"w": value, "b": weight(RNG, 16)})(Linear)


def test_a_module_without_main_is_an_error() -> None:
    with pytest.raises(ModelError, match="no Relax function 'main'"):
        CanonicalizeLayers()(tvm.IRModule())
