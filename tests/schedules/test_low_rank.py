"""The low-rank kernel: two products with a thin intermediate, every shape, rank and batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
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

from tvm_structured.schedules import KERNELS, Cpu, Site
from tvm_structured.structures.low_rank import LowRank


def member(out: int, inner: int, rank: int) -> Any:
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((out, rank)), rng.standard_normal((rank, inner)) / np.sqrt(rank * inner)
    return LowRank((out, inner), u.astype(np.float32), v.astype(np.float32))


@pytest.mark.parametrize("machine", runnable_machines())
@pytest.mark.parametrize(("out", "inner", "rank"), [(1, 1, 1), (7, 1, 1), (50, 33, 3), (300, 200, 17), (64, 1100, 40)])
@pytest.mark.parametrize("rows", [1, 2, 17, 130])
def test_low_rank_equals_the_two_products(machine: str, out: int, inner: int, rank: int, rows: int) -> None:
    run_kernel(member(out, inner, rank), rows, machine=machine, epilogue=EVERYTHING, allocate=guarded_buffer).check()


@pytest.mark.parametrize("epilogue", ALL_EPILOGUES, ids=str)
def test_the_epilogue_follows_the_second_product_only(epilogue: Any) -> None:
    run_kernel(member(37, 21, 5), 9, epilogue=epilogue).check()


def test_one_kernel_with_symbolic_rows_serves_every_batch() -> None:
    structure = member(45, 600, 20)
    built = build_kernel(structure, None, epilogue=EVERYTHING)
    for rows in (1, 7, 8, 128, 129, 300):
        run_kernel(structure, rows, built=built, allocate=guarded_buffer).check()


@pytest.mark.parametrize("rows", [1, 20])
def test_configurations_from_all_over_the_space_give_the_same(rows: int) -> None:
    structure = member(70, 1300, 33)
    space = len(list(KERNELS["low_rank"].configs(structure, Site((rows, 1300), (rows, 70), Cpu.of(target_for())))))
    for number in np.linspace(0, space - 1, 8, dtype=int):
        run_kernel(structure, rows, config=int(number), allocate=guarded_buffer).check()


def test_little_work_stays_on_one_thread() -> None:
    def threads(structure: Any, rows: Any) -> int:
        site = Site((rows, structure.shape[1]), (rows, structure.shape[0]), Cpu(16, 32, 2))
        return next(KERNELS["low_rank"].configs(structure, site))["threads"]

    assert threads(member(64, 64, 4), 1) == 1
    assert threads(member(1000, 1000, 100), 16) == 2
    assert threads(member(64, 64, 4), tirx.Var("rows", "int64")) == 2  # any number of rows may come
