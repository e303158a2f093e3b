"""Schedules chosen by modelled cycles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lowering_harness import DEFAULT, TINY, bias, check, int8

from tvm_structured.errors import VTAError
from tvm_structured.vta.lower import Schedule, lower
from tvm_structured.vta.operators import Int8Add, Int8Chain, Int8Conv2d, Int8Dense, Int8MaxPool, Requantize
from tvm_structured.vta.timing import model
from tvm_structured.vta.tuning import ScheduleStore, digest, tune


def layers(rng: np.random.Generator) -> list[tuple[object, list[tuple[int, ...]]]]:
    conv = Int8Conv2d(int8(rng, 40, 20, 3, 3), bias(rng, 40), Requantize(shift=9), padding=(1, 1, 1, 1))
    dense = Int8Dense(int8(rng, 100, 150), bias(rng, 100), Requantize(shift=9))
    chain = Int8Chain((Int8Dense(int8(rng, 20, 150)), Int8Dense(int8(rng, 90, 20))))
    return [
        (conv, [(1, 20, 9, 9)]),
        (dense, [(5, 150)]),
        (chain, [(3, 150)]),
        (Int8MaxPool((3, 3), (2, 2), (1, 1, 1, 1)), [(1, 40, 15, 15)]),
        (Int8Add(), [(1, 40, 9, 9)] * 2),
    ]


@pytest.mark.parametrize("config", [DEFAULT, TINY])
def test_the_chosen_schedule_is_never_worse_and_right(config: object) -> None:
    rng = np.random.default_rng(0)
    for operator, shapes in layers(rng):
        tried: list[tuple[Schedule, int]] = []
        tuned = tune(operator, shapes, config, 10, progress=lambda s, c, tried=tried: tried.append((s, c)))
        assert tuned.cycles == min(cycles for _, cycles in tried) <= tuned.default_cycles
        assert tuned.tried == len(tried) == len({schedule for schedule, _ in tried}) <= 10
        assert tried[0][1] == tuned.default_cycles == model(lower(operator, shapes, config).program).cycles
        lowered = check(operator, shapes, config, rng, schedule=tuned.schedule)
        assert model(lowered.program).cycles == tuned.cycles


def test_what_was_found_is_remembered(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    operator, shapes = layers(rng)[0]
    path = tmp_path / "schedules.jsonl"
    first = tune(operator, shapes, trials=6, store=ScheduleStore(path))
    path.write_text(path.read_text() + "{damaged\n", encoding="utf-8")
    again = tune(replace(operator, name="other"), shapes, trials=6, store=ScheduleStore(path))
    assert again == replace(first, tried=0)
    other = replace(operator, weight=-(operator.weight // 2))
    assert tune(other, shapes, trials=1, store=ScheduleStore(path)).tried == 1
    assert digest(operator) != digest(other)
    with pytest.raises(VTAError, match="trials=0"):
        tune(operator, shapes, trials=0)
