"""The whole road: models of every kind in, verified modules out."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tvm_structured as ts

RNG = np.random.default_rng(0)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def check(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> ts.Compiled:
    """Compile for this machine and compare with torch."""
    model = model.eval()
    compiled = ts.compile(model, inputs=inputs, target="host", **{"measure": False, **options})
    with torch.no_grad():
        expected = model(*inputs)
    found = compiled(*inputs)
    for mine, theirs in zip(as_list(found), as_list(expected), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    return compiled


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


class Block(nn.Module):
    """ResNet's basic block, with the projection where the size changes."""

    def __init__(self, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        same = stride == 1 and inner == out
        self.down = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(inner, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.down(x))


def resnet() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 24, 7, 2, 3, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        Block(24, 24, 1), Block(24, 40, 2), Block(40, 72, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(72, 10),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics of a trained network, not of a fresh one
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


class Transformer(nn.Module):
    """Two encoder steps that share one set of weights, and an output tied to the input projection."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 96, activation="gelu", batch_first=True)
        self.out = nn.Linear(width, width)
        self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layer(self.layer(self.embed(x))))


def test_a_residual_network_with_batch_norm() -> None:
    torch.manual_seed(0)
    compiled = check(resnet(), torch.randn(2, 3, 61, 53))
    names = {name: choice.name for name, choice in compiled.plan.choices.items()}
    assert names["4.conv1.weight"] == "winograd"
    assert names["0.weight"] == names["5.down.0.weight"] == names["9.weight"] == "dense"


def test_a_vgg_block_keeps_nothing_but_layers_and_pools() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 14 * 14, 100), nn.ReLU(), nn.Dropout(), nn.Linear(100, 10), nn.Softmax(1),
    )  # fmt: skip
    check(model, torch.randn(1, 3, 28, 28))


def test_a_transformer_with_shared_weights_counts_them_once() -> None:
    torch.manual_seed(0)
    compiled = check(Transformer(), torch.randn(2, 7, 48))
    assert len(compiled.plan.choices) == 5, compiled.plan  # embed = out, in_proj, out_proj, linear1, linear2
    row = next(row for row in compiled.report().rows if row.layer == "embed.weight")
    assert row.kind.endswith("x2")


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_multi_layer_perceptron_at_several_batches(batch: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(33, 70), nn.ReLU(), nn.Linear(70, 129), nn.GELU(), nn.Linear(129, 1, bias=False), nn.ReLU6()
    )
    check(model, torch.randn(batch, 33))


def planted(family: str, out: int, inner: int, **size: Any) -> np.ndarray:
    layer = ts.Dense("w", RNG.standard_normal((out, inner)).astype(np.float32))
    return ts.STRUCTURES[family].from_dense(layer, **size).dense()


PLANTED = [
    ("block_circulant", 60, 100, {"block": 5}),
    ("block_circulant", 96, 84, {"block": 12}),
    ("block_circulant", 50, 70, {"block": 8}),
    ("permuted_diagonal", 120, 80, {"block": 10}),
    ("permuted_diagonal", 64, 96, {"block": 4}),
    ("tensor_train", 256, 400, {"out_modes": (4, 8, 8), "in_modes": (10, 8, 5), "rank": 2}),
    ("tensor_train", 64, 64, {"out_modes": (4, 4, 4), "in_modes": (4, 4, 4), "rank": 3}),
    ("low_rank", 77, 91, {"rank": 3}),
]


@pytest.mark.parametrize(("family", "out", "inner", "size"), PLANTED, ids=lambda v: str(v))
@pytest.mark.parametrize("batch", [1, 20])
def test_planted_structure_survives_the_whole_road(
    family: str, out: int, inner: int, size: dict, batch: int, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(inner, out), nn.ReLU(), nn.Linear(out, 7))
    model[0].weight.data = torch.from_numpy(planted(family, out, inner, **size))
    x = torch.randn(batch, inner)
    compiled = check(model, x)
    assert compiled.plan.choices["0.weight"].name == family
    assert compiled.plan.notes["0.weight"].error < 1e-5
    loaded = ts.load(compiled.export(tmp_path / "model.so"))
    assert torch.equal(loaded(x), compiled(x))


@pytest.mark.parametrize("family", ["block_circulant", "permuted_diagonal", "low_rank", "tensor_train"])
def test_planted_structure_in_a_convolution(family: str) -> None:
    structure = ts.STRUCTURES[family]
    layer = ts.Conv2d("w", RNG.standard_normal((64, 32, 3, 3)).astype(np.float32))
    member = structure.from_dense(layer, **next(iter(structure.sizes(layer))))
    model = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU())
    model[0].weight.data = torch.from_numpy(np.ascontiguousarray(layer.with_matrix(member.dense()).weight))
    compiled = check(model, torch.randn(2, 32, 9, 11))
    assert compiled.plan.choices["0.weight"].num_params <= member.num_params
    assert not compiled.plan.choices["0.weight"].is_lossless


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout()).train()
    before = copy.deepcopy(model.state_dict())
    compiled = ts.compile(model, inputs=(torch.randn(4, 8),))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    y = compiled(torch.ones(4, 8))
    model[0].weight.data.zero_()  # the module has its own copy
    assert torch.equal(compiled(torch.ones(4, 8)), y)


def test_several_inputs_and_nested_outputs_keep_their_kind() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.a(x) + self.b(y), self.a(x)

    model, x, y = Two().eval(), torch.randn(3, 5), torch.randn(3, 6)
    compiled = check(model, x, y)
    found = compiled(x.numpy(), y.numpy())
    assert isinstance(found, tuple) and all(isinstance(part, np.ndarray) for part in found)
    by_name = compiled(**{spec.name: value for spec, value in zip(compiled.inputs, (x, y), strict=True)})
    assert torch.equal(by_name[0], compiled(x, y)[0])
    assert torch.equal(compiled(torch.randn(5, 3).T.copy_(x), y)[1], compiled(x, y)[1])


def test_a_dynamic_batch_is_compiled_once_and_serves_all() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)).eval()
    model[0].weight.data = torch.from_numpy(planted("block_circulant", 30, 20, block=5))
    program = torch.export.export(model, (torch.randn(4, 20),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    compiled = ts.compile(program, target="host")
    for batch in (1, 2, 9, 130):
        x = torch.randn(batch, 20)
        torch.testing.assert_close(compiled(x), model(x), **CLOSE)


def test_a_budget_is_kept_and_a_plan_repeats_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)).eval(), torch.randn(5, 64)
    compiled = ts.compile(model, inputs=(x,), target="host", budget=ts.Budget(max_params=0.25))
    assert all(row.params <= 0.25 * row.dense_params for row in compiled.report().rows)
    compiled.plan.save(tmp_path / "plan.json")
    again = ts.compile(model, inputs=(x,), target="host", plan=tmp_path / "plan.json")
    assert torch.equal(again(x), compiled(x))
    weights = {name: torch.from_numpy(choice.dense()) for name, choice in compiled.plan.choices.items()}
    expected = F.linear(F.relu(F.linear(x, weights["0.weight"], model[0].bias)), weights["2.weight"], model[2].bias)
    torch.testing.assert_close(compiled(x), expected, **CLOSE)


def test_the_baseline_target_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    model, x = resnet().eval(), torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(ts.compile(model, inputs=(x,))(x), model(x), **CLOSE)


def test_an_exported_library_needs_only_tvms_runtime(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval(), torch.randn(2, 16)
    compiled = ts.compile(model, inputs=(x,), target="host")
    compiled.export(tmp_path / "m.so")
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "y.npy", compiled(x.numpy()))
    script = (
        "import sys, numpy as np, tvm_structured as ts; folder = sys.argv[1]\n"
        "module = ts.load(folder + '/m.so')\n"
        "assert (module(np.load(folder + '/x.npy')) == np.load(folder + '/y.npy')).all()\n"
        "assert 'torch' not in str(module.report()) and 'tvm.relax' not in sys.modules\n"
        "print(module.report())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env=runtime_only(),
    )
    assert done.returncode == 0, done.stderr
    assert "0.weight" in done.stdout


def runtime_only() -> dict[str, str]:
    import os

    return {**os.environ, "TVM_USE_RUNTIME_LIB": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def onnx_file(path: Path, model: nn.Module, x: torch.Tensor) -> Path:
    torch.onnx.export(model.eval(), (x,), str(path), dynamo=False, input_names=["x"], output_names=["y"])
    return path


@pytest.mark.filterwarnings("ignore")
def test_onnx_files_agree_with_onnx_runtime(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 40, 40)
    path = onnx_file(tmp_path / "resnet.onnx", resnet(), x)
    compiled = ts.compile(str(path), target="host")
    expected = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(compiled(x=x.numpy()), expected, rtol=1e-4, atol=1e-4)


def test_a_relax_module_is_a_model_too() -> None:
    from tvm import relax

    weight = RNG.standard_normal((12, 20)).astype(np.float32)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([3, 20], "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.matmul(x, relax.op.permute_dims(relax.const(weight))))
            out = builder.emit_output(relax.op.nn.relu(y))
        builder.emit_func_output(out)
    compiled = ts.compile(builder.get(), target="host")
    value = RNG.standard_normal((3, 20)).astype(np.float32)
    np.testing.assert_allclose(compiled(value), np.maximum(value @ weight.T, 0), rtol=1e-5, atol=1e-5)
    assert list(compiled.plan.choices) == ["constant_0"]


def test_results_belong_to_the_caller() -> None:
    """Outputs are handed over without a copy: the next run must not write into them."""
    model = nn.Linear(8, 8).eval()
    compiled = ts.compile(model, inputs=(torch.zeros(2, 8),), measure=False)
    first = compiled(np.zeros((2, 8), np.float32))
    kept = first.copy()
    second = compiled(np.ones((2, 8), np.float32))
    np.testing.assert_array_equal(first, kept)
    assert not np.array_equal(first, second)
    first += 1  # writable


def test_torch_inputs_of_every_kind_give_the_same_numbers() -> None:
    """Strided, misaligned, of a subclass, with a gradient or in its own memory as it should be."""
    model = nn.Linear(24, 40).eval()
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    compiled = ts.compile(model, (x,), target="host", measure=False)
    expected = model(x).detach()
    strided = torch.stack((x, x), -1)[..., 0]
    misaligned = torch.zeros(73)[1:].view(3, 24).copy_(x)
    assert not strided.is_contiguous() and misaligned.data_ptr() % 64
    for same in (x, strided, misaligned, nn.Parameter(x.clone()), x.clone().requires_grad_()):
        y = compiled(same)
        assert type(y) is torch.Tensor and not y.requires_grad
        torch.testing.assert_close(y, expected)
    with pytest.raises(ts.ModelError, match="float64"):
        compiled(x.double())
    with pytest.raises(ts.ModelError, match="shape"):
        compiled(x[:2])
    with pytest.raises(ts.ModelError, match="inputs"):
        compiled(x, x)
