"""The DeBut kernel: any chain, any batch, every plan, nothing out of bounds."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from kernel_harness import EVERYTHING, check_all_guarded, runnable_machines, target_for

from tvm_structured.schedules import KERNELS, Cpu, Site
from tvm_structured.schedules.debut import ChainPlan, stages_of
from tvm_structured.schedules.debut_plan import Stage, cheapest_cuts, cycles, merge, split_for_threads, tile_of
from tvm_structured.structures.debut import DeBut
from tvm_structured.structures.debut_chain import butterfly, chain_of

WIDE = Cpu(lanes=16, registers=32, cores=2)
CHAINS = {
    "one factor": ((5,), (7,), 1),
    "one factor, several blocks": ((5,), (7,), 3),
    "blocks": ((3, 5), (2, 2), 3),
    "binary": ((2,) * 6, (2,) * 6, 1),
    "primes": ((3, 5, 7), (2, 9, 4), 1),
    "long first": ((40, 3, 2), (6, 2, 2), 1),
    "several blocks behind": ((20, 3, 2), (6, 2, 2), 5),
    "units": ((1, 20, 3, 1, 2), (2, 6, 1, 2, 2), 1),
    "bulging": ((16, 2, 2, 1, 2), (25, 1, 2, 2, 4), 1),
    "monarch": ((32, 32), (32, 32), 1),
    "radix 16": ((16, 16), (16, 16), 1),
}


def member_of(name: str) -> DeBut:
    chain = chain_of(*CHAINS[name])
    rng = np.random.default_rng(0)
    grids = tuple((rng.standard_normal((f.blocks, f.r, f.s, f.t)) / math.sqrt(f.s)).astype(np.float32) for f in chain)
    return DeBut((chain[-1].p, chain[0].q), chain, grids)


@pytest.mark.parametrize("name", CHAINS)
def test_every_chain_gives_the_product_with_its_matrix(guarded: Any, name: str) -> None:
    machines = runnable_machines()
    cases: list[dict[str, Any]] = [
        {"structure": member_of(name), "rows": (rows,), "machine": machines[-1], "epilogue": EVERYTHING}
        for rows in (1, 5, 19)
    ]
    cases += [{"structure": member_of(name), "rows": (3,), "machine": machine} for machine in machines[:-1]]
    assert guarded(check_all_guarded, cases) == len(cases)


@pytest.mark.parametrize("name", ["primes", "several blocks behind", "radix 16"])
def test_every_plan_gives_the_same(guarded: Any, name: str) -> None:
    """Shared out by vectors and by rows, in large and small register blocks."""
    cases = [
        {"structure": member_of(name), "rows": (rows,), "config": config} for rows in (1, 11, 45) for config in range(4)
    ]
    assert guarded(check_all_guarded, cases) == len(cases)


def test_symbolic_batches_take_one_row_and_many(guarded: Any) -> None:
    options = {"rows": (1, 2, 8, 17), "symbolic": True, "epilogue": EVERYTHING}
    assert (
        guarded(check_all_guarded, [{"structure": member_of(name), **options} for name in ("primes", "bulging")]) == 8
    )


# -- plans ----------------------------------------------------------------------------------------------


def test_merging_keeps_the_ends_and_counts_the_product() -> None:
    stages = [Stage(9, 4, 3, 1), Stage(3, 2, 3, 4), Stage(1, 5, 3, 8)]
    merged = merge(stages)
    assert merged == Stage(1, 40, 27, 1)
    assert merged.inputs == stages[0].inputs and merged.outputs == stages[-1].outputs


def test_factors_are_merged_until_the_lanes_are_full() -> None:
    """Radix 2 would leave 14 of 16 lanes empty in the first factor, and runs of few positions in the next ones."""
    stages = tuple(Stage(f.blocks, f.r, f.s, f.t) for f in butterfly(4096))
    for rows in (1, 8):
        cuts = cheapest_cuts(stages, WIDE, rows)
        assert cuts[0] == 0 and cuts[-1] == len(stages) and list(cuts) == sorted(set(cuts))
        assert merge(stages[: cuts[1]]).r >= 16
        single = sum(cycles(stage, WIDE, rows) for stage in stages)
        chosen = sum(cycles(merge(stages[a:b]), WIDE, rows) for a, b in itertools.pairwise(cuts))
        assert chosen < single


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8])
def test_tiles_fit_the_registers(rows: int) -> None:
    for cpu in (WIDE, Cpu(8, 16, 2, False), Cpu(4, 16, 1, False)):
        for stage in (Stage(1, 64, 64, 1), Stage(4, 16, 16, 32), Stage(1, 3, 2, 100)):
            tile = tile_of(stage, cpu, rows)
            assert 1 <= tile.rows <= rows and tile.vectors >= 1
            assert tile.rows * tile.vectors + tile.vectors + 1 <= cpu.registers


def test_both_regions_have_work_for_all_threads() -> None:
    stages = [Stage(f.blocks, f.r, f.s, f.t) for f in butterfly(4096, 16)]
    cut, width = split_for_threads(stages, WIDE)
    assert stages[cut - 1].blocks >= 2 and stages[cut].t // width >= 2 and width % WIDE.lanes == 0


def test_constants_hold_every_number_once() -> None:
    """Padding aside: the sums of squares agree where nothing is merged."""
    member = member_of("several blocks behind")
    site = Site((4, member.shape[1]), (4, member.shape[0]), Cpu.of(target_for()))
    config = {"cuts": [0, 1, 2, 3], "rows": 4, "threads": 2, "shares_vectors": True}
    packed = KERNELS["debut"].pack(member, site, config)
    assert len(packed) == len(stages_of(member)) == 3
    for constants, grid in zip(packed.values(), member.grids, strict=True):
        assert np.square(constants).sum() == pytest.approx(np.square(grid).sum(), rel=1e-6)
        assert np.count_nonzero(constants) == np.count_nonzero(grid)
    plan = ChainPlan(member, site, config)
    assert plan.chunks * plan.width == plan.pitch >= plan.diagonal
