"""convert: which layers become structured, how near and how small, and what stays as it was."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tvm_structured.errors import BudgetError, ModelError, PlanError
from tvm_structured.nn import Structured, StructuredConv2d, StructuredLinear, convert, convertible_layers, to_dense
from tvm_structured.nn.calibration import input_moments
from tvm_structured.planning import Plan, Requested
from tvm_structured.structures import STRUCTURES, Budget, Unstructured, as_layer


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding="same", dilation=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Flatten(),
        nn.Linear(8 * 36, 24),
        nn.Linear(24, 16, bias=False),
    )


def structured(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, Structured)}


def weight_of(model, path):
    return as_layer(model.get_submodule(path).weight, path)


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
def test_converted_layers_stay_within_their_budget(share):
    model = network()
    twins = structured(convert(model, share))
    assert twins
    for path, twin in twins.items():
        assert twin.to_structure().num_params <= share * weight_of(model, path).num_params


def test_converted_layers_stay_within_the_allowed_error():
    model = network()
    twins = structured(convert(model, Budget(max_error=0.6)))
    assert twins
    for path, twin in twins.items():
        layer = weight_of(model, path)
        assert twin.to_structure().error(layer) <= 0.6
        assert twin.to_structure().num_params < layer.num_params


def test_the_nearest_family_is_chosen():
    model = network()
    twin = convert(model, 0.25).get_submodule("4").to_structure()
    layer = weight_of(model, "4")
    rivals = [family.project(layer, 0.25) for family in STRUCTURES.values() if not family.is_lossless]
    assert twin.error(layer) == pytest.approx(min(rival.error(layer) for rival in rivals if rival), rel=1e-6)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_planted_structure_survives_conversion_exactly(name):
    family = STRUCTURES[name]
    for shape in ((16, 24), (8, 8, 3, 3)):
        layer = as_layer(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
        size = next(iter(family.sizes(layer)), None) if family.takes(layer) else None
        if size is None:
            continue
        plain = nn.Linear(24, 16) if len(shape) == 2 else nn.Conv2d(8, 8, 3, padding=1)
        x = torch.randn(5, 24) if len(shape) == 2 else torch.randn(2, 8, 7, 6)
        planted = layer.with_matrix(family.from_dense(layer, **size).dense())
        with torch.no_grad():
            plain.weight.copy_(torch.from_numpy(planted.weight.copy()))
            twin = convert(plain, {"weight": (name, size)})
            assert isinstance(twin, StructuredLinear | StructuredConv2d)
            torch.testing.assert_close(twin(x), plain(x), rtol=1e-4, atol=1e-5)


def test_choices_name_layers_with_or_without_weight():
    model = network()
    member = STRUCTURES["low_rank"].from_dense(weight_of(model, "5"), rank=3)
    converted = convert(model, {"4.weight": ("low_rank", {"rank": 2}), "5": member})
    assert {path: twin.to_structure().rank for path, twin in structured(converted).items()} == {"4": 2, "5": 3}
    np.testing.assert_array_equal(converted.get_submodule("5").u.detach(), member.u)
    assert converted.get_submodule("5").bias is None
    torch.testing.assert_close(converted.get_submodule("4").bias, model.get_submodule("4").bias)


def test_a_plan_is_taken_by_its_choices():
    model = network()
    layer = weight_of(model, "4")
    plan = SimpleNamespace(
        choices={
            "4.weight": STRUCTURES["low_rank"].from_dense(layer, rank=2),
            "5.weight": Unstructured.from_dense(weight_of(model, "5")),
            "2.weight": Unstructured.from_dense(weight_of(model, "2")),
        }
    )
    assert list(structured(convert(model, plan))) == ["4"]


def test_a_saved_plan_is_taken_with_its_requests(tmp_path):
    model = network()
    member = STRUCTURES["low_rank"].from_dense(weight_of(model, "5"), rank=3)
    plan = Plan(
        {"0.weight": Requested("dense"), "4.weight": Requested("block_circulant", {"block": 8}), "5.weight": member}
    )
    plan.save(tmp_path / "plan.json")
    for given in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        found = structured(convert(model, given))
        assert {path: twin.structure for path, twin in found.items()} == {"4": "block_circulant", "5": "low_rank"}
        assert found["4"].c.shape[-1] == 8
        np.testing.assert_array_equal(found["5"].u.detach(), member.u)


def test_a_plan_for_another_model_is_refused():
    with pytest.raises(PlanError, match="is no convertible layer"):
        convert(network(), Plan({"9.weight": Requested("low_rank", {"rank": 2})}))
    with pytest.raises(PlanError, match="winograd is not defined"):
        convert(network(), Plan({"4.weight": Requested("winograd", {"tile": 2})}))


def correlated_inputs(count=64):
    """Images whose channels are nearly dependent: a weight's error hardly shows in directions that never occur."""
    generator = torch.Generator().manual_seed(5)
    return torch.einsum(
        "nchw,cd->ndhw", torch.randn(count, 2, 8, 8, generator=generator), torch.randn(2, 4, generator=generator)
    )


