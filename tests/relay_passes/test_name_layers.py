"""A layer is called after its parameter; every other form of that parameter gets a name of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from graph_harness import (
    canonical,
    const,
    only_call,
    relax_main,
    weight,
    with_input,
)
from torch import nn
from torch.nn import functional as F
from tvm import relax

from tvm_structured import dialect
from tvm_structured.dialect import LayerCall
from tvm_structured.relay_passes.canonicalize_layers import CanonicalizeLayers
from tvm_structured.relay_passes.find_layers import find_calls

# torch's own export and serialisation code warns of its own deprecations
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

RNG = np.random.default_rng(0)
dialect.register()


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
            return (
                image,
                F.conv2d(y[None, None], self.w[None, None], stride=2),
                F.conv2d(y[None, None], self.w[None, None]),
            )

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
    assert {name: len(calls) for name, calls in find_calls(mod).items()} == {
        "w[0]": 2,
        "w[1]": 1,
        "w[2]": 1,
        "w[3:7]": 1,
    }


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
    shapes = {"x": (4, 8), "u": (3, 6), "v": (3, 8)}
    x, u, v = (relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in shapes.items())
    builder = relax.BlockBuilder()
    with builder.function("main", [x, u, v], attrs={"num_input": 1}):
        with builder.dataflow():
            ut = builder.emit(relax.op.permute_dims(u))
            y = builder.emit_output(LayerCall("low_rank", "fc", x, (ut, v), {"shape": (6, 8)}).to_relax())
        builder.emit_func_output(y)
    values = {"u": weight(RNG, 3, 6), "v": weight(RNG, 3, 8)}
    structure = only_call(CanonicalizeLayers(values)(builder.get())).to_structure()
    np.testing.assert_allclose(structure.dense(), values["u"].T @ values["v"], rtol=1e-5)
