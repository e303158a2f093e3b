"""Operators of torch that TVM's importer gets wrong or does not know, and many that it should get right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_harness import Function
from torch.nn import functional as F

import tvm_structured as ts

X, Y = torch.linspace(-3, 3, 2 * 6 * 8).reshape(2, 6, 8).roll(5, 1), torch.linspace(2, -1, 96).reshape(2, 6, 8)
IMAGE = torch.linspace(-2, 2, 360).sin().reshape(1, 4, 9, 10)


OURS: dict[str, tuple[Any, ...]] = {
    "selu": (F.selu, X),
    "selu of large numbers": (F.selu, 100 * X),
    "elu": (lambda x: F.elu(x, 0.3), X),
    "celu": (lambda x: F.celu(x, 1.3), X),
    "amax": (lambda x: x.amax((-1, 0)), X),
    "amax of all": (lambda x: x.amax(), X),
    "amin": (lambda x: x.amin(1, keepdim=True), X),
    "logsumexp": (lambda x: x.logsumexp(-1), X),
    "prod": (lambda x: x.prod(-1), X),
    "group norm without weights": (lambda x: F.group_norm(x, 2), IMAGE),
    "group norm": (lambda x: F.group_norm(x, 2, torch.arange(4.0), torch.ones(4), 1e-3), IMAGE),
}
THEIRS: dict[str, tuple[Any, ...]] = {
    "argmax": (lambda x: x.argmax(-1), X),
    "cumsum": (lambda x: x.cumsum(-1), X),
    "flip and roll": (lambda x: x.flip(-1).roll(-2, 1), X),
    "negative padding": (lambda x: F.pad(x, (-1, 2)), X),
    "reflected padding": (lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"), IMAGE),
    "masks": (lambda x, y: torch.where(x > y, x, y).masked_fill(x < -1, -1e9).softmax(-1), X, Y),
    "triangles": (lambda x: x.tril(-1) + x.triu(1), X),
    "division": (lambda x, y: torch.remainder(x, 0.7) + torch.fmod(y, 0.7) + (x + 0.01) // 0.3, X, Y),
    "division of integers": (lambda x: torch.div((x * 10).int(), 3, rounding_mode="trunc") + (x * 10).int() % 3, X),
    "activations": (lambda x: F.mish(x) + F.hardswish(x) + F.softplus(10 * x) + F.logsigmoid(x), X),
    "gated": (F.glu, X),
    "products": (lambda x, y: torch.einsum("bij,bkj->bik", x, y) + torch.bmm(x, y.mT), X, Y),
    "attention": (lambda x, y: F.scaled_dot_product_attention(x[None], y[None], x[None], is_causal=True), X, Y),
    "pools": (lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), IMAGE),
    "pools without padding": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), IMAGE),
    "adaptive pool": (lambda x: F.adaptive_avg_pool2d(x, (3, 4)), IMAGE),
    "bilinear": (lambda x: F.interpolate(x, size=(5, 7), mode="bilinear", align_corners=True), IMAGE),
    "transposed convolution": (lambda x: F.conv_transpose2d(x, torch.ones(4, 3, 3, 3), stride=2, padding=1), IMAGE),
    "sorting": (lambda x: x.sort(1, descending=True).values + x.topk(6, 1).values, X),
    "gather": (lambda x: x.gather(-1, x.argsort(-1)), X),
    "normalisation": (lambda x: F.layer_norm(x, (6, 8)) + F.normalize(x, dim=-1) + F.rms_norm(x, (8,)), X),
    "steps": (lambda x: x[:, -4::2, 1:-1:3], X),
}


@pytest.mark.parametrize("name", [*OURS, *THEIRS])
def test_operators_give_what_torch_gives(name: str) -> None:
    function, *inputs = {**OURS, **THEIRS}[name]
    expected = function(*inputs)
    actual = ts.compile(Function(function), tuple(inputs), measure=False)(*inputs)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
