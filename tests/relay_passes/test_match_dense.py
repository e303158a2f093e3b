"""Spellings of dense that torch and ONNX exporters use, against torch and ONNX Runtime."""

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
    node,
    only_call,
    onnx_model,
    onnx_runtime,
    operators,
    relax_main,
    run,
    weight,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from tvm import relax

from tvm_structured import dialect
from tvm_structured.relay_passes.canonicalize_layers import CanonicalizeLayers
from tvm_structured.relay_passes.find_layers import find_calls, find_layers
from tvm_structured.schedules.base import Epilogue

# torch's own export and serialisation code warns of its own deprecations
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

RNG = np.random.default_rng(0)
dialect.register()


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
    "matmul_rank_five": ([node("MatMul", "x w", "y")], {"w": W56}, (2, 1, 3, 4, 5), (2, 1, 3, 4, 6), ["w"]),
    "matmul_vector": ([node("MatMul", "x w", "y")], {"w": W56}, (5,), (6,), ["w"]),
    "matmul_matrix_times_vector": ([node("MatMul", "w x", "y")], {"w": W65}, (5,), (6,), ["w"]),
    "matmul_stack_of_one": ([node("MatMul", "x w", "y")], {"w": W56[None]}, (2, 3, 5), (2, 3, 6), ["w"]),
    "matmul_stack_adds_ranks": ([node("MatMul", "x w", "y")], {"w": W56[None, None]}, (3, 5), (1, 1, 3, 6), ["w"]),
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
        {"a": weight(RNG, 5, 4), "s": weight(RNG, 5, 1), "b": weight(RNG, 4), "c": weight(RNG, 5, 2),
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


def test_a_factor_of_the_input_becomes_the_scale() -> None:
    mod = CanonicalizeLayers()(
        relax_main(lambda emit, x: relax.op.matmul(emit(relax.op.multiply(x, const(0.25))), const(W56)), (3, 5))
    )
    call = only_call(mod)
    assert call.epilogue == Epilogue(scale=True)
    assert np.array_equal(call.operands[0].value.numpy(), np.full(6, 0.25, "f4"))


# -- property: any chain of spellings ------------------------------------------------------------------------

SPELLINGS = (
    "right",
    "permuted",
    "permuted_default",
    "left",
    "scaled",
    "stack",
    "einsum",
    "concat",
    "split",
    "factor",
    "linear",
)


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


@settings(max_examples=25)
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
