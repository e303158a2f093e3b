"""What follows a layer becomes part of it, where nothing else reads what lies between, and the numbers stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from graph_harness import (
    CLOSE,
    batch_norm,
    canonical,
    check_fused,
    const,
    fused,
    node,
    only_call,
    onnx_model,
    onnx_runtime,
    operators,
    relax_main,
    run,
    run_on_kernels,
    weight,
)
from graph_samples import B6, CONV, OP, S6, W56, N, conv, dense
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from tvm import ir, relax

from tvm_structured import dialect
from tvm_structured.dialect import LayerCall
from tvm_structured.relay_passes.find_layers import find_calls
from tvm_structured.schedules.base import ConvGeometry, Epilogue

# torch's own export and serialisation code warns of its own deprecations
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

RNG = np.random.default_rng(1)
dialect.register()

# -- Before / Expected ---------------------------------------------------------------------------------------


def test_scale_bias_residual_and_relu_become_one_call() -> None:
    def before(emit: Any, x: Any, r: Any) -> Any:
        y = emit(OP.add(emit(OP.multiply(dense(emit, x), const(S6))), const(B6)))
        return OP.nn.relu(emit(OP.add(r, y)))

    def expected(emit: Any, x: Any, r: Any) -> Any:
        epilogue = Epilogue(scale=True, bias=True, residual=True, activation="relu")
        operands = (const(S6), const(B6), r)
        return LayerCall("dense", "constant_0", x, (const(W56.T),), epilogue=epilogue, operands=operands).to_relax()

    shapes = ((4, 5), (4, 6))
    ir.assert_structural_equal(fused(relax_main(before, *shapes)), relax_main(expected, *shapes))


def test_batch_norm_becomes_scale_and_bias_and_leaves_the_weight() -> None:
    gamma, beta, mean, variance = weight(RNG, 6), weight(RNG, 6), weight(RNG, 6), np.abs(weight(RNG, 6)) + 0.5

    def before(emit: Any, x: Any) -> Any:
        y = emit(OP.add(conv(emit, x), const(B6.reshape(1, 6, 1, 1))))
        normed = OP.nn.batch_norm(y, *map(const, (gamma, beta, mean, variance)), 1, epsilon=1e-3, training=False)
        return relax.TupleGetItem(emit(normed), 0)

    call = only_call(fused(relax_main(before, (N, 3, 8, 8))))
    scale = gamma / np.sqrt(variance.astype(np.float64) + 1e-3)
    assert np.array_equal(call.to_layer().weight, CONV)
    assert call.epilogue == Epilogue(scale=True, bias=True)
    np.testing.assert_allclose(call.operands[0].value.numpy(), scale, rtol=1e-6)
    np.testing.assert_allclose(call.operands[1].value.numpy(), (B6 - mean) * scale + beta, rtol=1e-5)


def test_operations_on_the_batch_normalised_value_go_on_fusing() -> None:
    def body(emit: Any, x: Any, r: Any) -> Any:
        y = emit(relax.TupleGetItem(emit(batch_norm(RNG, conv(emit, x), 6, 1)), 0))
        return OP.nn.relu(emit(OP.add(y, r)))

    mod = check_fused(body, (2, 3, 8, 8), (2, 6, 8, 8))
    assert operators(mod) == ["relax.structured.conv2d"]
    assert only_call(mod).epilogue == Epilogue(True, True, True, "relu")


# -- networks ------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A bottleneck with its projection, in evaluation mode with statistics that are not the initial ones."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(6, 4, 1, 1), (4, 4, 3, 2), (4, 8, 1, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in sizes)
        self.down = nn.Sequential(nn.Conv2d(6, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
        for norm in [*self.norms, self.down[1]]:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self.norms[0](self.convs[0](x)))
        y = F.relu(self.norms[1](self.convs[1](y)))
        return F.relu(self.norms[2](self.convs[2](y)) + self.down(x))


def test_a_residual_block_is_nothing_but_layers() -> None:
    torch.manual_seed(0)
    net, x = Residual().eval(), torch.randn(2, 6, 9, 7)
    mod = canonical(torch.export.export(net, (x,)))
    assert operators(mod) == ["relax.structured.conv2d"] * 4
    calls = {name: call.epilogue for name, (call,) in find_calls(mod).items()}
    assert calls["convs.0.weight"] == Epilogue(True, True, activation="clip", high=6.0)
    assert calls["convs.2.weight"] == Epilogue(True, True, True, "relu")
    np.testing.assert_allclose(run(mod, x), net(x).detach().numpy(), **CLOSE)
    np.testing.assert_allclose(run_on_kernels(mod, x), net(x).detach().numpy(), **CLOSE)


def test_a_transformer_block_keeps_only_attention_norms_and_layers() -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 12, activation="gelu", batch_first=True, dropout=0.0)
    net, x = nn.Sequential(block, nn.Linear(8, 3)).eval(), torch.randn(2, 5, 8)
    mod = canonical(torch.export.export(net, (x,)))
    assert "relax.nn.gelu" not in operators(mod)
    calls = {name: calls[0].epilogue for name, calls in find_calls(mod).items()}
    assert calls["0.linear1.weight"] == Epilogue(bias=True, activation="gelu")
    assert calls["0.linear2.weight"] == Epilogue(bias=True, residual=True)
    np.testing.assert_allclose(run(mod, x), net(x).detach().numpy(), **CLOSE)
    np.testing.assert_allclose(run_on_kernels(mod, x), net(x).detach().numpy(), **CLOSE)


def test_onnx_batch_normalisation_and_unused_statistics() -> None:
    names = ("gamma", "beta", "mean", "variance")
    values = dict(zip(names, (S6, B6, weight(RNG, 6), np.abs(weight(RNG, 6)) + 0.5), strict=True))
    nodes = [
        node("Conv", "x w b", "h", pads=[1, 0, 1, 2]),
        node("BatchNormalization", "h gamma beta mean variance", "n", epsilon=1e-2),
        node("Relu", "n", "y"),
    ]
    model = onnx_model(nodes, {"w": CONV, "b": weight(RNG, 6), **values}, (2, 3, 5, 6), (2, 6, 5, 6))
    mod = canonical(model)
    assert operators(mod) == ["relax.structured.conv2d"]
    x = weight(RNG, 2, 3, 5, 6)
    np.testing.assert_allclose(run(mod, x), onnx_runtime(model, x), **CLOSE)


# -- property: any chain of operations -----------------------------------------------------------------------

CHAIN = (
    "add",
    "add_left",
    "subtract",
    "subtract_from",
    "multiply",
    "divide",
    "negative",
    "relu",
    "clip",
    "bounds",
    "gelu",
)


def in_numpy(kind: str, y: np.ndarray, c: np.ndarray, r: np.ndarray) -> np.ndarray:
    """The same operation in float64."""
    from scipy.special import erf

    match kind:
        case "add" | "add_left":
            return y + c
        case "subtract":
            return y - c
        case "subtract_from":
            return c - y
        case "multiply":
            return y * c
        case "divide":
            return y / (c + 9)
        case "negative":
            return -y
        case "relu":
            return np.maximum(y, 0)
        case "clip":
            return np.clip(y, -0.5, 1)
        case "bounds":
            return np.minimum(np.maximum(y, -0.75), 0.25)
        case "gelu":
            return y * 0.5 * (1 + erf(y / np.sqrt(2)))
        case "residual":
            return y + r
    raise ValueError(kind)


def in_relax(kind: str, emit: Any, y: Any, c: Any, r: Any) -> Any:
    match kind:
        case "add":
            return OP.add(y, c)
        case "add_left":
            return OP.add(c, y)
        case "subtract":
            return OP.subtract(y, c)
        case "subtract_from":
            return OP.subtract(c, y)
        case "multiply":
            return OP.multiply(y, c)
        case "divide":
            return OP.divide(y, emit(OP.add(c, const(9.0))))
        case "negative":
            return OP.negative(y)
        case "relu":
            return OP.nn.relu(y)
        case "clip":
            return OP.clip(y, -0.5, 1)
        case "bounds":
            return OP.minimum(emit(OP.maximum(y, const(-0.75))), const(0.25))
        case "gelu":
            return OP.nn.gelu(y)
        case "residual":
            return OP.add(r, y)
    raise ValueError(kind)


@settings(max_examples=30)
@given(
    kinds=st.lists(st.sampled_from((*CHAIN, "residual")), min_size=1, max_size=7),
    shape=st.sampled_from([(), (2,), (3, 2)]),
    read_at=st.integers(0, 7),
    seed=st.integers(0, 1000),
)
def test_any_chain_of_operations_keeps_its_meaning(
    kinds: list[str], shape: tuple[int, ...], read_at: int, seed: int
) -> None:
    """A second reader of one value in the chain (at `read_at`, if it has that) must see that very value."""
    rng = np.random.default_rng(seed)
    w, x, r = weight(rng, 5, 4), weight(rng, *shape, 5), weight(rng, *shape, 4)
    vectors = [weight(rng, 4) for _ in kinds]

    def body(emit: Any, x: Any, r: Any) -> Any:
        values = [emit(OP.matmul(x, const(w)))]
        for kind, c in zip(kinds, vectors, strict=True):
            values.append(emit(in_relax(kind, emit, values[-1], const(c), r)))
        return relax.Tuple([values[-1], values[min(read_at, len(kinds))]])

    expected = [x.astype(np.float64) @ w]
    for kind, c in zip(kinds, vectors, strict=True):
        expected.append(in_numpy(kind, expected[-1], c.astype(np.float64), r.astype(np.float64)))
    mod = fused(relax_main(body, x.shape, r.shape))
    assert only_call(mod).layer == "constant_0"
    found = run(mod, x, r)
    size = max(1.0, *(np.abs(value).max() for value in expected))  # values cancel along the chain
    np.testing.assert_allclose(found[0], expected[-1], rtol=1e-4, atol=1e-5 * size)
    np.testing.assert_allclose(found[1], expected[min(read_at, len(kinds))], rtol=1e-4, atol=1e-5 * size)


def test_a_structured_layer_of_the_model_itself_takes_the_same_epilogue() -> None:
    u, v = weight(RNG, 6, 2), weight(RNG, 2, 27)
    geometry = ConvGeometry((3, 3))

    def body(emit: Any, x: Any) -> Any:
        given = LayerCall("low_rank", "fc", x, (const(u), const(v)), {"shape": (6, 27)}, conv=geometry)
        return OP.nn.relu(emit(OP.add(emit(given.to_relax()), const(B6.reshape(6, 1, 1)))))

    call = only_call(fused(relax_main(body, (2, 3, 5, 5))))
    assert call.op == "low_rank"
    assert call.epilogue == Epilogue(bias=True, activation="relu")
    assert np.array_equal(call.to_structure().factors["u"], u)
