"""Which configurations to try next: a pure function of the space, the seed and what was measured before.

A kernel lists its configurations in the order of its own model of cost, so the first are good guesses. A gradient
boosted model (xgboost) learns from the trials and ranks the rest; some are taken at random, in case it is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tvm_structured.errors import EnvironmentMismatchError
from tvm_structured.schedules import Config

BATCH = 8
BY_HAND = 5  # of the first batch: the hand schedule and the next ones of its list; the rest is random
AT_RANDOM = 1  # of the later batches
FAILED = 4.0  # how many times slower than the slowest a failed trial counts


def next_batch(space: Sequence[Config], times: Mapping[int, float | None], seed: int, count: int = BATCH) -> list[int]:
    """Indices of configurations to try. `times`: index -> seconds, None where it failed."""
    left = [index for index in range(len(space)) if index not in times]
    rng = np.random.default_rng([seed, len(times)])
    if len(left) <= count:
        return left
    if not times:
        first = left[: min(BY_HAND, count)]
        return first + pick(left[len(first) :], count - len(first), rng)
    ranked = rank(space, times, left, seed)
    best = ranked[: max(1, count - AT_RANDOM)]
    return best + pick(ranked[len(best) :], count - len(best), rng)


def pick(indices: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
    if not indices:
        return []
    chosen = rng.choice(len(indices), min(count, len(indices)), replace=False)
    return [indices[int(position)] for position in sorted(chosen)]


def rank(space: Sequence[Config], times: Mapping[int, float | None], left: Sequence[int], seed: int) -> list[int]:
    """The untried configurations, the fastest by prediction first."""
    features = features_of(space)
    tried = sorted(times)
    known = [seconds for seconds in times.values() if seconds is not None]
    worst = FAILED * max(known, default=1.0)
    labels = np.log([times[index] or worst for index in tried])
    predicted = fit(features[tried], labels, seed).predict(features[list(left)])
    return [left[int(position)] for position in np.argsort(predicted, kind="stable")]


def fit(features: np.ndarray, labels: np.ndarray, seed: int) -> Any:
    try:
        from xgboost import XGBRegressor
    except ImportError:
        raise EnvironmentMismatchError("tuning needs xgboost; pip install 'tvm-structured[tune]'") from None
    model = XGBRegressor(
        n_estimators=80, max_depth=5, learning_rate=0.2, min_child_weight=0.5, n_jobs=1, random_state=seed
    )
    return model.fit(features, labels - labels.min())


def features_of(space: Sequence[Config]) -> np.ndarray:
    """(configurations, features): logarithms of numbers, one column for each other value, and the place in the list."""
    flat = [dict(flatten(config)) for config in space]
    columns: dict[str, int] = {}
    for entries in flat:
        for name in entries:
            columns.setdefault(name, len(columns) + 1)
    features = np.full((len(space), len(columns) + 1), np.nan)
    features[:, 0] = np.arange(len(space)) / len(space)
    for row, entries in enumerate(flat):
        for name, value in entries.items():
            features[row, columns[name]] = value
    return features


def flatten(value: Any, name: str = "") -> list[tuple[str, float]]:
    """Nested values as (path, number)."""
    if isinstance(value, Mapping):
        return [entry for key, inner in value.items() for entry in flatten(inner, f"{name}.{key}")]
    if isinstance(value, (list, tuple)):
        inner = [entry for position, element in enumerate(value) for entry in flatten(element, f"{name}[{position}]")]
        return [(f"{name}.length", float(len(value))), *inner]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return [(f"{name}={value}", 1.0)]
    return [(name, math.copysign(math.log2(1 + abs(value)), value))]
