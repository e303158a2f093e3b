"""Kernels of a lowered module know the layer they are called for."""

from __future__ import annotations

import torch
from torch import nn

from tvm_structured.compiler import canonicalize, settle_plan
from tvm_structured.frontend import import_model
from tvm_structured.planning import Plan, Requested
from tvm_structured.relay_passes.find_layers import find_layers
from tvm_structured.relay_passes.mark_layers import kernel_calls
from tvm_structured.relay_passes.pipeline import structured_pipeline
from tvm_structured.targets import resolve_target


def lowered_calls(model: nn.Module, x: torch.Tensor, choices: dict[str, Requested]) -> list[tuple[str, str]]:
    target = resolve_target("host")
    mod = canonicalize(import_model(model.eval(), (x,)))
    plan = settle_plan(mod, target, plan=Plan(choices))
    with target:
        return kernel_calls(structured_pipeline({name: plan.choices[name] for name in find_layers(mod)}, target)(mod))


def test_every_kernel_of_a_layer_has_its_name_and_other_operators_have_none() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Softmax(1))
    calls = lowered_calls(model, torch.randn(1, 4, 8, 8), {"2.weight": Requested("tensor_train")})
    assert [layer for _, layer in calls] == ["0.weight", "", "2.weight", "2.weight", "2.weight", ""]
    assert [symbol for symbol, layer in calls if layer == "2.weight"] == ["patches", "tensor_train", "rows_to_image"]


def test_layers_of_one_shape_share_a_kernel_and_keep_their_names() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    calls = lowered_calls(model, torch.randn(2, 16), {})
    assert [layer for _, layer in calls] == ["0.weight", "1.weight", "2.weight"]
    assert len({symbol for symbol, _ in calls}) == 1


def test_leading_dimensions_and_residuals_keep_the_name() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.dense(torch.tanh(x))

    calls = lowered_calls(Block(), torch.randn(2, 5, 16), {})
    assert [symbol for symbol, layer in calls if layer == "dense.weight"] == ["dense"]
