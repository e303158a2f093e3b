"""Permuted-diagonal on CUDA, emulated: its three ways, all kinds of shifts, padding, taps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_harness import check_on_cpu, cuda_site, every_config
from guarded_buffers import guarded_buffer
from kernel_harness import EVERYTHING

from tvm_structured.structures.permuted_diagonal import PermutedDiagonal


def member(out: int, inner: int, p: int, shifts: str, taps: int = 1) -> Any:
    """Random diagonals, in the padding too."""
    rng = np.random.default_rng(0)
    rows, columns = -(-out // p), taps * -(-inner // taps // p)
    if shifts == "natural":
        k = np.arange(rows * columns).reshape(rows, columns) % p
    elif shifts == "separable":
        k = (rng.integers(0, p, (rows, 1)) + rng.integers(0, p, (1, columns))) % p
    else:
        k = rng.integers(0, p, (rows, columns))
    diagonals = rng.standard_normal((rows, columns, p)) / np.sqrt(columns)
    return PermutedDiagonal((out, inner), taps, diagonals.astype(np.float32), k)


def ways(structure: Any, rows: Any) -> list[str]:
    return list(dict.fromkeys(config["way"] for config in every_config(structure, cuda_site(structure, rows))))


def test_shifts_and_rows_decide_the_way() -> None:
    assert ways(member(64, 64, 8, "natural"), 1) == ["turn", "gather", "many"]
    assert ways(member(64, 64, 8, "separable"), 64) == ["many", "gather"]
    assert ways(member(64, 64, 8, "best"), 64) == ["gather"]


@pytest.mark.parametrize("shifts", ["natural", "separable", "best"])
@pytest.mark.parametrize(("out", "inner", "p", "taps"), [(64, 96, 8, 1), (31, 50, 5, 1), (40, 36, 16, 2), (3, 4, 2, 1)])
@pytest.mark.parametrize("rows", [1, 18])
def test_equals_the_matrix(shifts: str, out: int, inner: int, p: int, taps: int, rows: int) -> None:
    dtype = ("float32", "float16", "bfloat16")[(rows + p) % 3]
    options = {"dtype": dtype, "epilogue": EVERYTHING, "allocate": guarded_buffer}
    check_on_cpu(member(out, inner, p, shifts, taps), rows, **options)


def test_blocks_longer_than_registers() -> None:
    check_on_cpu(member(150, 170, 50, "natural"), 3, dtype="float16")


def test_configurations_and_symbolic_rows() -> None:
    structure = member(96, 160, 8, "natural")
    for config in every_config(structure, cuda_site(structure, 5))[::5]:
        check_on_cpu(structure, 5, config=config, symbolic=True)
