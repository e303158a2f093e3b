"""The spaces that tuning searches: the hand schedule first, nothing twice, and every configuration is right."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_harness import check_all_guarded, target_for
from tuning_samples import SIZES, sample_task

from tvm_structured.schedules import KERNELS, Cpu, Epilogue, Site
from tvm_structured.schedules.space import around, block_rows
from tvm_structured.structures import STRUCTURES, Dense, Unstructured
from tvm_structured.tuning.tasks import config_text

PICKED = 3  # configurations of each kernel and number of rows


def member(name: str) -> object:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    return {**STRUCTURES, "dense": Unstructured}[name].from_dense(Dense("w", weight), **SIZES[name])


@pytest.mark.parametrize("name", SIZES)
def test_configurations_from_all_over_the_space_are_right(guarded, name: str) -> None:
    cases, rng = [], np.random.default_rng(1)
    for rows in (1, 37, 150):
        site = Site((rows, 64), (rows, 64), Cpu.of(target_for()), Epilogue(bias=True))
        count = len(list(KERNELS[name].configs(member(name), site)))
        picked = rng.choice(count, min(PICKED, count), replace=False)
        cases += [
            {
                "structure": member(name),
                "name": name,
                "rows": (rows,),
                "config": int(c),
                "epilogue": Epilogue(bias=True),
            }
            for c in picked
        ]
    assert guarded(check_all_guarded, cases) == len(cases) > 0


@pytest.mark.parametrize("name", SIZES)
def test_a_space_is_worth_searching_and_repeats_nothing(name: str) -> None:
    task = sample_task(name, rows=48)
    listed = list(map(config_text, KERNELS[name].configs(task.structure, task.site)))
    assert len(set(listed)) == len(listed) >= 16
    assert config_text(task.space[0]) == listed[0]


def test_a_space_is_listed_by_distance_from_the_hand_schedule() -> None:
    space = list(around({"a": 1, "b": [2], "c": 3}, {"a": (1, 5), "b": ([2], [4], [4, 4])}))
    assert space[0] == {"a": 1, "b": [2], "c": 3} and len(space) == 6
    distances = [sum(config[name] != space[0][name] for name in "abc") for config in space]
    assert distances == sorted(distances)
    assert list(around({"a": 1}, {"a": range(9)}, lambda config: config["a"] > 7)) == [{"a": 1}, {"a": 8}]


def test_blocks_of_known_rows_differ_in_their_number() -> None:
    assert block_rows(8, 8) == [1, 2, 3, 4, 8]
    assert block_rows(3, 8) == [1, 2, 3] and block_rows(1, 8) == [1]
    assert block_rows(None, 4) == [1, 2, 3, 4]
