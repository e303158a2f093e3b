"""The tensor-train kernel: any number of cores, any modes and ranks, every direction, nothing out of bounds."""

from __future__ import annotations

import math
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
from tvm_structured.schedules.tt_plan import MergedTrain, cheapest_cuts, plans, tile_for, vector_operations
from tvm_structured.structures.tensor_train import TensorTrain

KERNEL = KERNELS["tensor_train"]
WIDE = Cpu(lanes=16, registers=32, cores=2)
TRAINS = {
    "one core": ((5,), (7,), ()),
    "one by one": ((1, 1), (1, 1), (1,)),
    "row": ((1, 1), (5, 9), (3,)),
    "column": ((5, 9), (1, 1), (3,)),
    "odd": ((3, 5), (7, 2), (3,)),
    "full registers": ((32, 32), (16, 16), (4,)),
    "unequal ranks": ((2, 3, 4), (5, 3, 2), (9, 2)),
    "unit modes": ((1, 7, 1, 3), (9, 1, 4, 1), (2, 5, 3)),
    "prime": ((7, 13, 3), (11, 2, 5), (5, 3)),
    "binary": ((2,) * 6, (2,) * 6, (3,) * 5),
    "expanding": ((8, 10, 9), (2, 3, 2), (3, 4)),
    "contracting": ((2, 3, 2), (10, 12, 9), (4, 3)),
}


