"""Recurrent networks: their steps are unrolled, and the weights of the gates are layers like others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tvm_structured as ts
from tvm_structured import relay
from tvm_structured.frontend import export
from tvm_structured.structures.block_circulant import BlockCirculant

STEPS = 5


class Scores(torch.nn.Module):
    """A network that reads a sequence, and scores of its last state."""

    def __init__(self, recurrent: torch.nn.RNNBase) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.scores = torch.nn.Linear(recurrent.hidden_size * (1 + recurrent.bidirectional), 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(0, 1) if not self.recurrent.batch_first else x
        states = self.recurrent(x)[0]
        return self.scores(states[:, -1] if self.recurrent.batch_first else states[-1])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "recurrent",
    [
        torch.nn.LSTM(7, 20, batch_first=True),
        torch.nn.LSTM(7, 20, 2, bidirectional=True, bias=False),
        torch.nn.GRU(7, 20, 2, batch_first=True),
        torch.nn.RNN(7, 20, bidirectional=True),
    ],
    ids=lambda module: f"{type(module).__name__}-{module.num_layers}",
)
def test_recurrent_networks_give_the_models_values(recurrent: torch.nn.RNNBase, batch: int) -> None:
    model, x = Scores(recurrent).eval(), torch.randn(batch, STEPS, 7)
    compiled = ts.compile(model, (x,), measure=False)
    torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-5, atol=1e-6)
    layers = {row.layer for row in compiled.report().rows}
    assert {name for name, weight in model.named_parameters() if weight.ndim == 2} == layers


def test_the_gates_of_a_recurrent_layer_are_one_structured_layer() -> None:
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(32, 48, batch_first=True)
    for weight in (lstm.weight_ih_l0, lstm.weight_hh_l0):
        blocks = torch.randn(weight.shape[0] // 8, weight.shape[1] // 8, 8).numpy() / np.sqrt(weight.shape[1])
        dense = BlockCirculant(tuple(weight.shape), 1, blocks.astype(np.float32)).dense()
        weight.data.copy_(torch.as_tensor(dense))
    model, x = Scores(lstm).eval(), torch.randn(1, STEPS, 32)
    compiled = ts.compile(model, (x,), measure=False)
    rows = {row.layer: row for row in compiled.report().rows}
    assert rows["recurrent.weight_ih_l0"].structure == rows["recurrent.weight_hh_l0"].structure == "block_circulant"
    torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-5, atol=1e-6)


def test_a_long_sequence() -> None:
    model, x = Scores(torch.nn.LSTM(16, 32, batch_first=True)).eval(), torch.randn(1, 40, 16)
    torch.testing.assert_close(ts.compile(model, (x,), measure=False)(x), model(x).detach(), rtol=1e-5, atol=1e-6)


def test_recurrent_networks_come_through_the_door_for_relay() -> None:
    model, x = Scores(torch.nn.GRU(7, 20, batch_first=True)).eval(), torch.randn(2, STEPS, 7)
    mod, params = relay.frontend.from_pytorch(export(model, (x,)), [("x", tuple(x.shape))])
    with ts.options(measure=False):
        module: Any = relay.GraphModule(relay.build(mod, "host", params=params)["default"](ts.relay.tvm.cpu()))
    module.run(x=x.numpy())
    np.testing.assert_allclose(module.get_output(0).numpy(), model(x).detach().numpy(), rtol=1e-5, atol=1e-6)
