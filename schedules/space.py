"""Spaces of configurations around one that was chosen by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tvm_structured.schedules.base import Config
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.gemm import most_rows

MOST_CONFIGS = 2000  # of one space: listing them takes time, too


def around(
    default: Config, axes: Mapping[str, Sequence[Any]], is_valid: Callable[[Config], bool] = lambda _: True
) -> Iterator[Config]:
    """Every combination of values, the default first, then what differs from it in one place, in two, and so on.

    Keys of the default that are not in `axes` keep their value.
    """
    values = {name: [default[name], *(c for c in choices if c != default[name])] for name, choices in axes.items()}
    count = 0
    for distance in range(len(values) + 1):
        for changed in itertools.combinations(values, distance):
            for choice in itertools.product(*(values[name][1:] for name in changed)):
                config = {**default, **dict(zip(changed, choice, strict=True))}
                if distance and not is_valid(config):
                    continue
                yield config
                count += 1
                if count == MOST_CONFIGS:
                    return


def block_rows(rows: Any, most: int) -> list[int]:
    """Rows of a register block: for a known number those that cut it into a different number of blocks."""
    if not isinstance(rows, int) or rows < 1:
        return list(range(1, most + 1))
    return sorted({math.ceil(rows / blocks) for blocks in range(1, rows + 1) if math.ceil(rows / blocks) <= most})


def fits_registers(cpu: Cpu) -> Callable[[Config], bool]:
    """Whether the sums of an mr x nr block stay in registers beside nr vectors and a scalar."""
    return lambda config: bool(config["mr"] <= most_rows(cpu, config["nr"]))
