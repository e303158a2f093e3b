"""Functions as models have them after fusion: built from Relax operators, for the default schedules' tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.relax import op as R
from tvm.relax import transform
from tvm.script import tirx as T

F32 = "float32"
Spec = tuple[Sequence[Any], str]
Build = Callable[..., Any]  # (BlockBuilder, *inputs) -> expression


def module_of(build: Build, *specs: Spec) -> Any:
    """A fused module that computes build(builder, *inputs)."""
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(shape, dtype)) for i, (shape, dtype) in enumerate(specs)]
    with builder.function("main", inputs):
        with builder.dataflow():
            result = builder.emit_output(builder.emit(build(builder, *inputs)))
        builder.emit_func_output(result)
    passes = ("DecomposeOpsForInference", "LegalizeOps", "AnnotateTIROpPattern", "FoldConstant", "FuseOps", "FuseTIR")
    return tvm.transform.Sequential([getattr(transform, name)() for name in passes])(builder.get())


def functions_of(build: Build, *specs: Spec) -> list[Any]:
    return [func for func in module_of(build, *specs).functions.values() if isinstance(func, tirx.PrimFunc)]


def nodes(root: Any, kind: Any) -> list[Any]:
    """All nodes of a kind in the body of a function or a loop."""
    found: list[Any] = []
    tvm_ffi.structural_walk(root.body, (kind, found.append))
    return found


def loops_of(func: Any, kind: Any) -> list[Any]:
    return [loop for loop in nodes(func, tirx.For) if loop.kind == kind]


# -- what models are made of ----------------------------------------------------------------------------


def attention(b: Any, q: Any, k: Any, v: Any) -> Any:
    scores = b.emit(R.matmul(q, b.emit(R.permute_dims(k, [0, 1, 3, 2]))))
    weights = b.emit(R.nn.softmax(b.emit(R.multiply(scores, relax.const(0.3, F32))), -1))
    return R.permute_dims(b.emit(R.matmul(weights, v)), [0, 2, 1, 3])


def gates(b: Any, x: Any, c: Any) -> Any:
    """An LSTM cell after its matrix products."""
    parts = b.emit(R.split(x, 4, 1))
    i, f, g, o = (b.emit(relax.TupleGetItem(parts, n)) for n in range(4))
    new = b.emit(
        R.add(
            b.emit(R.multiply(b.emit(R.sigmoid(f)), c)),
            b.emit(R.multiply(b.emit(R.sigmoid(i)), b.emit(R.tanh(g)))),
        )
    )
    return R.concat([b.emit(R.multiply(b.emit(R.sigmoid(o)), b.emit(R.tanh(new)))), new], 1)


def conv_bias_relu(**attrs: Any) -> Build:
    def build(b: Any, x: Any, w: Any, bias: Any) -> Any:
        out = int(w.ty.shape.values[0])
        return R.nn.relu(b.emit(R.add(b.emit(R.nn.conv2d(x, w, **attrs)), b.emit(R.reshape(bias, (1, out, 1, 1))))))

    return build


def relu_of(operator: Callable[..., Any]) -> Build:
    return lambda b, *xs: R.nn.relu(b.emit(operator(*xs)))


def of(operator: Callable[..., Any]) -> Build:
    return lambda b, *xs: operator(*xs)


CASES: dict[str, tuple[Build, list[Spec]]] = {
    # rows
    "softmax": (of(lambda x: R.nn.softmax(x, -1)), [((3, 5, 197), F32)]),
    "softmax_large": (of(lambda x: R.nn.softmax(x, -1)), [((2, 40, 300), F32)]),
    "softmax_of_one": (of(lambda x: R.nn.softmax(x, -1)), [((7, 1), F32)]),
    "softmax_columns": (of(lambda x: R.nn.softmax(x, 1)), [((2, 19, 33), F32)]),
    "log_softmax": (of(lambda x: R.nn.log_softmax(x, -1)), [((33, 100), F32)]),
    "layer_norm": (
        of(lambda x, w, b: R.nn.layer_norm(x, w, b, -1)),
        [((2, 17, 100), F32), ((100,), F32), ((100,), F32)],
    ),
    "rms_norm": (of(lambda x, w: R.nn.rms_norm(x, w, -1)), [((40, 450), F32), ((450,), F32)]),
    "group_norm": (
        of(lambda x, w, b: R.nn.group_norm(x, w, b, 4, 1, [2, 3])),
        [((2, 12, 7, 9), F32), ((12,), F32), ((12,), F32)],
    ),
    "mean_of_images": (of(lambda x: R.mean(x, [2, 3])), [((3, 70, 7, 7), F32)]),
    "sum_of_all": (relu_of(lambda x: R.sum(x)), [((31, 49), F32)]),
    "max_of_rows": (of(lambda x: R.max(x, -1, keepdims=True)), [((65, 300), F32)]),
    "argmax": (of(lambda x: R.argmax(x, -1)), [((13, 49), F32)]),
    "argmin_large": (of(lambda x: R.argmin(x, -1)), [((60, 1000), F32)]),
    "sum_of_integers": (of(lambda x: R.sum(x, 1)), [((9, 100), "int64")]),
    "sum_of_halves": (of(lambda x: R.sum(x, 1)), [((9, 100), "float16")]),
    # columns
    "mean_of_tokens": (of(lambda x: R.mean(x, 1)), [((4, 19, 200), F32)]),
    "sum_of_few_columns": (of(lambda x: R.sum(x, 0)), [((100, 3), F32)]),
    "variance_of_columns": (of(lambda x: R.variance(x, 0)), [((100, 65), F32)]),
    # windows
    "max_pool": (of(lambda x: R.nn.max_pool2d(x, 3, 2, 1)), [((2, 9, 33, 35), F32)]),
    "avg_pool": (of(lambda x: R.nn.avg_pool2d(x, 3, 1, 1, count_include_pad=False)), [((1, 5, 14, 17), F32)]),
    "pool_ceil": (of(lambda x: R.nn.max_pool2d(x, (2, 3), 2, 0, 1, True)), [((1, 3, 9, 15), F32)]),
    "adaptive_pool": (of(lambda x: R.nn.adaptive_avg_pool2d(x, 3)), [((1, 8, 14, 13), F32)]),
    "depthwise": (
        conv_bias_relu(padding=1, groups=17, strides=2),
        [((1, 17, 28, 31), F32), ((17, 1, 3, 3), F32), ((17,), F32)],
    ),
    # products
    "attention": (attention, [((2, 3, 17, 20), F32), ((2, 3, 33, 20), F32), ((2, 3, 33, 20), F32)]),
    "matmul": (relu_of(R.matmul), [((100, 70), F32), ((70, 130), F32)]),
    "matmul_thin": (relu_of(R.matmul), [((3, 70), F32), ((70, 5), F32)]),
    "matmul_broadcast": (relu_of(R.matmul), [((3, 2, 19, 40), F32), ((40, 64), F32)]),
    "matmul_vector": (of(R.matmul), [((1, 300), F32), ((300, 77), F32)]),
    "product_of_rows": (of(lambda x, y: R.einsum((x, y), "bik,bjk->bij")), [((2, 17, 64), F32), ((2, 33, 64), F32)]),
    "conv_grouped": (
        conv_bias_relu(padding=1, groups=2, strides=1),
        [((2, 6, 11, 35), F32), ((10, 3, 3, 3), F32), ((10,), F32)],
    ),
    "conv_strided": (
        conv_bias_relu(padding=2, groups=4, strides=2, dilation=2),
        [((1, 8, 28, 29), F32), ((16, 2, 3, 3), F32), ((16,), F32)],
    ),
    "conv_1d": (of(lambda x, w: R.nn.conv1d(x, w, 2, 1)), [((2, 5, 100), F32), ((24, 5, 4), F32)]),
    "conv_3d": (of(lambda x, w: R.nn.conv3d(x, w, 1, 1)), [((1, 3, 6, 8, 17), F32), ((6, 3, 3, 3, 3), F32)]),
    "conv_transposed": (
        relu_of(lambda x, w: R.nn.conv2d_transpose(x, w, 2)),
        [((1, 8, 5, 14), F32), ((8, 9, 4, 4), F32)],
    ),
    # elements
    "gelu": (of(R.nn.gelu), [((197, 100), F32)]),
    "gates": (gates, [((9, 4 * 33), F32), ((9, 33), F32)]),
    "transpose": (of(lambda x: R.permute_dims(x, [0, 2, 1])), [((2, 100, 97), F32)]),
    "images_to_pixels": (of(lambda x: R.permute_dims(x, [0, 2, 3, 1])), [((1, 33, 20, 21), F32)]),
    "split_heads": (
        lambda b, x: R.permute_dims(b.emit(R.reshape(x, (2, 33, 3, 20))), [0, 2, 1, 3]),
        [((2, 33, 60), F32)],
    ),
    "concat": (relu_of(lambda x, y: R.concat([x, y], 1)), [((2, 19, 33), F32), ((2, 5, 33), F32)]),
    "concat_last": (relu_of(lambda x, y: R.concat([x, y], -1)), [((100, 7), F32), ((100, 201), F32)]),
    "pad": (of(lambda x: R.nn.pad(x, [0, 0, 1, 2, 2, 0])), [((3, 40, 200), F32)]),
    "slices": (of(lambda x: R.strided_slice(x, [1], [1], [200], [3])), [((90, 200), F32)]),
    "take": (of(lambda w, i: R.take(w, i, 0)), [((2, 33), F32), ((64,), "int64")]),
    "broadcast": (of(R.add), [((5, 7, 64, 9), F32), ((1, 7, 1, 9), F32)]),
    "where": (lambda b, x, y: R.where(b.emit(R.greater(x, y)), x, y), [((40, 500), F32), ((40, 500), F32)]),
    "to_half": (of(lambda x: R.astype(x, "float16")), [((31, 65), F32)]),
    "doubles": (of(R.exp), [((31, 65), "float64")]),
    "resize": (
        of(lambda x: R.image.resize2d(x, relax.ShapeExpr([16, 34]), layout="NCHW", method="linear")),
        [((1, 3, 8, 17), F32)],
    ),
    "one_number": (relu_of(lambda x: R.add(x, x)), [((), F32)]),
}


@T.prim_func(s_tir=True)
def running_sum(x: T.Buffer((64, 900), "float32"), y: T.Buffer((64, 900), "float32")):
    """A loop by hand inside of a block: each iteration needs the one before."""
    for i in range(64):
        with T.sblock("row"):
            row = T.axis.spatial(64, i)
            T.reads(x[row, 0:900])
            T.writes(y[row, 0:900])
            y[row, 0] = x[row, 0]
            for j in range(899):
                y[row, j + 1] = y[row, j] + x[row, j + 1]