@pytest.mark.parametrize("name", ["low_rank", "tensor_train", "block_circulant", "permuted_diagonal"])
def test_calibrated_layers_are_nearer_in_their_outputs(name):
    model, x = network(), correlated_inputs()
    size = next(iter(STRUCTURES[name].sizes(weight_of(model, "0"))))
    choices = {"0": (name, dict(size))}
    plain, aware = (convert(model, choices, calibration=data).get_submodule("0") for data in (None, x))
    with torch.no_grad():
        expected = model[0](x)
        gaps = [float((layer(x) - expected).norm()) for layer in (plain, aware)]
        assert plain.to_structure().sizes_of == aware.to_structure().sizes_of
        assert gaps[1] < 0.9 * gaps[0]


def test_moments_are_those_of_the_layers_inputs():
    model, x = network(), correlated_inputs(8)
    moments = input_moments(model, [x[:3], x[3:]], ["0", "5"])
    with torch.no_grad():
        y = model[4](model[:4](x)).double()
        for path, module in (("0", model[0]),):
            layer = as_layer(module.weight)
            weight = torch.from_numpy(layer.matrix.astype(np.float64))
            energy = torch.einsum("ij,jk,ik->", weight, moments[path], weight)
            out = module(x) - module.bias[:, None, None]
            assert float(energy) == pytest.approx(float(out.double().square().sum(1).mean()), rel=1e-5)
    torch.testing.assert_close(moments["5"], y.T @ y / len(y), rtol=1e-5, atol=1e-6)


def test_each_layer_may_have_its_own_budget():
    converted = convert(network(), {"4": 0.1, "5": Budget(max_params=0.5)})
    assert set(structured(converted)) == {"4", "5"}


def test_a_copy_is_converted_unless_in_place():
    model = network()
    before = copy.deepcopy(model.state_dict())
    convert(model, 0.25)
    assert not structured(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert convert(model, 0.25, inplace=True) is model
    assert structured(model)


def test_device_dtype_mode_and_frozenness_are_kept():
    model = network().to(torch.bfloat16).eval()
    model.get_submodule("4").weight.requires_grad_(False)
    twin = convert(model, {"4": ("low_rank", {"rank": 2})}).get_submodule("4")
    assert twin.u.dtype == twin.bias.dtype == torch.bfloat16
    assert not twin.training
    assert not twin.u.requires_grad and twin.bias.requires_grad


def test_same_padding_with_dilation_is_kept():
    model = network()
    rank = min(weight_of(model, "0").matrix.shape)
    twin = convert(model, {"0": ("low_rank", {"rank": rank})})
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_module_used_twice_stays_one_module():
    shared = nn.Linear(12, 12)
    converted = convert(nn.Sequential(shared, nn.ReLU(), shared), 0.5)
    assert isinstance(converted[0], StructuredLinear)
    assert converted[0] is converted[2]


def test_layers_with_a_life_of_their_own_are_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(20, 16)
            self.head = nn.Linear(16, 20)
            self.head.weight = self.embedding.weight
            self.hooked = nn.Linear(16, 16)
            self.hooked.register_forward_hook(lambda module, args, y: y * module.weight.sum())
            self.grouped = nn.Conv2d(4, 4, 3, groups=2)
            self.circular = nn.Conv2d(4, 4, 3, padding_mode="circular", padding=1)
            self.attention = nn.MultiheadAttention(16, 2)
            self.plain = nn.Linear(16, 16)

    assert list(convertible_layers(Tied())) == ["plain.weight"]


@pytest.mark.parametrize("training", [True, False])
def test_a_converted_transformer_layer_runs_in_both_modes(training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).train(training)
    converted = convert(layer, {"linear1": ("low_rank", {"rank": 16}), "linear2": ("low_rank", {"rank": 16})})
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), layer(x), rtol=1e-4, atol=1e-5)


