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
    canonicalized,
    const,
    node,
    onnx_model,
    onnx_runtime,
    only_call,
    operators,
    relax_main,
    run,
    weight,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from tvm import ir, relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm_structured import dialect
from tvm_structured.dialect import LayerCall
from tvm_structured.errors import ModelError
from tvm_structured.frontend import import_model
from tvm_structured.relay_passes.canonicalize_layers import CanonicalizeLayers
from tvm_structured.relay_passes.find_layers import find_calls, find_layers
from tvm_structured.schedules.base import ConvGeometry, Epilogue

# torch's own export and serialisation code warns of its own deprecations
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

RNG = np.random.default_rng(0)
dialect.register()


# -- Before / Expected --------------------------------------------------------------------------------------


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


def with_input(layer: LayerCall, x: Any) -> Any:
    return LayerCall(
        layer.op, layer.layer, x, layer.factors, layer.sizes, layer.epilogue, layer.operands, layer.conv
    ).to_relax()


# -- ONNX, against ONNX Runtime -------------------------------------------------------------------------------

W65, W56, B6 = weight(RNG, 6, 5), weight(RNG, 5, 6), weight(RNG, 6)
ONNX_DENSE: dict[str, tuple[Any, ...]] = {
    # id: (nodes, weights, x shape, y shape, layer names)
    "gemm": ([node("Gemm", "x w b", "y")], {"w": W56, "b": B6}, (3, 5), (3, 6), ["w"]),
    "gemm_all_attributes": (
        [node("Gemm", "x w b", "y", transA=1, transB=1, alpha=0.5, beta=2.0)],
        {"w": W65, "b": B6}, (5, 3), (3, 6), ["w"],
    ),
    "gemm_weight_left": (
        [node("Gemm", "w x b", "y", alpha=-0.5, beta=3.0)], {"w": W65, "b": B6[:, None]}, (5, 3), (6, 3), ["w"],
    ),
    "gemm_weight_left_both_transposed": (
        [node("Gemm", "w x", "y", transA=1, transB=1)], {"w": W56}, (3, 5), (6, 3), ["w"],
    ),
    "gemm_matrix_bias": ([node("Gemm", "x w b", "y")], {"w": W56, "b": weight(RNG, 3, 6)}, (3, 5), (3, 6), ["w"]),
    "matmul_transposed_initializer": (
        [node("Transpose", "w", "t", perm=[1, 0]), node("MatMul", "x t", "h"), node("Add", "b h", "y")],
        {"w": W65, "b": B6}, (2, 3, 5), (2, 3, 6), ["w"],
    ),
    "matmul_many_leading_dimensions": ([node("MatMul", "x w", "y")], {"w": W56}, (2, 1, 3, 4, 5), (2, 1, 3, 4, 6), ["w"]),
    "matmul_vector": ([node("MatMul", "x w", "y")], {"w": W56}, (5,), (6,), ["w"]),
    "matmul_matrix_times_vector": ([node("MatMul", "w x", "y")], {"w": W65}, (5,), (6,), ["w"]),
    "matmul_stack_of_one": ([node("MatMul", "x w", "y")], {"w": W56[None]}, (2, 3, 5), (2, 3, 6), ["w"]),
    "matmul_stack_adds_a_dimension": ([node("MatMul", "x w", "y")], {"w": W56[None, None]}, (3, 5), (1, 1, 3, 6), ["w"]),
    "reshape_matmul": (
        [node("Reshape", "x s", "h"), node("MatMul", "h w", "y")],
        {"w": weight(RNG, 10, 6), "s": np.array([-1, 10])}, (2, 2, 5), (2, 6), ["w"],
    ),
    "einsum": ([node("Einsum", "x w", "y", equation="bti,oi->bto")], {"w": W65}, (2, 3, 5), (2, 3, 6), ["w"]),
    "einsum_weight_first": ([node("Einsum", "w x", "y", equation="io,bi->bo")], {"w": W56}, (3, 5), (3, 6), ["w"]),
    "computed_weight": (
        [
            node("Mul", "a s", "m"), node("Add", "m b", "sum"), node("Concat", "sum c", "cat", axis=1),
            node("Unsqueeze", "cat ax", "u"), node("Squeeze", "u ax", "w"), node("MatMul", "x w", "y"),
        ],
        {"a": weight(RNG, 5, 4), "s": np.float32(2) * np.ones((5, 1), "f4"), "b": weight(RNG, 4), "c": weight(RNG, 5, 2),
         "ax": np.array([0])}, (3, 5), (3, 6), ["a"],
    ),
    "half_precision_weight": (
        [node("Cast", "h", "w", to=1), node("MatMul", "x w", "y")],
        {"h": W56.astype("f2")}, (3, 5), (3, 6), ["h"],
    ),
    "quantized_weight": (
        [node("DequantizeLinear", "q s z", "w"), node("MatMul", "x w", "y")],
        {"q": RNG.integers(-127, 127, (5, 6)).astype("i1"), "s": np.float32(0.02), "z": np.int8(3)},
        (3, 5), (3, 6), ["q"],
    ),
    "split_weight": (
        [node("Split", "w", "a b", axis=0), node("MatMul", "x a", "h"), node("MatMul", "h b", "y")],
        {"w": weight(RNG, 10, 5)}, (3, 5), (3, 5), ["w[0]", "w[1]"],
    ),
    "sliced_weight": (
        [node("Slice", "w s e", "a"), node("MatMul", "x a", "y")],
        {"w": weight(RNG, 10, 5), "s": np.array([1]), "e": np.array([6])}, (3, 5), (3, 5), ["w[1:6]"],
    ),
    "gathered_weight": (
        [node("Gather", "w i", "a", axis=0), node("MatMul", "x a", "y")],
        {"w": weight(RNG, 3, 5, 6), "i": np.array(1)}, (3, 5), (3, 6), ["w[1]"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ONNX_DENSE)
@pytest.mark.parametrize("fuse", [False, True], ids=["canonical", "fused"])
def test_onnx_spellings_of_dense(case: str, fuse: bool) -> None:
    nodes, weights, x_shape, y_shape, names = ONNX_DENSE[case]
    model = onnx_model(nodes, weights, x_shape, y_shape)
    mod = canonical(model, fuse)
    assert list(find_layers(mod)) == names
    assert not {"relax.matmul", "relax.einsum", "relax.call_tir"} & set(operators(mod))
    x = weight(RNG, *x_shape)
    np.testing.assert_allclose(run(mod, x), onnx_runtime(model, x), **CLOSE)


CONV = {"w": weight(RNG, 4, 3, 3, 3), "b": weight(RNG, 4)}
ONNX_CONV: dict[str, tuple[Any, ...]] = {
    # id: (nodes, weights, x shape, y shape, kernel, stride, padding, groups)
    "plain": ([node("Conv", "x w", "y")], {"w": CONV["w"]}, (2, 3, 9, 8), (2, 4, 7, 6), (3, 3), (1, 1), (0, 0, 0, 0), 1),
    "bias_asymmetric_dilated": (
        [node("Conv", "x w b", "y", pads=[1, 0, 0, 2], dilations=[2, 1])],
        CONV, (1, 3, 9, 8), (1, 4, 6, 8), (3, 3), (1, 1), (1, 0, 0, 2), 1,
    ),
    "same_upper": (
        [node("Conv", "x w b", "y", auto_pad="SAME_UPPER", strides=[2, 2])],
        CONV, ("N", 3, 8, 9), ("N", 4, 4, 5), (3, 3), (2, 2), (0, 1, 1, 1), 1,
    ),
    "same_lower": (
        [node("Conv", "x w", "y", auto_pad="SAME_LOWER", strides=[2, 1])],
        {"w": CONV["w"]}, (2, 3, 8, 9), (2, 4, 4, 9), (3, 3), (2, 1), (1, 1, 0, 1), 1,
    ),
    "explicit_pad": (
        [node("Pad", "x p", "h"), node("Conv", "h w", "y", pads=[0, 1, 0, 0])],
        {"w": CONV["w"], "p": np.array([0, 0, 1, 2, 0, 0, 0, 1])}, (1, 3, 9, 8), (1, 4, 8, 10), (3, 3), (1, 1), (1, 3, 0, 1), 1,
    ),
    "one_by_one": (
        [node("Conv", "x w b", "y")],
        {"w": weight(RNG, 7, 3, 1, 1), "b": weight(RNG, 7)}, (2, 3, 5, 6), (2, 7, 5, 6), (1, 1), (1, 1), (0, 0, 0, 0), 1,
    ),
    "grouped": (
        [node("Conv", "x w b", "y", group=3, pads=[1, 1, 1, 1])],
        {"w": weight(RNG, 6, 2, 3, 3), "b": B6}, (2, 6, 5, 7), (2, 6, 5, 7), (3, 3), (1, 1), (1, 1, 1, 1), 3,
    ),
    "depthwise": (
        [node("Conv", "x w", "y", group=6, strides=[1, 2])],
        {"w": weight(RNG, 6, 1, 2, 3)}, (1, 6, 5, 7), (1, 6, 4, 3), (2, 3), (1, 2), (0, 0, 0, 0), 6,
    ),
    "one_dimensional": (
        [node("Conv", "x w b", "y", pads=[1, 2], strides=[2], dilations=[2])],
        {"w": weight(RNG, 6, 3, 3), "b": B6}, (2, 3, 9), (2, 6, 4), (1, 3), (1, 2), (0, 1, 0, 2), 1,
    ),
    "one_dimensional_same": (
        [node("Conv", "x w", "y", auto_pad="SAME_LOWER", group=3)],
        {"w": weight(RNG, 6, 1, 4)}, (1, 3, 9), (1, 6, 9), (1, 4), (1, 1), (0, 2, 0, 1), 3,
    ),
    "scaled_weight": (
        [node("Mul", "w g", "v"), node("Conv", "x v", "y")],
        {"w": CONV["w"], "g": weight(RNG, 4, 1, 1, 1)}, (1, 3, 4, 4), (1, 4, 2, 2), (3, 3), (1, 1), (0, 0, 0, 0), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ONNX_CONV)
def test_onnx_spellings_of_convolution(case: str) -> None:
    nodes, weights, x_shape, y_shape, kernel, stride, padding, groups = ONNX_CONV[case]
    model = onnx_model(nodes, weights, x_shape, y_shape)
    mod = canonical(model)
    call = only_call(mod)
    assert (call.op, call.layer) == ("conv2d", "w")
    assert call.conv is not None
    assert (call.conv.kernel, call.conv.stride, call.conv.padding, call.conv.groups) == (kernel, stride, padding, groups)
    x = weight(RNG, *(2 if extent == "N" else extent for extent in x_shape))
    np.testing.assert_allclose(run(mod, x), onnx_runtime(model, x), **CLOSE)


# -- torch ----------------------------------------------------------------------------------------------------


def check_torch(net: nn.Module, *inputs: torch.Tensor, names: list[str] | None = None, **options: Any) -> tvm.IRModule:
    net = net.eval()
    mod = canonical(torch.export.export(net, inputs, **options))
    if names is not None:
        assert list(find_layers(mod)) == names
    with torch.no_grad():
        expected = net(*inputs)
    found = run(mod, *inputs)
    for mine, theirs in zip(
        found if isinstance(found, list) else [found], expected if isinstance(expected, tuple) else [expected], strict=True
    ):
        np.testing.assert_allclose(mine, theirs.numpy(), **CLOSE)
    return mod


class Products(nn.Module):
    """Every way to multiply by a matrix in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterDict({name: nn.Parameter(torch.randn(6, 5)) for name in "abcdefg"})
        self.stack = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        w, rows = self.w, x[:, 0]
        return (
            F.linear(x, w["a"]),
            x @ w["b"].T,
            torch.matmul(w["c"], rows.T),
            torch.addmm(torch.ones(6), rows, w["d"].t(), alpha=0.5, beta=2.0),
            torch.einsum("bti,oi->bto", x, w["e"]),
            F.linear(x[0, 0], w["f"]),
            torch.bmm(x, w["g"].T[None].expand(2, 5, 6)),
            torch.einsum("bti,hio->btho", x, self.stack),
        )


def test_torch_spellings_of_dense() -> None:
    torch.manual_seed(0)
    mod = check_torch(Products(), torch.randn(2, 3, 5))
    assert sorted(find_layers(mod)) == ["stack", *(f"w.{name}" for name in "abcdefg")]
    assert "relax.matmul" not in operators(mod)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv1d(4, 8, 3, padding=2, groups=2, dilation=2)
        self.c2 = nn.Conv2d(8, 8, (3, 2), padding="same", groups=8)
        self.c3 = nn.Conv2d(8, 12, 1, stride=(1, 2), bias=False)
        self.c4 = nn.Conv2d(12, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c4(F.pad(self.c3(self.c2(self.c1(x).reshape(-1, 8, 5, 2))), (1, 1, 0, 2)))


def test_torch_spellings_of_convolution() -> None:
    torch.manual_seed(0)
    mod = check_torch(Convolutions(), torch.randn(3, 4, 10), names=[f"c{i}.weight" for i in (1, 2, 3, 4)])
    assert "relax.nn.pad" not in operators(mod)


def test_attention_scores_stay_while_projections_become_layers() -> None:
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.inner(x, y, y)[0]

    mod = check_torch(Attention(), torch.randn(2, 3, 8), torch.randn(2, 5, 8))
    assert operators(mod).count("relax.matmul") == 2  # scores, and scores times values
    assert {name.partition("[")[0] for name in find_layers(mod)} == {"inner.in_proj_weight", "inner.out_proj.weight"}


def test_a_reparametrised_weight_is_named_by_its_largest_parameter() -> None:
    torch.manual_seed(0)
    net = nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))
    (call,) = [c for calls in find_calls(check_torch(net, torch.randn(2, 5))).values() for c in calls]
    assert call.layer == "parametrizations.weight.original1"
    np.testing.assert_allclose(call.to_layer().weight, net.weight.detach().numpy(), rtol=1e-6)


def test_a_symbolic_batch_stays_symbolic() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5)).eval()
    batch = torch.export.Dim("batch", min=1)
    mod = check_torch(net, torch.randn(3, 3, 4, 4), dynamic_shapes=({0: batch},), names=["0.weight", "2.weight"])
    x = torch.randn(7, 3, 4, 4)
    np.testing.assert_allclose(run(mod, x), net(x).detach().numpy(), **CLOSE)


# -- names ------------------------------------------------------------------------------------------------------


def matmul_by(emit: Any, x: Any, w: np.ndarray) -> Any:
    return emit(relax.op.matmul(x, const(w)))


def test_one_weight_used_twice_is_one_layer_with_one_constant() -> None:
    shared = const(weight(RNG, 5, 5))

    def body(emit: Any, x: Any) -> Any:
        return relax.op.matmul(emit(relax.op.matmul(x, shared)), shared)

    mod = CanonicalizeLayers()(relax_main(body, (3, 5)))
    ((name, calls),) = find_calls(mod).items()
    assert name == "constant_0"
    assert len(calls) == 2
    assert calls[0].factors[0].same_as(calls[1].factors[0])


def test_other_forms_of_one_parameter_get_numbers() -> None:
    w = nn.Parameter(torch.randn(5, 5))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = w

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x @ self.w @ self.w.T  # another matrix
            y = y @ (2 * self.w) @ self.w  # another one, and the first again
            image = F.conv2d(y[None, None], self.w[None, None])
            return image, F.conv2d(y[None, None], self.w[None, None], stride=2), F.conv2d(y[None, None], self.w[None, None])

    mod = canonical(torch.export.export(Net(), (torch.randn(9, 5),)), fuse=False)
    counts = {name: len(calls) for name, calls in find_calls(mod).items()}
    assert counts == {"w": 2, "w#2": 1, "w#3": 1, "w#4": 2, "w#5": 1}


def test_slices_of_one_parameter_are_told_apart() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(12, 4))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            q, k, v = self.w.chunk(3)
            return F.linear(x, q), F.linear(x, k), F.linear(x, v), F.linear(x, self.w[:4]), F.linear(x, self.w[3:7])

    mod = canonical(torch.export.export(Net(), (torch.randn(2, 4),)))
    assert {name: len(calls) for name, calls in find_calls(mod).items()} == {"w[0]": 2, "w[1]": 1, "w[2]": 1, "w[3:7]": 1}


def test_nameless_constants_are_numbered_by_first_use_and_equal_ones_are_one() -> None:
    first, second = weight(RNG, 5, 5), weight(RNG, 5, 5)

    def body(emit: Any, x: Any) -> Any:
        return matmul_by(emit, matmul_by(emit, matmul_by(emit, x, second), first), second.copy())

    calls = find_calls(CanonicalizeLayers()(relax_main(body, (3, 5))))
    assert {name: len(uses) for name, uses in calls.items()} == {"constant_0": 2, "constant_1": 1}
    assert np.array_equal(calls["constant_0"][0].to_layer().weight, second.T)


def test_tied_parameters_go_by_the_name_of_the_first() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner, self.out = (nn.Linear(5, 5, bias=False) for _ in range(3))
            self.out.weight = self.embed.weight
            self.inner.weight.data = self.embed.weight.data.clone()  # equal, but its own parameter

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.inner(self.embed(x)))

    mod = canonical(torch.export.export(Tied(), (torch.randn(2, 5),)))
    assert {name: len(calls) for name, calls in find_calls(mod).items()} == {"embed.weight": 2, "inner.weight": 1}


def test_a_layer_never_takes_the_name_of_one_that_is_structured_already() -> None:
    u, v, w = weight(RNG, 6, 2), weight(RNG, 2, 5), weight(RNG, 5, 5)
    given = LayerCall("low_rank", "constant_0", None, (const(u), const(v)), {"shape": (6, 5)})

    def body(emit: Any, x: Any) -> Any:
        return with_input(given, matmul_by(emit, x, w))

    mod = CanonicalizeLayers()(relax_main(body, (3, 5)))
    assert [(name, calls[0].op) for name, calls in find_calls(mod).items()] == [
        ("constant_0#2", "dense"),
        ("constant_0", "low_rank"),
    ]


def test_factors_of_a_structured_layer_become_constants() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((4, 8), "float32"), u: R.Tensor((3, 6), "float32"), v: R.Tensor((3, 8), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                ut = R.permute_dims(u, axes=[1, 0])
                y = R.multiply(x, R.const(1.0, "float32"))
                R.output(y, ut)
            return (y, ut)

    builder = relax.BlockBuilder()
    x, u, v = Before["main"].params
    with builder.function("main", [x, u, v], attrs={"num_input": 1}):
        with builder.dataflow():
            ut = builder.emit(relax.op.permute_dims(u))
            y = builder.emit_output(LayerCall("low_rank", "fc", x, (ut, v), {"shape": (6, 8)}).to_relax())
        builder.emit_func_output(y)
    values = {"u": weight(RNG, 3, 6), "v": weight(RNG, 3, 8)}
    structure = only_call(CanonicalizeLayers(values)(builder.get())).to_structure()
    np.testing.assert_allclose(structure.dense(), values["u"].T @ values["v"], rtol=1e-5)


# -- what stays as it was -----------------------------------------------------------------------------------------


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
    "symbolic_image": (lambda emit, x: conv(x, const(CONV["w"])), [(1, 3, H, 8)]),
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
        def main(x: R.Tensor((2, 3, 5), "float32"), w: R.Tensor((2, 5, 6), "float32"), unused: R.Tensor((1,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.matmul(x, w)
                R.output(y)
            return y

    w = weight(RNG, 2, 5, 6)
    found = CanonicalizeLayers({"w": w, "unused": np.zeros(1, "f4")})(Before)
    ir.assert_structural_equal(found, relax_main(lambda emit, x: relax.op.matmul(x, const(w)), (2, 3, 5)))


def test_canonicalising_twice_changes_nothing_more() -> None:
    once = canonical(onnx_model(*ONNX_DENSE["gemm_all_attributes"][:4]), fuse=False)
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


# -- errors ---------------------------------------------------------------------------------------------------


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


# -- property: any chain of spellings ------------------------------------------------------------------------------

SPELLINGS = ("right", "permuted", "permuted_default", "left", "scaled", "stack", "einsum", "concat", "split", "factor", "linear")


def spelled(kind: str, emit: Any, x: Any, w: np.ndarray) -> Any:
    """x (rows, in) times w (out, in) transposed, in one of the spellings."""
    op = relax.op
    match kind:
        case "right":
            return op.matmul(x, const(w.T))
        case "permuted":
            return op.matmul(x, emit(op.permute_dims(const(w), [1, 0])))
        case "permuted_default":
            return op.matmul(x, emit(op.permute_dims(const(w))))
        case "left":
            return op.permute_dims(emit(op.matmul(const(w), emit(op.permute_dims(x)))))
        case "scaled":
            return op.matmul(x, emit(op.multiply(const(w.T / 4), const(4.0))))
        case "stack":
            batch = emit(op.matmul(emit(op.expand_dims(x, 0)), emit(op.expand_dims(const(w.T), 0))))
            return op.squeeze(batch, [0])
        case "einsum":
            return op.einsum((const(w), x), "oi,bi->bo")
        case "concat":
            return op.matmul(x, emit(op.concat([const(w.T[:1]), const(w.T[1:])], axis=0)))
        case "split":
            both = emit(op.split(const(np.concatenate([w.T, w.T + 1], axis=1)), 2, axis=1))
            return op.matmul(x, emit(relax.TupleGetItem(both, 0)))
        case "factor":
            return op.matmul(emit(op.multiply(const(0.5), x)), const(w.T * 2))
        case "linear":
            return op.linear(x, const(w))
    raise ValueError(kind)


@settings(deadline=None, max_examples=25)
@given(
    kinds=st.lists(st.sampled_from(SPELLINGS), min_size=1, max_size=4),
    widths=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    rows=st.sampled_from([1, 3, "n"]),
    seed=st.integers(0, 1000),
)
def test_any_chain_of_spellings_keeps_its_meaning(kinds: list[str], widths: list[int], rows: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = ["right" if kind == "concat" and widths[i] < 2 else kind for i, kind in enumerate(kinds)]
    weights = [weight(rng, widths[i + 1], widths[i]) for i in range(len(kinds))]

    def body(emit: Any, x: Any) -> Any:
        for kind, w in zip(kinds, weights, strict=True):
            x = emit(spelled(kind, emit, x, w))
        return x

    mod = canonical(relax_main(body, (tvm.tirx.Var("n", "int64") if rows == "n" else rows, widths[0])))
    assert {"relax.matmul", "relax.einsum", "relax.multiply"}.isdisjoint(operators(mod))
    x = expected = weight(rng, 3 if rows == "n" else rows, widths[0])
    for w in weights:
        expected = expected.astype(np.float64) @ w.T.astype(np.float64)
    np.testing.assert_allclose(run(mod, x), expected, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(expected).max()))


def test_imported_values_are_not_changed() -> None:
    imported = import_model(onnx_model(*ONNX_DENSE["computed_weight"][:4]))
    before = {name: value.copy() for name, value in imported.params.items()}
    canonicalized(imported)
    assert all(np.array_equal(before[name], value) for name, value in imported.params.items())


def test_a_factor_of_the_input_becomes_the_scale() -> None:
    mod = CanonicalizeLayers()(relax_main(lambda emit, x: relax.op.matmul(emit(relax.op.multiply(x, const(0.25))), const(W56)), (3, 5)))
    call = only_call(mod)
    assert call.epilogue == Epilogue(scale=True)
    assert np.array_equal(call.operands[0].value.numpy(), np.full(6, 0.25, "f4"))
