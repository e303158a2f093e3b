"""Bad input: a clear error of ours that names the thing, the value and the way out, and nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tvm_structured as ts

X = torch.zeros(2, 8)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()


def test_unknown_files_and_kinds_are_named(tmp_path: Path) -> None:
    with pytest.raises(ts.ModelError, match=r"none\.onnx: no such file"):
        ts.compile(tmp_path / "none.onnx")
    (tmp_path / "model.h5").write_bytes(b"")
    with pytest.raises(ts.ModelError, match=r"unknown kind of model '\.h5'; give an \.onnx or \.pt2"):
        ts.compile(tmp_path / "model.h5")
    with pytest.raises(ts.ModelError, match="int is not a model"):
        ts.compile(3)


@pytest.mark.parametrize("keep", [0, 1, 50, 0.5, 0.95])
@pytest.mark.filterwarnings("ignore")
def test_a_truncated_onnx_file_is_refused(tmp_path: Path, keep: float) -> None:
    whole = tmp_path / "whole.onnx"
    torch.onnx.export(model(), (X,), str(whole), dynamo=False)
    raw = whole.read_bytes()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(ts.ModelError, match="ONNX"):
        ts.compile(cut)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut"])
def test_a_broken_pt2_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pt2").write_bytes(content)
    with pytest.raises(ts.ModelError, match=r"m\.pt2: not a readable torch\.export file"):
        ts.compile(tmp_path / "m.pt2")


def test_a_pt2_file_works(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(model(), (X,)), tmp_path / "m.pt2")
    torch.testing.assert_close(ts.compile(tmp_path / "m.pt2")(X + 1), model()(X + 1))


def test_a_model_without_constant_weights_compiles_as_it_is() -> None:
    class Product(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x @ y

    x, y = torch.randn(3, 4), torch.randn(4, 5)
    compiled = ts.compile(Product(), inputs=(x, y))
    torch.testing.assert_close(compiled(x, y), x @ y)
    assert not compiled.plan.choices
    with pytest.raises(ts.ModelError, match="no layer"):
        ts.compile(Product(), inputs=(x, y), budget=0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_weights_name_the_layer(value: float) -> None:
    bad = model()
    bad[0].weight.data[3, 2] = value
    with pytest.raises(ts.ModelError, match=r"0\.weight: weight holds 1 NaN or Inf values; repair"):
        ts.compile(bad, inputs=(X,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.bool, torch.float64])
def test_an_input_of_another_type_is_refused_at_run_time(dtype: torch.dtype) -> None:
    compiled = ts.compile(model(), inputs=(X,))
    name = compiled.inputs[0].name
    with pytest.raises(ts.ModelError, match=rf"{name}: got {str(dtype)[6:]}, the model takes float32"):
        compiled(X.to(dtype))


def test_models_in_other_types_work_or_are_refused() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(ts.ModelError, match=r"float64 weights: convert it with model\.float"):
        ts.compile(model().double(), inputs=(x.double(),))
    half = model().half()
    y = ts.compile(half, inputs=(x.half(),))(x.half())
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, half(x.half()), rtol=1e-2, atol=1e-2)

    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(10, 8), nn.Linear(8, 3)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.where(mask[..., None], self.out(self.table(ids)), torch.tensor(0.0))

    ids, mask = torch.tensor([[1, 2, 9]]), torch.tensor([[True, False, True]])
    indexed = Indexed().eval()
    torch.testing.assert_close(ts.compile(indexed, inputs=(ids, mask))(ids, mask), indexed(ids, mask))


@pytest.mark.parametrize("shape", [(2, 9), (3, 8), (8,), (1, 2, 8), (0, 8), (2, 0)])
def test_a_wrong_shape_is_refused_at_run_time(shape: tuple[int, ...]) -> None:
    compiled = ts.compile(model(), inputs=(X,))
    with pytest.raises(ts.ModelError, match=r"got shape .*the model takes .*float32\[2, 8\]"):
        compiled(torch.zeros(shape))


def test_empty_dimensions_are_refused_when_compiling() -> None:
    with pytest.raises(ts.ModelError, match=r"shape .*0.* empty"):
        ts.compile(model(), inputs=(torch.zeros(0, 8),))


def test_plans_of_other_models_and_plans_that_are_none(tmp_path: Path) -> None:
    other = ts.compile(nn.Sequential(nn.Conv2d(3, 4, 1)), inputs=(torch.zeros(1, 3, 4, 4),))
    with pytest.raises(ts.PlanError, match=r"0\.weight"):
        ts.compile(
            model(),
            inputs=(X,),
            plan=ts.Plan({"0.weight": other.plan.choices["0.weight"], "x": other.plan.choices["0.weight"]}),
        )
    (tmp_path / "plan.json").write_text("no json")
    with pytest.raises(ts.PlanError, match="not a plan in JSON"):
        ts.compile(model(), inputs=(X,), plan=tmp_path / "plan.json")
    with pytest.raises(ts.PlanError, match="int"):
        ts.compile(model(), inputs=(X,), plan=3)


def test_a_plan_and_a_budget_together_are_refused() -> None:
    with pytest.raises(ts.ModelError, match="a plan or a budget, not both"):
        ts.compile(model(), inputs=(X,), plan=ts.Plan({}), budget=0.5)


def test_budgets_nobody_can_reach_and_malformed_ones() -> None:
    with pytest.raises(ts.BudgetError, match=r"0\.weight: no structure reaches"):
        ts.compile(model(), inputs=(X,), budget=ts.Budget(max_params=1e-4))
    with pytest.raises(ts.BudgetError, match="'small'"):
        ts.compile(model(), inputs=(X,), budget="small")


def test_targets_that_tvm_does_not_know() -> None:
    with pytest.raises(ts.TargetError, match="'llvn'"):
        ts.compile(model(), inputs=(X,), target="llvn")


def test_a_failed_export_leaves_the_old_file(tmp_path: Path) -> None:
    compiled = ts.compile(model(), inputs=(X,))
    path = tmp_path / "m.so"
    path.write_text("old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))  # no compiler there
        patch.delenv("CXX", raising=False)
        with pytest.raises(ts.ModelError, match="compiler"):
            compiled.export(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.so"]
    with pytest.raises(ts.ModelError, match=r"export to one of \.so"):
        compiled.export(tmp_path / "m.txt")
    with pytest.raises(ts.ModelError, match="no such folder"):
        compiled.export(tmp_path / "nowhere" / "m.so")


def test_loading_what_we_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "m.so").write_bytes(b"\x7fELF but no more")
    for name in ("none.so", "m.so"):
        with pytest.raises(ts.ModelError, match=name):
            ts.load(tmp_path / name)


def test_a_module_without_example_inputs_says_what_is_missing() -> None:
    with pytest.raises(ts.ModelError, match=r"needs example inputs: ts\.compile\(model, inputs=\(x,\)\)"):
        ts.compile(model())
    with pytest.raises(ts.ModelError, match="cannot export"):
        ts.compile(model(), inputs=(torch.zeros(2, 9),))


def test_an_onnx_operator_that_tvm_lacks_is_named(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    node = helper.make_node("Nonsense", ["x"], ["y"], domain="ours")
    graph = helper.make_graph([node], "g", [value("x", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, [1])])
    with pytest.raises(ts.ModelError, match="Nonsense"):
        ts.compile(helper.make_model(graph))