def test_fine_tuning_recovers_what_projection_lost():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(256, 24)
    goal = teacher(x).detach()
    student = convert(teacher, {"0": ("low_rank", {"rank": 6})})
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    losses = []
    for _ in range(100):
        loss = nn.functional.mse_loss(student(x), goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("choices", "error", "says"),
    [
        (1e-6, BudgetError, "no layer of Sequential has a structure within"),
        ("small", BudgetError, "a budget is"),
        ({"9.weight": ("low_rank", {"rank": 2})}, PlanError, "'9.weight' is no convertible layer.*4.weight"),
        ({"2": 0.5}, PlanError, "'2' is no convertible layer"),
        ({"4": ("low_rank", {"rank": 99})}, ModelError, "4.weight: rank 99 is outside"),
        ({"4": ("low_rank", {})}, ModelError, "missing a required argument"),
        ({"4": ("low_rank",)}, PlanError, "4.weight: a choice is"),
    ],
)
def test_impossible_choices_are_refused(choices, error, says):
    with pytest.raises(error, match=says):
        convert(network(), choices)


def test_factors_beyond_the_range_of_a_type_are_refused():
    model = nn.Sequential(nn.Conv2d(12, 16, 3)).half()
    with pytest.raises(ModelError, match=r"cp rank=8 bits=8: scale leaves the range of torch\.float16"):
        convert(model, {"0": ("cp", {"rank": 8, "bits": 8})})
    assert convert(model, {"0": ("cp", {"rank": 8})})[0].scale.dtype == torch.float16


def test_a_member_of_another_shape_is_refused():
    model = network()
    member = STRUCTURES["low_rank"].from_dense(weight_of(model, "5"), rank=2)
    with pytest.raises(ModelError, match=r"4.weight: the low_rank member has shape \(16, 24\)"):
        convert(model, {"4": member})


@pytest.mark.parametrize("padding", [1, (0, 1, 2, 1), "same"])
def test_plain_layers_again_compute_the_same(padding):
    torch.manual_seed(0)
    model = nn.Sequential(
        StructuredConv2d(4, 8, 3, "block_circulant", padding=padding, block=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        StructuredLinear(32, 12, "low_rank", bias=False, rank=3),
        StructuredLinear(12, 5, "low_rank", rank=2),
    ).eval()
    model[4].u.requires_grad_(False)
    plain, x = to_dense(model), torch.randn(3, 4, 7, 6)
    assert structured(model) and not structured(plain)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)
    assert not plain[4].weight.requires_grad and plain[5].weight.requires_grad and not plain.training
    assert plain[4].bias is None
    member = STRUCTURES["low_rank"].detect(plain[5].weight.detach())
    assert member is not None and member.rank == 2
    lone = to_dense(StructuredLinear(8, 6, "low_rank", rank=2))
    assert type(lone) is nn.Linear


def test_a_model_without_layers_is_refused():
    with pytest.raises(ModelError, match=r"no nn\.Linear or nn\.Conv2d layer"):
        convert(nn.ReLU(), 0.5)
