"""The dense kernel: every shape, every batch, nothing out of bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_harness import (
    ALL_EPILOGUES,
    EVERYTHING,
    build_kernel,
    guarded_buffer,
    run_kernel,
    runnable_machines,
    target_for,
)
from tvm import tirx

from tvm_structured.schedules import Cpu
from tvm_structured.schedules.gemm import even_blocks, register_block
from tvm_structured.structures import Dense, Unstructured

RNG = np.random.default_rng(0)


def member(out: int, inner: int) -> Any:
    return Unstructured.from_dense(Dense("w", RNG.standard_normal((out, inner)).astype(np.float32)))


@pytest.mark.parametrize("machine", runnable_machines())
@pytest.mark.parametrize(("out", "inner"), [(1, 1), (1, 700), (7, 1), (50, 33), (1000, 300), (64, 1100)])
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 130, 300])
def test_dense_equals_the_matrix_product(machine: str, out: int, inner: int, rows: int) -> None:
    run_kernel(member(out, inner), rows, machine=machine, epilogue=EVERYTHING, allocate=guarded_buffer).check()


@pytest.mark.parametrize("rows", [3, 20, 300, 520])
def test_weights_larger_than_the_caches_are_prefetched_without_harm(rows: int) -> None:
    run_kernel(member(2100, 1030), rows, epilogue=EVERYTHING, allocate=guarded_buffer).check()


def test_few_outputs_share_the_rows_among_threads() -> None:
    for rows in (63, 64, 700):
        run_kernel(member(20, 70), rows, epilogue=EVERYTHING, allocate=guarded_buffer).check()


@given(st.integers(1, 5000), st.integers(1, 16))
def test_row_blocks_cover_all_rows_and_differ_by_one(rows: int, most: int) -> None:
    blocks = even_blocks(rows, most)
    sizes = [size for _, size in blocks]
    assert sum(count * size for count, size in blocks) == rows
    assert sum(count for count, _ in blocks) == -(-rows // most)
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("machine", runnable_machines())
def test_register_blocks_fit_the_registers(machine: str) -> None:
    cpu = Cpu.of(target_for(machine))
    for rows in (*range(1, 66), 1000, tirx.Var("rows", "int64")):
        for out in (1, 10, 64, 513, 1000, 4096):
            mr, nr = register_block(cpu, rows, out)
            assert mr >= 1 and nr >= 1 and mr * nr + nr + 1 <= cpu.registers


@pytest.mark.parametrize("epilogue", ALL_EPILOGUES, ids=str)
def test_every_epilogue_is_inside_the_kernel(epilogue: Any) -> None:
    run_kernel(member(37, 21), 9, epilogue=epilogue).check()


def test_one_kernel_with_symbolic_rows_serves_every_batch() -> None:
    structure = member(45, 600)
    built = build_kernel(structure, None, epilogue=EVERYTHING)
    for rows in (1, 7, 8, 128, 129, 400):
        run_kernel(structure, rows, built=built, allocate=guarded_buffer).check()
