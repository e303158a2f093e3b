"""Functions without a kernel: MetaSchedule's search, its traces, and rules of ours for marked blocks."""

from __future__ import annotations

import json
import sys
import zlib
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from kernel_harness import target_for
from tuning_samples import product
from tvm import te

from tvm_structured.tuning.schedule_search import BATCH, ScheduleSearch
from tvm_structured.tuning.schedule_tasks import ScheduleTask, is_tunable
from tvm_structured.tuning.tasks import config_text


def run(search: ScheduleSearch, trials: int) -> list[dict[str, Any]]:
    """All candidates, with times that follow from their text."""
    found: list[dict[str, Any]] = []
    while batch := search.next(trials):
        search.learn([(config, time_of(config)) for config in batch])
        found += batch
    return found


def time_of(config: dict[str, Any]) -> float:
    return 1e-5 * (1 + zlib.crc32(config_text(config).encode()) / 2**32)


def test_the_default_schedule_is_first_and_every_candidate_computes_the_function() -> None:
    task = ScheduleTask.of(product(), target_for(), name="dense")
    again = ScheduleTask.from_json(json.loads(json.dumps(task.to_json())))
    assert (again.key, again.describe()) == (task.key, "dense 16x24 32x24 -> 16x32")
    found = run(ScheduleSearch(again, 0), 4)
    assert found[0] == {} and len(found) == 4
    for config in map(json.loads, map(config_text, found)):
        func, arguments = again.build(config)
        tensors = [tvm.runtime.tensor(array) for array in arguments]
        tvm.compile(func.with_attr("global_symbol", "main"), again.tvm_target)["main"](*tensors)
        x, weight, _ = arguments
        np.testing.assert_allclose(tensors[-1].numpy(), x @ weight.T, rtol=1e-4, atol=1e-4)
    assert "tvm.s_tir.tensor_intrin" not in sys.modules, "the stand-in for TVM's intrinsics stayed"


def test_searches_of_several_functions_do_not_disturb_each_other_nor_who_draws_numbers() -> None:
    """The same results lead to the same candidates, also for a session that goes on and skips what is finished."""
    tasks = [ScheduleTask.of(product(rows), target_for()) for rows in (16, 24)]
    alone = run(ScheduleSearch(tasks[0], 3), BATCH + 3)
    np.random.seed(7)
    expected = np.random.RandomState(7).uniform(size=3)
    searches, found = [ScheduleSearch(task, 3) for task in tasks], list[dict[str, Any]]()
    while any(batches := [search.next(BATCH + 3) for search in searches]):
        for search, batch in zip(searches, batches, strict=True):
            search.learn([(config, time_of(config)) for config in batch])
        found += batches[0]
    assert list(map(config_text, found)) == list(map(config_text, alone))
    np.testing.assert_array_equal(np.random.uniform(size=3), expected)


def test_a_marked_block_reaches_its_rule_through_metaschedule() -> None:
    seen: list[str] = []

    @tvm_ffi.register_global_func("s_tir.meta_schedule.cpu.tuning_test_rule", override=True)
    def rule(sch: Any, block: Any) -> list[Any]:
        seen.append(sch.get(block).name_hint)
        sch.parallel(sch.get_loops(block)[0])
        return [sch]

    search = ScheduleSearch(ScheduleTask.of(product(rule="tuning_test_rule"), target_for()), 0)
    search.learn([({}, 1e-5)] if search.next(4) == [{}] else [])
    assert search.next(4) and set(seen) == {"y"}


@pytest.mark.parametrize("rows, tunable", [(8, True), (te.var("n", "int64"), False)])
def test_functions_with_open_extents_are_not_tuned(rows: Any, tunable: bool) -> None:
    x = te.placeholder((rows, 4), name="x")
    func = te.create_prim_func([x, te.compute((rows, 4), lambda i, j: x[i, j] + 1.0)], index_dtype_override="int64")
    assert is_tunable(func) == tunable
