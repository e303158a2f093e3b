"""Default schedules: no function stays a naive loop, and each rule keeps its contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_harness import target_for
from operator_samples import CASES, F32, Build, Spec, functions_of, loops_of, nodes, running_sum
from tvm import s_tir, tirx

from tvm_structured.schedules import fallback, injective, matmul, reduction
from tvm_structured.schedules.fallback import RULES, attempt, default_schedule

LARGE: dict[str, tuple[Build, list[Spec], Any]] = {
    "softmax": (CASES["softmax"][0], [((12, 197, 197), F32)], reduction.apply),
    "layer_norm": (CASES["layer_norm"][0], [((197, 768), F32), ((768,), F32), ((768,), F32)], reduction.apply),
    "mean_of_images": (CASES["mean_of_images"][0], [((1, 2048, 7, 7), F32)], reduction.apply),
    "softmax_columns": (CASES["softmax_columns"][0], [((1, 19, 4096), F32)], fallback.apply),
    "matmul": (CASES["matmul"][0], [((128, 256), F32), ((256, 512), F32)], matmul.apply),
    "product_of_rows": (CASES["product_of_rows"][0], [((12, 197, 64), F32), ((12, 197, 64), F32)], matmul.apply),
    "conv_grouped": (
        CASES["conv_grouped"][0],
        [((1, 32, 28, 28), F32), ((64, 16, 3, 3), F32), ((64,), F32)],
        matmul.apply,
    ),
    "gelu": (CASES["gelu"][0], [((197, 3072), F32)], injective.apply),
    "transpose": (CASES["transpose"][0], [((1, 197, 768), F32)], injective.apply),
    "concat": (CASES["concat"][0], [((1, 64, 3136), F32), ((1, 32, 3136), F32)], injective.apply),
}
TARGET = target_for("haswell")  # 8 lanes; nothing is run here


def function_of(name: str) -> Any:
    """The function that does the work; others only reshape."""
    return max(functions_of(*LARGE[name][:1], *LARGE[name][1]), key=lambda func: len(nodes(func, s_tir.SBlock)))


@pytest.mark.parametrize("name", LARGE)
def test_large_functions_run_on_all_threads_in_whole_vectors(name: str) -> None:
    scheduled = default_schedule(function_of(name), TARGET)
    vectors = loops_of(scheduled, tirx.ForKind.VECTORIZED)
    assert loops_of(scheduled, tirx.ForKind.PARALLEL)
    assert max(int(loop.extent) for loop in vectors) >= 8
    assert all(int(loop.extent).bit_count() == 1 for loop in vectors)


@pytest.mark.parametrize("name", LARGE)
def test_no_condition_is_left_inside_of_vectors(name: str) -> None:
    for loop in loops_of(default_schedule(function_of(name), TARGET), tirx.ForKind.VECTORIZED):
        assert not nodes(loop, tirx.IfThenElse)


@pytest.mark.parametrize("name", LARGE)
def test_the_rule_meant_for_a_function_takes_it_first(name: str) -> None:
    takers = (rule for rule in RULES if attempt(rule, function_of(name), TARGET) is not None)
    assert next(takers) is LARGE[name][2]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("softmax", [(3, 20)]), ("gelu", [(3, 20)]), ("max_of_rows", [(3, 20)]), ("matmul", [(3, 7), (7, 5)])],
)
def test_little_work_starts_no_threads(name: str, shapes: list[tuple[int, ...]]) -> None:
    for func in functions_of(CASES[name][0], *((shape, F32) for shape in shapes)):
        assert not loops_of(default_schedule(func, TARGET), tirx.ForKind.PARALLEL)


def test_one_core_starts_no_threads() -> None:
    scheduled = default_schedule(function_of("softmax"), target_for("haswell", cores=1))
    assert not loops_of(scheduled, tirx.ForKind.PARALLEL)


@pytest.mark.parametrize("name", ["softmax", "layer_norm", "matmul"])
def test_intermediate_results_stay_in_cache(name: str) -> None:
    for allocation in nodes(default_schedule(function_of(name), TARGET), tirx.AllocBuffer):
        assert np.prod([int(extent) for extent in allocation.buffer.shape]) <= 1024


# -- the contract of rules ------------------------------------------------------------------------------


def test_a_rule_that_throws_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(func: Any, target: Any) -> Any:
        raise s_tir.ScheduleError("not like this")

    monkeypatch.setattr(fallback, "RULES", (refused, *RULES))
    assert default_schedule(function_of("softmax"), TARGET) is not None


def test_mistakes_of_our_own_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(func: Any, target: Any) -> Any:
        raise AssertionError("a bug")

    monkeypatch.setattr(fallback, "RULES", (broken,))
    with pytest.raises(AssertionError, match="a bug"):
        default_schedule(function_of("softmax"), TARGET)


def test_loops_written_by_hand_only_get_threads_around_them() -> None:
    assert all(rule(running_sum, TARGET) is None for rule in RULES[:-1])
    (parallel,) = loops_of(default_schedule(running_sum, TARGET), tirx.ForKind.PARALLEL)
    assert int(parallel.extent) == 64


def test_rules_do_not_change_the_function_they_look_at() -> None:
    func = function_of("softmax")
    before = func.script()
    default_schedule(func, TARGET)
    assert func.script() == before
