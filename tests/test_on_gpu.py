"""What only a machine with an NVIDIA GPU can show: results there, tensors in place, streams, graphs, files, times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cuda import TOLERANCE, Net, relative

import tvm_structured as ts
from tvm_structured import relay
from tvm_structured.nn import StructuredLinear

pytestmark = pytest.mark.gpu

FORMS: list[tuple[str, dict[str, Any]]] = [
    ("low_rank", {"rank": 16}),
    ("block_circulant", {"block": 8}),
    ("permuted_diagonal", {"block": 4}),
    ("tensor_train", {"out_modes": (8, 6, 4), "in_modes": (8, 8, 4), "rank": 4}),
]


def expected_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.double()(x.double().cpu())


def layer(structure: str, size: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return StructuredLinear(256, 192, structure=structure, **size).eval()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_network_runs_on_the_gpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Net().eval().to(dtype), torch.randn(2, 3, 15, 15).to(dtype)
    compiled = ts.compile(model, inputs=(x,), target="cuda")
    y = compiled(x.cuda())
    assert y.is_cuda and y.dtype == dtype
    on_host = compiled(x)
    assert not on_host.is_cuda and torch.equal(on_host, y.cpu())
    assert relative(y.cpu(), expected_of(model, x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(("structure", "size"), FORMS, ids=[name for name, _ in FORMS])
def test_every_structure_gives_its_result(structure: str, size: dict[str, Any], rows: int, dtype: torch.dtype) -> None:
    model, x = layer(structure, size).to(dtype), torch.randn(rows, 256).to(dtype)
    compiled = ts.compile(model, inputs=(x,), target="cuda")
    assert relative(compiled(x.cuda()).cpu(), expected_of(model, x)) < TOLERANCE[dtype]


def test_numpy_goes_in_and_comes_out() -> None:
    model, x = layer(*FORMS[0]), np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    y = ts.compile(model, inputs=(torch.from_numpy(x),), target="cuda")(x)
    assert isinstance(y, np.ndarray) and relative(y, expected_of(model, torch.from_numpy(x))) < 1e-5


def test_it_runs_on_the_current_stream_and_reads_tensors_in_place() -> None:
    model = layer(*FORMS[1])
    x = torch.zeros(4, 256, device="cuda")
    compiled = ts.compile(model, inputs=(x.cpu(),), target="cuda")
    compiled(x)
    stream, values = torch.cuda.Stream(), torch.randn(4, 256, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # what runs on another stream would read zeros
        x.copy_(values)
        y = compiled(x).clone()
    stream.synchronize()
    assert relative(y.cpu(), expected_of(model, values)) < 1e-5


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_torch_captures_it_and_its_own_graphs_follow_new_inputs(cuda_graph: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(layer(*FORMS[0]) if i % 2 == 0 else torch.nn.Linear(192, 256) for i in range(6)))
    x = torch.randn(2, 256, device="cuda")
    compiled = ts.compile(model.eval(), inputs=(x.cpu(),), target="cuda", cuda_graph=cuda_graph)
    for _ in range(3):
        x = torch.randn(2, 256, device="cuda")
        assert relative(compiled(x).cpu(), expected_of(model, x)) < 1e-5
        model.float()
    if cuda_graph:
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = compiled(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert relative(y.cpu(), expected_of(model, x)) < 1e-5


def test_an_exported_file_runs(tmp_path: Path) -> None:
    model, x = layer(*FORMS[2]), torch.randn(3, 256)
    loaded = ts.load(ts.compile(model, inputs=(x,), target="cuda").export(tmp_path / "layer.so"))
    assert relative(loaded(x.cuda()).cpu(), expected_of(model, x)) < 1e-5
    assert 0 < loaded.time(x.cuda()) < 1


def test_forms_are_measured_and_a_slower_one_is_not_taken() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Linear(2048, 2048), torch.randn(1, 2048)
    note = ts.compile(model, inputs=(x,), target="cuda", budget=0.25).plan.notes["weight"]
    assert note.is_measured and note.seconds <= note.dense_seconds + 1e-6 and "assumed" not in note.reason


def test_relay_build_runs_on_the_gpu() -> None:
    model, x = torch.nn.Linear(24, 16).eval(), torch.randn(2, 24)
    mod, params = relay.frontend.from_pytorch(torch.jit.trace(model, x), [("x", (2, 24))])
    import tvm

    module = relay.GraphModule(relay.build(mod, target="cuda", params=params)["default"](tvm.cuda(0)))
    module.set_input("x", x.numpy())
    module.run()
    assert relative(module.get_output(0).numpy(), expected_of(model, x)) < 1e-5


def test_a_tensor_on_another_device_is_refused() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("ONE GPU ONLY: a tensor on another one cannot be tried")
    model, x = layer(*FORMS[0]), torch.randn(3, 256)
    with pytest.raises(ts.ModelError, match="cuda:0"):
        ts.compile(model, inputs=(x,), target="cuda")(x.to("cuda:1"))
