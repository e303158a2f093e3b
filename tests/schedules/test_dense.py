"""The dense kernel: every shape, every batch, nothing out of bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_harness import ALL_EPILOGUES, EVERYTHING, build_kernel, guarded_buffer, run_kernel, runnable_machines

from tvm_structured.structures import Dense, Unstructured

RNG = np.random.default_rng(0)


def member(out: int, inner: int) -> Any:
    return Unstructured.from_dense(Dense("w", RNG.standard_normal((out, inner)).astype(np.float32)))


@pytest.mark.parametrize("machine", runnable_machines())
@pytest.mark.parametrize(("out", "inner"), [(1, 1), (1, 700), (7, 1), (50, 33), (1000, 300), (64, 1100)])
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 130, 300])
def test_dense_equals_the_matrix_product(machine: str, out: int, inner: int, rows: int) -> None:
    run_kernel(member(out, inner), rows, machine=machine, epilogue=EVERYTHING, allocate=guarded_buffer).check()


@pytest.mark.parametrize("epilogue", ALL_EPILOGUES, ids=str)
def test_every_epilogue_is_inside_the_kernel(epilogue: Any) -> None:
    run_kernel(member(37, 21), 9, epilogue=epilogue).check()


def test_one_kernel_with_symbolic_rows_serves_every_batch() -> None:
    structure = member(45, 600)
    built = build_kernel(structure, None, epilogue=EVERYTHING)
    for rows in (1, 7, 8, 128, 129, 400):
        run_kernel(structure, rows, built=built, allocate=guarded_buffer).check()
