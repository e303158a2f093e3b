"""Every spelling of attention becomes one kernel between two layers; nothing moves data around it."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import tvm_ffi
from kernel_harness import target_for
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from tvm import ir

import tvm_structured as ts

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
HEADS, DEPTH = 3, 8
WIDTH = HEADS * DEPTH


def kernels(compiled: Any) -> list[str]:
    """Names of the kernels that `main` calls, without the numbers that tell equal names apart.

    The result of a model is not made a view by TVM, so a reshape may be the last.
    """
    names: list[str] = []

    def note(call: Any) -> None:
        name = re.sub(r"_?[0-9]*$", "", call.args[0].name_hint) if is_kernel_call(call) else "reshape"
        if name != "reshape":
            names.append(name)

    tvm_ffi.structural_walk(compiled.mod["main"], (ir.Call, note))
    return names


def is_kernel_call(call: Any) -> bool:
    return isinstance(call.op, ir.Op) and call.op.name == "relax.call_tir"


def compiled(model: Any, *inputs: torch.Tensor) -> Any:
    return ts.compile(model, inputs, target_for(), plan=ts.Plan({}))


def assert_same(result: Any, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(np.asarray(result), expected.detach().numpy(), **CLOSE)


def as_onnx(model: nn.Module, *inputs: torch.Tensor) -> onnx.ModelProto:
    file = io.BytesIO()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # this exporter needs no further package
    torch.onnx.export(model, inputs, file, dynamo=False, opset_version=17)
    return onnx.load_from_string(file.getvalue())


def by_torch(q: Any, k: Any, v: Any) -> Any:
    return scaled_dot_product_attention(q, k, v)


def by_hand(q: Any, k: Any, v: Any) -> Any:
    return ((q @ k.transpose(-2, -1)) / math.sqrt(DEPTH)).softmax(-1) @ v


def scaled_first(q: Any, k: Any, v: Any) -> Any:
    return torch.softmax(torch.matmul(q * DEPTH**-0.5, k.transpose(-2, -1)), dim=-1) @ v


def with_contiguous_heads(q: Any, k: Any, v: Any) -> Any:
    """Batch and heads merged, as code around `torch.bmm` does."""
    b, h, n, d = q.shape
    q, k, v = (x.reshape(b * h, -1, d) for x in (q, k, v))
    return torch.bmm(torch.bmm(q * d**-0.5, k.transpose(1, 2)).softmax(-1), v).view(b, h, n, d)


class Joined(nn.Module):
    """Queries, keys and values from one projection."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        super().__init__()
        self.qkv, self.proj, self.attend = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), attend

    def forward(self, x: Any) -> Any:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, DEPTH).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(b, n, WIDTH))


class Separate(nn.Module):
    """One projection each; keys and values may come from elsewhere."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.attend = attend

    def forward(self, x: Any, y: Any) -> Any:
        heads = [
            layer(z).view(z.shape[0], -1, HEADS, DEPTH).transpose(1, 2)
            for layer, z in ((self.q, x), (self.k, y), (self.v, y))
        ]
        return self.proj(self.attend(*heads).transpose(1, 2).reshape(x.shape[0], -1, WIDTH))


@pytest.mark.parametrize("attend", [by_torch, by_hand, scaled_first, with_contiguous_heads])
@pytest.mark.parametrize("convert", [lambda model, *_: model, as_onnx], ids=["torch", "onnx"])
def test_every_spelling_is_one_kernel(attend: Any, convert: Any) -> None:
    model, x = Joined(attend).eval(), torch.randn(2, 13, WIDTH)
    built = compiled(convert(model, x), x)
    assert kernels(built) == ["dense", "attention", "dense"]
    assert_same(built(x), model(x))


@pytest.mark.parametrize("attend", [by_torch, by_hand])
def test_keys_may_come_from_elsewhere(attend: Any) -> None:
    model, x, y = Separate(attend).eval(), torch.randn(2, 13, WIDTH), torch.randn(2, 21, WIDTH)
    built = compiled(model, x, y)
    assert kernels(built) == ["dense"] * 3 + ["attention", "dense"]
    assert_same(built(x, y), model(x, y))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_torch_multihead_attention_moves_nothing(batch_first: bool, batch: int) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)

        def forward(self, x: Any) -> Any:
            return x + self.attention(x, x, x, need_weights=False)[0]

    model, x = Model().eval(), torch.randn((batch, 7, WIDTH) if batch_first else (7, batch, WIDTH))
    built = compiled(model, x)
    assert kernels(built) == ["dense", "attention", "dense"]
    assert_same(built(x), model(x))


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_encoder_layer_is_layers_norms_and_attention(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 40, activation="gelu", batch_first=True, norm_first=norm_first)
    model, x = layer.eval(), torch.randn(2, 9, WIDTH)
    built = compiled(model, x)
    assert sorted(kernels(built)) == ["attention"] + ["dense"] * 4 + ["layer_norm"] * 2
    assert_same(built(x), model(x))


def masks() -> dict[str, Any]:
    keep = torch.ones(2, 13, dtype=torch.bool)
    keep[1, 5:] = False
    return {
        "causal": {"is_causal": True},
        "keys": {"attn_mask": keep[:, None, None, :]},
        "bias": {"attn_mask": torch.randn(1, HEADS, 13, 13)},
        "nothing_left": {"attn_mask": torch.zeros(13, 13, dtype=torch.bool)},
    }


@pytest.mark.parametrize("name", masks())
def test_masks_are_biases_of_the_kernel(name: str) -> None:
    model = Joined(lambda q, k, v: scaled_dot_product_attention(q, k, v, **masks()[name])).eval()
    if name == "bias":
        torch.manual_seed(0)
        bias = masks()["bias"]
        model.attend = lambda q, k, v: scaled_dot_product_attention(q, k, v, **bias)
    x = torch.randn(2, 13, WIDTH)
    built = compiled(model, x)
    assert "attention" in kernels(built) and "matmul" not in kernels(built)
    assert_same(built(x), model(x))


def test_one_module_serves_every_batch() -> None:
    model, x = Joined(by_torch).eval(), torch.randn(2, 13, WIDTH)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    built = ts.compile(program, target=target_for(), plan=ts.Plan({}))
    assert kernels(built) == ["dense", "attention", "dense"]
    for batch in (1, 2, 5):
        x = torch.randn(batch, 13, WIDTH)
        assert_same(built(x), model(x))


def test_probabilities_that_are_results_are_computed_as_they_stand() -> None:
    class Model(nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            shares = (q @ k.transpose(-2, -1)).softmax(-1)
            return shares @ v, shares

    model, inputs = Model(), [torch.randn(2, 3, 9, 8) for _ in range(3)]
    built = compiled(model, *inputs)
    assert "attention" not in kernels(built)
    for result, expected in zip(built(*inputs), model(*inputs), strict=True):
        assert_same(result, expected)


@pytest.mark.parametrize("axis", [1, 2])
def test_other_softmaxes_are_left_alone(axis: int) -> None:
    class Model(nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return (q @ k.transpose(-2, -1)).softmax(axis) @ v

    model, inputs = Model(), [torch.randn(2, 3, 9, 8) for _ in range(3)]
    built = compiled(model, *inputs)
    assert "attention" not in kernels(built)
    assert_same(built(*inputs), model(*inputs))