def train_of(out_modes: Any, in_modes: Any, inner_ranks: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    ranks = (1, *inner_ranks, 1)
    cores = tuple(
        (rng.standard_normal((ranks[k], m, n, ranks[k + 1])) / math.sqrt(n * ranks[k + 1])).astype(np.float32)
        for k, (m, n) in enumerate(zip(out_modes, in_modes, strict=True))
    )
    return TensorTrain((math.prod(out_modes), math.prod(in_modes)), tuple(out_modes), tuple(in_modes), cores)


def extents(out_modes: Any, in_modes: Any, rank: int = 4) -> MergedTrain:
    return MergedTrain(out_modes, in_modes, (1, *[rank] * (len(out_modes) - 1), 1))


# -- results --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", runnable_machines())
@pytest.mark.parametrize("name", TRAINS)
def test_every_train_gives_the_product_with_its_matrix(machine: str, name: str) -> None:
    for rows in (1, 5) if machine == runnable_machines()[-1] else (3,):
        train = train_of(*TRAINS[name])
        run_kernel(train, rows, machine=machine, epilogue=EVERYTHING, allocate=guarded_buffer).check()


@pytest.mark.parametrize(("name", "rows"), [("prime", 1), ("prime", 3), ("binary", 3), ("full registers", 1)])
def test_every_plan_gives_the_same(name: str, rows: int) -> None:
    train = train_of(*TRAINS[name])
    for number in range(8):
        built = build_kernel(train, rows, config=number)
        if built is None:
            assert number > 1, "there is more than one way to run it"
            break
        run_kernel(train, rows, built=built, allocate=guarded_buffer).check()


@pytest.mark.parametrize("epilogue", ALL_EPILOGUES, ids=str)
def test_every_epilogue_is_inside_the_kernel(epilogue: Any) -> None:
    run_kernel(train_of((3, 7), (4, 5), (3,)), 2, epilogue=epilogue).check()


@pytest.mark.parametrize("name", ["contracting", "expanding", "one core"])  # last core first, first core first, neither
def test_one_kernel_with_symbolic_rows_serves_every_batch(name: str) -> None:
    train = train_of(*TRAINS[name])
    built = build_kernel(train, None, epilogue=EVERYTHING)
    for rows in (1, 2, 3, 50):
        run_kernel(train, rows, built=built, allocate=guarded_buffer).check()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("last_core_first", [True, False])
def test_both_directions_work_on_all_cores(rows: int, last_core_first: bool) -> None:
    """Large enough for threads; with fewer rows than threads the last stage becomes a region of its own."""
    train = train_of((8, 8, 8), (8, 16, 16), (6, 6))
    site = Site((rows, train.shape[1]), (rows, train.shape[0]), Cpu.of(target_for()))
    config = {"last_core_first": last_core_first, "cuts": [0, 1, 2, 3], "chunk": 2, "threads": 2}
    packed = KERNEL.pack(train, site, config)
    import tvm

    library = tvm.compile(KERNEL.prim_func(train, site, config).with_attr("global_symbol", "main"), target_for())
    x = np.random.default_rng(0).standard_normal((rows, train.shape[1])).astype(np.float32)
    arguments = [tvm.runtime.tensor(array) for array in (x, *packed.values(), np.zeros((rows, train.shape[0]), "f4"))]
    library["main"](*arguments)
    np.testing.assert_allclose(arguments[-1].numpy(), x @ train.dense().T, atol=1e-5)


# -- plans ----------------------------------------------------------------------------------------------


def test_the_direction_follows_the_cheaper_order() -> None:
    """Four stacked gates of the UCF11 LSTM, 6.5 times cheaper from the last core; transposed, from the first."""
    gates = extents((16, 4, 4, 4), (8, 20, 20, 18))
    transposed = MergedTrain(gates.in_modes, gates.out_modes, gates.ranks)
    assert next(plans(gates, WIDE, 16)).is_last_core_first
    assert not next(plans(transposed, WIDE, 16)).is_last_core_first


@pytest.mark.parametrize(
    ("out_modes", "in_modes"),
    [((4,) * 6, (4,) * 6), ((4,) * 6, (2, 7, 8, 8, 7, 4)), ((4,) * 4, (8, 20, 20, 18)), ((16,) * 3, (16,) * 3)],
    ids=str,
)
def test_published_layers_fill_the_lanes(out_modes: Any, in_modes: Any) -> None:
    """Cores with modes of 4 alone would leave three quarters of a vector empty."""
    train = extents(out_modes, in_modes)
    plan = next(plans(train, WIDE, 16))
    merged = train.merge(plan.cuts)
    stages = merged.stages(plan.is_last_core_first, plan.chunk)
    used = sum(stage.multiplies for stage in stages)
    assert used >= 0.8 * sum(vector_operations(stage, 16) for stage in stages) * 16
    # what merging costs in multiplications stays below what it gains
    unmerged = next(plans(train, Cpu(lanes=1, registers=32, cores=2), 16))
    assert len(plan.cuts) <= len(unmerged.cuts)


def test_merging_never_makes_the_dense_matrix() -> None:
    for lanes in (4, 16):
        for direction in (True, False):
            for cuts in cheapest_cuts(extents((2, 2, 2), (2, 2, 2)), direction, lanes):
                assert len(cuts) >= 3 and cuts[0] == 0 and cuts[-1] == 3


def test_chunks_cover_the_first_mode() -> None:
    train = extents((6, 4), (4, 10))
    whole = {d: sum(s.multiplies for s in train.stages(d, (6, 4)[d])) for d in (False, True)}
    assert sum(s.multiplies for s in train.stages(False, 2)) * 3 == whole[False]
    *chunked, last = (s.multiplies for s in train.stages(True, 2))
    assert sum(chunked) * 2 + last == whole[True]


@pytest.mark.parametrize("cpu", [WIDE, Cpu(8, 16, 2, False), Cpu(4, 16, 2, False)], ids=str)
def test_register_blocks_fit_the_registers(cpu: Cpu) -> None:
    for lead in (1, 3, 64):
        for rows in (1, 5, 64):
            for trail in (1, 2, 7, 16, 100):
                tile = tile_for(cpu, lead, rows, 32, trail)
                scalars, vectors = tile.scalars, tile.leads * tile.vectors
                if tile.lanes_on_rows:
                    scalars, vectors = tile.leads * trail, tile.vectors
                assert scalars * vectors + vectors < cpu.registers
                assert tile.scalars <= max(rows, trail) and tile.leads <= lead


def test_little_work_stays_on_one_thread() -> None:
    small, large = extents((4, 4), (4, 4), 2), extents((16, 16, 16), (16, 16, 16))
    assert next(plans(small, WIDE, 1)).threads == 1
    assert next(plans(large, WIDE, 1)).threads == 2
    assert next(plans(small, WIDE, None)).threads == 2  # any number of rows may come


def test_packed_constants_hold_the_merged_cores() -> None:
    train = train_of((4, 4, 4), (4, 4, 4), (2, 2))
    rows = tirx.Var("rows", "int64")
    site = Site((rows, 64), (rows, 64), WIDE)
    for config in KERNEL.configs(train, site):
        packed = KERNEL.pack(train, site, config)
        assert len(packed) == len(config["cuts"]) - 1
        assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in packed.values())
        assert sum(np.count_nonzero(array) for array in packed.values()) < 64 * 64
