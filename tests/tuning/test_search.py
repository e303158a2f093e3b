"""The search: no configuration twice, all of them in the end, the same ones for the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_structured.tuning.search import BATCH, BY_HAND, features_of, next_batch


def space_of(count: int) -> list[dict[str, Any]]:
    """Configurations like those of the kernels: numbers, words, lists, nested."""
    return [
        {"mr": 1 + i % 8, "way": "ab"[i % 2], "cuts": list(range(i % 3)), "inner": {"kc": 2 ** (i // 16)}, "at": i}
        for i in range(count)
    ]


def cost(config: dict[str, Any]) -> float:
    """Has one best place: mr 6, way b, large kc."""
    return 1e-5 * (1 + abs(config["mr"] - 6) + 2 * (config["way"] == "a") + 4 / config["inner"]["kc"])


def run(space: list[dict[str, Any]], trials: int, seed: int) -> list[int]:
    times: dict[int, float | None] = {}
    while len(times) < min(trials, len(space)):
        batch = next_batch(space, times, seed, min(BATCH, trials - len(times)))
        assert batch and not set(batch) & set(times)
        times |= {index: cost(space[index]) for index in batch}
    return list(times)


@settings(max_examples=25)
@given(count=st.integers(1, 60), trials=st.integers(1, 70), seed=st.integers(0, 5))
def test_every_configuration_is_tried_once_and_the_hand_schedule_first(count: int, trials: int, seed: int) -> None:
    order = run(space_of(count), trials, seed)
    assert order[0] == 0
    assert len(order) == len(set(order)) == min(count, trials)


def test_the_seed_decides_and_nothing_else_does() -> None:
    space = space_of(200)
    assert run(space, 40, 1) == run(space, 40, 1)
    assert run(space, 40, 1) != run(space, 40, 2)
    assert run(space, 40, 1)[:BY_HAND] == list(range(BY_HAND))


def test_the_model_finds_the_best_of_a_large_space_sooner_than_chance() -> None:
    space = space_of(400)
    best = min(map(cost, space))
    found = [min(cost(space[index]) for index in run(space, 48, seed)) for seed in range(5)]
    assert sum(value <= 1.01 * best for value in found) >= 4
    assert np.mean([cost(c) <= 1.01 * best for c in space]) < 0.1, "the space is too easy to tell"


def test_failed_trials_are_learnt_from_and_not_repeated() -> None:
    space = space_of(100)
    times: dict[int, float | None] = {index: None for index in range(0, 60, 2)}
    batch = next_batch(space, times, 0)
    assert len(batch) == BATCH and not set(batch) & set(times)


@pytest.mark.parametrize("config", [{}, {"a": True}, {"a": None}, {"a": [1, [2, "x"]]}])
def test_any_json_has_features(config: dict[str, Any]) -> None:
    assert features_of([config, {"b": 3}]).shape[0] == 2
