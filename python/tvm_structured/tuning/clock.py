"""How long one call of a compiled function takes: measured no longer than it takes to see whether it can win."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

FAR_BEHIND = 1.6  # times the best: such a candidate is dropped after two short looks
CLOSE = 1.15  # times the best: such a one is looked at for longer
SLOT = 0.4e-3  # seconds of runs to a turn
TURNS, MORE_TURNS, COLD_TURNS = 6, 18, 6
QUARTILE = 0.25  # what else the processor does only makes runs slower

Turns = Callable[[int, int], Sequence[float]]  # (calls to a turn, turns) -> seconds of a call, by turn


def adaptive_seconds(turns: Turns, limit: float, is_cold: bool = False) -> float:
    """Seconds of a call. `limit` is the best so far, or infinity."""
    looks = list(turns(1, 2))
    if min(looks) > FAR_BEHIND * limit:
        return min(looks)
    number = 1 if is_cold else slot(min(looks))
    taken = list(turns(number, COLD_TURNS if is_cold else TURNS))
    if (number > 1 and quartile(taken) < CLOSE * limit < math.inf) or is_cold:
        taken += turns(number, COLD_TURNS if is_cold else MORE_TURNS)
    return quartile(taken)


def slot(seconds: float) -> int:
    """Calls that fill a turn."""
    return max(1, math.ceil(SLOT / max(seconds, 1e-9)))


def quartile(taken: Sequence[float]) -> float:
    return float(np.quantile(taken, QUARTILE))


def seconds_by_turn(contestants: Sequence[Turns], rounds: int, is_cold: bool = False) -> list[list[float]]:
    """Seconds of each contestant by round, all of them in turns, so that a slow phase hits all."""
    numbers = [1 if is_cold else slot(min(turns(1, 2))) for turns in contestants]
    taken: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds):
        for turns, number, seconds in zip(contestants, numbers, taken, strict=True):
            seconds.append(float(min(turns(number, 2))))
    return taken


def evaluator(module: Any, device: Any, arguments: Sequence[Any], is_cold: bool) -> Turns:
    """Turns taken with TVM's timer, on this machine or a remote one. Cold: what is not x is flushed from the caches."""
    flush = "cache_flush_cpu_non_first_arg" if is_cold else ""

    def turns(number: int, repeat: int) -> Sequence[float]:
        timer = module.time_evaluator("main", device, number=number, repeat=repeat, f_preproc=flush)
        return [float(seconds) for seconds in timer(*arguments).results]

    return turns
