"""The guard: a form is taken because it is faster, and never when it is slower."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tvm_structured as ts
from tvm_structured.compiler import canonicalize, settle_plan
from tvm_structured.cost_store import CostStore
from tvm_structured.detection_store import DetectionStore
from tvm_structured.frontend import import_model
from tvm_structured.guard import SLACK, Cost, candidates
from tvm_structured.planning import make_plan
from tvm_structured.structures import STRUCTURES, Budget, Conv2d, Dense, Layer, Structure
from tvm_structured.targets import resolve_target

RNG = np.random.default_rng(0)
LOW_RANK = Dense("w", (RNG.standard_normal((64, 3)) @ RNG.standard_normal((3, 64))).astype(np.float32))
RANDOM = Dense("w", RNG.standard_normal((64, 64)).astype(np.float32))


def priced(**milliseconds: float):  # type: ignore[no-untyped-def]
    """A price list by structure name; what is not on it costs ten times the dense layer."""

    def price(name: str, structures: Sequence[Structure]) -> list[Cost]:
        return [Cost(milliseconds.get(s.name, 10 * milliseconds["dense"]) * 1e-3, True) for s in structures]

    return price


def test_structure_that_loses_stays_dense_and_the_note_says_by_how_much() -> None:
    plan = make_plan({"w": LOW_RANK}, price=priced(dense=1.0, low_rank=1.3))
    assert plan.choices["w"].name == "dense"
    assert plan.notes["w"].reason == "kept dense: low_rank rank=3 is 1.3x slower"


def test_structure_that_wins_is_taken_with_its_gain() -> None:
    plan = make_plan({"w": LOW_RANK}, price=priced(dense=1.0, low_rank=0.25))
    assert plan.choices["w"].name == "low_rank"
    assert "4.0x faster" in plan.notes["w"].reason
    assert (plan.notes["w"].seconds, plan.notes["w"].dense_seconds) == (0.25e-3, 1e-3)


def test_a_layer_that_the_model_holds_structured_is_expanded_where_dense_is_faster() -> None:
    member = STRUCTURES["low_rank"].from_dense(LOW_RANK, rank=3)
    for seconds, name, reason in (
        (1.3, "dense", "expanded to dense: low_rank rank=3 is 1.3x slower"),
        (0.5, "low_rank", "the model's own structure; 2.0x faster"),
    ):
        plan = ts.Plan({}).with_given({"w": member}, lambda _: LOW_RANK, priced(dense=1.0, low_rank=seconds))
        assert (plan.choices["w"].name, plan.notes["w"].reason) == (name, reason)
        assert (plan.notes["w"].seconds, plan.notes["w"].dense_seconds) == (min(1.0, seconds) * 1e-3, 1e-3)


def test_a_plan_may_expand_a_layer_that_the_model_holds_structured(tmp_path: Path) -> None:
    module = ts.nn.StructuredLinear(24, 16, "low_rank", rank=2).eval()
    x = torch.randn(3, 24)
    for choice, name in ({"structure": "dense"}, "dense"), (None, "low_rank"):
        path = tmp_path / "plan.json"
        ts.compile(module, (x,), measure=False).plan.save(path)
        if choice is not None:
            document = json.loads(path.read_text())
            document["layers"]["weight"] = choice
            path.write_text(json.dumps(document))
        compiled = ts.compile(module, (x,), plan=path)
        assert [row.structure for row in compiled.report().rows] == [name]
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-6)


def test_within_the_noise_of_a_clock_fewer_numbers_win() -> None:
    plan = make_plan({"w": LOW_RANK}, price=priced(dense=0.01, low_rank=0.01 + 0.5e3 * SLACK))
    assert plan.choices["w"].name == "low_rank"


def test_with_a_budget_the_nearest_form_that_wins_is_taken() -> None:
    budget = Budget(max_params=0.25)
    nearest = make_plan({"w": RANDOM}, budget).choices["w"].name
    other = "block_circulant" if nearest != "block_circulant" else "permuted_diagonal"
    assert (
        make_plan({"w": RANDOM}, budget, priced(dense=1.0, **{nearest: 0.9, other: 0.1})).choices["w"].name == nearest
    )
    assert make_plan({"w": RANDOM}, budget, priced(dense=1.0, **{nearest: 1.1, other: 0.1})).choices["w"].name == other


def test_winograd_tiles_are_told_apart_by_their_price() -> None:
    conv = Conv2d("w", RNG.standard_normal((16, 16, 3, 3)).astype(np.float32), padding=(1, 1, 1, 1), input_hw=(28, 28))

    def price(name: str, structures: Sequence[Structure]) -> list[Cost]:
        return [Cost({"": 1.0, "tile=2": 0.5, "tile=4": 0.9}.get(s.describe(), 5.0), True) for s in structures]

    assert make_plan({"w": conv}, price=price).choices["w"].describe() == "tile=2"


def test_a_structure_that_lost_is_named_where_winograd_won() -> None:
    core, left = RNG.standard_normal((4, 16, 3, 3)), RNG.standard_normal((16, 4))
    weight = np.einsum("or,rihw->oihw", left, core).astype(np.float32)
    conv = Conv2d("w", weight, padding=(1, 1, 1, 1), input_hw=(28, 28))
    plan = make_plan({"w": conv}, price=priced(dense=1.0, winograd=0.5, low_rank=1.3))
    assert plan.choices["w"].name == "winograd"
    assert plan.notes["w"].reason == "same weight, fewer operations; 2.0x faster; low_rank rank=4 is 1.3x slower"


def test_the_report_of_a_measured_model_has_times_and_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_STRUCTURED_CACHE", str(tmp_path))
    model, x = nn.Linear(256, 512).eval(), torch.randn(1, 256)
    row = ts.compile(model, inputs=(x,), target="host").report().rows[0]
    assert row.seconds == row.dense_seconds and row.is_measured
    assert row.bound_fraction is not None and row.bound_fraction > 0
    predicted = ts.compile(model, inputs=(x,), target="host", measure=False).report().rows[0]
    assert predicted.seconds is not None and not predicted.is_measured and predicted.bound_fraction is None
    planned = ts.compile(model, inputs=(x,), target="host", plan=ts.Plan({})).report().rows[0]
    assert (planned.seconds, planned.dense_seconds, planned.bound_fraction) == (None, None, None)


def test_a_compiled_model_measures_once_and_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_STRUCTURED_CACHE", str(tmp_path))
    model, x = nn.Sequential(nn.Linear(256, 512, bias=False)).eval(), torch.randn(1, 256)
    model[0].weight.data = torch.from_numpy(ts.STRUCTURES["low_rank"].project(model[0].weight, 0.05).dense())
    first = ts.compile(model, inputs=(x,), target="host")
    lines = (tmp_path / "costs.jsonl").read_text().splitlines()
    assert len(lines) >= 2  # dense, and every form that came into question
    again = ts.compile(model, inputs=(x,), target="host")
    assert (tmp_path / "costs.jsonl").read_text().splitlines() == lines
    assert again.plan.notes == first.plan.notes
    assert first.plan.notes["0.weight"].is_measured


def test_without_measuring_the_plan_says_predicted() -> None:
    model, x = nn.Linear(256, 512).eval(), torch.randn(1, 256)
    model.weight.data = torch.from_numpy(ts.STRUCTURES["low_rank"].project(model.weight, 0.05).dense())
    for options in (
        {"measure": False},
        {"target": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}},
    ):
        mod = canonicalize(import_model(model, (x,)))
        target = resolve_target(options.get("target", "host"))
        plan = settle_plan(mod, target, measure=options.get("measure", True))
        assert plan.choices["weight"].name == "low_rank"
        assert "(predicted)" in plan.notes["weight"].reason


def test_the_store_survives_damaged_lines_and_folders_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "costs.jsonl"
    store = CostStore(path)
    store.put("a", 0.5, "dense")
    path.write_text("garbage\n\n[1]\n" + path.read_text() + '{"key": "b", "seconds": "x"}\n{"key": "c", "sec')
    again = CostStore(path)
    assert (again.get("a"), again.get("b"), len(again)) == (0.5, None, 1)
    blocked = CostStore(path / "not-a-folder" / "costs.jsonl")
    blocked.put("a", 1.0, "dense")
    assert blocked.get("a") == 1.0


def test_a_structure_that_was_not_found_is_not_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    for name, family in STRUCTURES.items():

        def detect(layer: Layer, tol: float, name: str = name, real: Any = family.detect) -> Any:
            looked.append(name)
            return real(layer, tol)

        monkeypatch.setattr(family, "detect", detect)
    first = candidates(LOW_RANK, None, DetectionStore(tmp_path / "detections.jsonl"))
    assert set(looked) == set(STRUCTURES)
    looked.clear()
    again = candidates(LOW_RANK, None, DetectionStore(tmp_path / "detections.jsonl"))
    assert "low_rank" in looked and len(looked) < len(STRUCTURES)
    assert [m.name for m in again.exact] == [m.name for m in first.exact]
    looked.clear()
    candidates(RANDOM, None, DetectionStore(tmp_path / "detections.jsonl"))
    assert set(looked) == set(STRUCTURES), "another weight is another matter"
