"""Plans: chosen from weights and a budget, saved, edited, applied again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tvm_structured as ts
from tvm_structured.planning import Plan, make_plan
from tvm_structured.structures import STRUCTURES, Budget, Conv2d, Dense

RNG = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture
def layers() -> dict[str, Dense]:
    low_rank = random(40, 2) @ random(2, 30)
    return {"a.weight": Dense("a.weight", low_rank), "b.weight": Dense("b.weight", random(24, 40))}


def test_without_a_budget_only_structure_that_is_there_is_used(layers: dict[str, Dense]) -> None:
    plan = make_plan(layers)
    assert {name: choice.name for name, choice in plan.choices.items()} == {"a.weight": "low_rank", "b.weight": "dense"}
    assert plan.notes["a.weight"].error < 1e-6
    np.testing.assert_array_equal(plan.choices["b.weight"].dense(), layers["b.weight"].weight)


def test_a_budget_is_kept_by_every_layer_that_is_not_dense(layers: dict[str, Dense]) -> None:
    plan = make_plan(layers, Budget(max_params=0.3))
    assert plan.choices["b.weight"].name != "dense"
    for name, choice in plan.choices.items():
        assert choice.num_params <= 0.3 * layers[name].num_params
        assert plan.notes[name].error == pytest.approx(choice.error(layers[name]))


def test_a_budget_nobody_can_reach_says_what_the_nearest_miss_needs(layers: dict[str, Dense]) -> None:
    with pytest.raises(ts.BudgetError, match=r"b\.weight: no structure reaches .*the smallest, .* error"):
        make_plan({"b.weight": layers["b.weight"]}, Budget(max_params=1e-6))
    with pytest.raises(ts.BudgetError, match="no structure reaches"):
        make_plan({"b.weight": layers["b.weight"]}, Budget(max_params=0.5, max_error=1e-9))


@pytest.mark.parametrize("bad", [0, -1, 1.5, float("nan"), "half", True])
def test_a_malformed_budget_is_refused_with_its_value(bad: object) -> None:
    with pytest.raises(ts.BudgetError, match="max_params"):
        Budget(max_params=bad)  # type: ignore[arg-type]


def test_a_saved_plan_is_the_same_plan(layers: dict[str, Dense], tmp_path: Path) -> None:
    plan = make_plan(layers, Budget(max_params=0.5))
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json").resolve(layers)
    for name, choice in plan.choices.items():
        assert again.choices[name].name == choice.name
        np.testing.assert_array_equal(again.choices[name].dense(), choice.dense())
        assert again.notes[name] == plan.notes[name]
    assert str(again) == str(plan) and "a.weight" in str(plan)


@pytest.mark.parametrize("family", [name for name, s in STRUCTURES.items() if Dense in s.accepts])
def test_every_structure_survives_saving(family: str, tmp_path: Path) -> None:
    layer = Dense("w", random(36, 64))
    member = STRUCTURES[family].from_dense(layer, **next(iter(STRUCTURES[family].sizes(layer))))
    Plan({"w": member}).save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json").choices["w"]
    assert again.sizes_of == member.sizes_of
    np.testing.assert_array_equal(again.dense(), member.dense())


def edit(path: Path, layer: str, entry: dict | None) -> None:
    document = json.loads(path.read_text())
    if entry is None:
        del document["layers"][layer]
    else:
        document["layers"][layer] = entry
    path.write_text(json.dumps(document))


def test_a_plan_may_be_edited_by_hand(layers: dict[str, Dense], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    make_plan(layers).save(path)
    edit(path, "a.weight", {"structure": "dense"})
    edit(path, "b.weight", {"structure": "low_rank", "size": {"rank": 3}})
    plan = Plan.load(path).resolve(layers)
    assert plan.choices["a.weight"].name == "dense"
    assert plan.choices["b.weight"].describe() == "rank=3"
    edit(path, "b.weight", None)
    assert Plan.load(path).resolve(layers).choices["b.weight"].name == "dense"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"structure": "magic"}, "unknown structure 'magic'; one of dense, "),
        ({"size": {}}, "needs a 'structure'"),
        ({"structure": "low_rank", "size": 3}, "'size' must be an object"),
        ({"structure": "low_rank", "size": {"rnk": 3}}, "size .*malformed.*such as"),
        ({"structure": "low_rank", "size": {"rank": 99}}, "rank 99 is outside"),
        ({"structure": "low_rank", "sizes": {}, "factors": ["u"]}, "do not make a low_rank"),
    ],
)
def test_a_bad_edit_names_the_layer(layers: dict[str, Dense], tmp_path: Path, entry: dict, message: str) -> None:
    path = tmp_path / "plan.json"
    make_plan(layers).save(path)
    edit(path, "a.weight", entry)
    with pytest.raises(ts.StructuredError, match=f"a.weight.*{message}"):
        Plan.load(path).resolve(layers)


@pytest.mark.parametrize("text", ["", "{", "not json", "[]", '{"format": "other"}', "\x00\x01"])
def test_a_foreign_file_is_no_plan(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ts.PlanError, match=r"plan\.json"):
        Plan.load(path)


def test_missing_plan_and_missing_or_truncated_factors_are_named(layers: dict[str, Dense], tmp_path: Path) -> None:
    with pytest.raises(ts.PlanError, match="no such file"):
        Plan.load(tmp_path / "none.json")
    make_plan(layers).save(tmp_path / "plan.json")
    factors = tmp_path / "plan.npz"
    factors.write_bytes(factors.read_bytes()[:100])
    with pytest.raises(ts.PlanError, match=r"plan\.npz: not readable"):
        Plan.load(tmp_path / "plan.json")
    factors.unlink()
    with pytest.raises(ts.PlanError, match=r"plan\.npz: missing"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_for_another_model_is_refused(layers: dict[str, Dense]) -> None:
    plan = make_plan(layers)
    with pytest.raises(ts.PlanError, match=r"names 'a\.weight'.*lacks"):
        plan.resolve({"c": Dense("c", random(4, 4))})
    with pytest.raises(ts.PlanError, match="shape"):
        plan.resolve({**layers, "a.weight": Dense("a.weight", random(8, 8))})
    with pytest.raises(ts.PlanError, match="other weights"):
        plan.resolve({**layers, "a.weight": Dense("a.weight", random(40, 30))})


def test_bad_weights_are_named() -> None:
    nan = random(8, 8)
    nan[1, 2] = np.nan
    with pytest.raises(ts.ModelError, match="w: weight holds 1 NaN or Inf"):
        make_plan({"w": Dense("w", nan)})
    with pytest.raises(ts.ModelError, match="w: weights must be floating point, got int8"):
        make_plan({"w": Dense("w", np.ones((8, 8), np.int8))})


def test_convolutions_are_planned_too() -> None:
    matrix = random(16, 2) @ random(2, 9 * 8)
    conv = Conv2d("conv", np.zeros((16, 8, 3, 3), np.float32), padding=(1, 1, 1, 1), input_hw=(14, 14))
    conv = conv.with_matrix(matrix)
    choice = make_plan({"conv": conv}).choices["conv"]
    assert choice.name == "low_rank"
    np.testing.assert_allclose(conv.with_matrix(choice.dense()).weight, conv.weight, atol=1e-5)
