"""The Winograd kernel against the direct convolution in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_harness import ALL_EPILOGUES, EVERYTHING, build_kernel, guarded_buffer, run_kernel, runnable_machines

from tvm_structured.schedules import KERNELS, ConvGeometry, Cpu, Site
from tvm_structured.schedules.winograd_tiles import pair_columns, row_pairs
from tvm_structured.structures import Conv2d, Winograd
from tvm_structured.structures.winograd import transforms

RNG = np.random.default_rng(0)
VARIANTS = [(2, 3), (4, 3), (6, 3), (2, 5), (4, 5)]
# largest deviation by the largest value, about three times what normal data show
TOLERANCE = {(2, 3): 1e-6, (4, 3): 3e-6, (6, 3): 2e-5, (2, 5): 3e-6, (4, 5): 2e-5}


def member(out: int, channels: int, tile: int, kernel: int) -> Any:
    weight = RNG.standard_normal((out, channels, kernel, kernel)) / np.sqrt(channels * kernel**2)
    return Winograd.from_dense(Conv2d("w", weight.astype(np.float32)), tile=tile)


def geometry(kernel: int, padding: tuple[int, int, int, int]) -> ConvGeometry:
    return ConvGeometry((kernel, kernel), padding=padding)


HOSTILE = {
    "one of everything": (1, 1, (1, 0, 1, 2), (1, 1)),
    "whole vectors, image narrower than one": (32, 32, (1, 1, 1, 1), (12, 12)),
    "one output": (5, 3, (0, 0, 0, 0), (5, 5)),
    "odd": (33, 17, (1, 1, 1, 1), (13, 5)),
    "asymmetric": (20, 5, (0, 3, 1, 2), (20, 37)),
    "wide": (16, 16, (5, 0, 7, 0), (5, 150)),
    "image at the edge of a page": (16, 16, (1, 1, 1, 1), (8, 8)),
}


CASES = [("odd", *variant) for variant in VARIANTS] + [(name, 4, 3) for name in HOSTILE if name != "odd"]


@pytest.mark.parametrize(("name", "tile", "kernel"), CASES)
def test_winograd_equals_the_convolution(name: str, tile: int, kernel: int) -> None:
    out, channels, padding, image = HOSTILE[name]
    conv = geometry(kernel, padding)
    run = run_kernel(
        member(out, channels, tile, kernel), 2, conv=conv, image=image, epilogue=EVERYTHING, allocate=guarded_buffer
    )
    run.check(TOLERANCE[tile, kernel])


@pytest.mark.parametrize("machine", runnable_machines())
@pytest.mark.parametrize(("tile", "kernel"), [(4, 3), (4, 5)])
def test_every_vector_length_is_right(machine: str, tile: int, kernel: int) -> None:
    conv = geometry(kernel, (1, 1, 1, 1))
    run = run_kernel(
        member(21, 18, tile, kernel), 1, conv=conv, image=(11, 14), machine=machine, allocate=guarded_buffer
    )
    run.check(TOLERANCE[tile, kernel])


@pytest.mark.parametrize("epilogue", ALL_EPILOGUES[::7], ids=str)
def test_every_epilogue_is_inside_the_kernel(epilogue: Any) -> None:
    conv = geometry(3, (1, 1, 1, 1))
    run_kernel(member(19, 6, 4, 3), 1, conv=conv, image=(9, 10), epilogue=epilogue).check()


def position(structure: Any, conv: ConvGeometry, image: tuple[int, int], order: str, batch: int) -> int:
    """The number of the first configuration of an order."""
    out, channels = structure.shape[0], structure.shape[1] // 9
    place = Site((batch, channels, *image), (batch, out, *image), Cpu(16, 32, 2, True), conv=conv)
    return next(i for i, c in enumerate(KERNELS["winograd"].configs(structure, place)) if c["order"] == order)


@pytest.mark.parametrize("order", ["fused", "staged"])
@pytest.mark.parametrize("batch", [1, 3])
def test_both_orders_of_the_work_are_right(order: str, batch: int) -> None:
    structure, conv, image = member(37, 18, 4, 3), geometry(3, (1, 1, 1, 1)), (19, 23)
    config = position(structure, conv, image, order, batch)
    run = run_kernel(
        structure, batch, conv=conv, image=image, config=config, epilogue=EVERYTHING, allocate=guarded_buffer
    )
    run.check(TOLERANCE[4, 3])


@pytest.mark.parametrize("order", ["fused", "staged"])
def test_one_kernel_with_symbolic_batch_serves_every_batch(order: str) -> None:
    structure, conv, image = member(24, 40, 4, 3), geometry(3, (1, 1, 1, 1)), (9, 14)
    config = position(structure, conv, image, order, 1)
    built = build_kernel(structure, None, conv=conv, image=image, config=config, epilogue=EVERYTHING)
    for batch in (1, 2, 9, 17):  # staged kernels take a few images at a time
        run_kernel(structure, batch, built=built, image=image, allocate=guarded_buffer).check(TOLERANCE[4, 3])


def test_the_most_aggressive_tile_keeps_five_digits_on_many_channels() -> None:
    conv = geometry(3, (1, 1, 1, 1))
    run_kernel(member(64, 128, 6, 3), 1, conv=conv, image=(28, 28), allocate=guarded_buffer).check(2e-5)


@pytest.mark.parametrize(("tile", "kernel"), VARIANTS)
def test_opposite_points_share_their_sums(tile: int, kernel: int) -> None:
    """Half of the sums of each pair are saved: in B^T the rows pair up, in A^T the columns do."""

    class Recorder:
        def bind(self, value: Any) -> Any:
            return value

    a_t, _, b_t = transforms(tile, kernel)
    pairs = (tile + kernel - 2) // 2
    assert len(row_pairs(b_t)) == pairs
    values = list(RNG.standard_normal(tile + kernel - 1))
    columns, shared = pair_columns(Recorder(), a_t, values)  # type: ignore[arg-type]
    saved = sum(c != 0 for row in a_t for c in row) - sum(c != 0 for row in shared for c in row)
    assert saved >= pairs * tile
    dense = np.array([[float(c) for c in row] for row in a_t]) @ values
    np.testing.assert_allclose(np.array([[float(c) for c in row] for row in shared]) @ columns, dense, rtol=1e-12)
