"""The block-circulant kernel: any block, shape, batch and CPU; nothing forgotten, nothing out of bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
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

from tvm_structured.schedules import KERNELS, Cpu, Epilogue, Site, fft
from tvm_structured.structures.block_circulant import BlockCirculant
from tvm_structured.structures.circulant_pattern import Blocks

MACHINES = pytest.mark.parametrize("machine", runnable_machines())
WITH_RESIDUAL = Epilogue(bias=True, residual=True, activation="relu")
BLOCKS = (2, 3, 4, 5, 7, 8, 12, 16, 32, 64, 100)


def member(out: int, inner: int, block: int, taps: int = 1) -> BlockCirculant:
    rng = np.random.default_rng([out, inner, block, taps])
    size = Blocks.of((out, inner), taps, block).factor_shape
    return BlockCirculant((out, inner), taps, rng.standard_normal(size).astype(np.float32))


def configs(structure: BlockCirculant, rows: int, machine: str = "host") -> list[Any]:
    site = Site((rows, structure.shape[1]), (rows, structure.shape[0]), Cpu.of(target_for(machine)))
    return list(KERNELS["block_circulant"].configs(structure, site))


def config_of(mode: str, structure: BlockCirculant, rows: int, machine: str = "host") -> int:
    """The number of the first configuration that evaluates in that way."""
    return [config["mode"] for config in configs(structure, rows, machine)].index(mode)


@MACHINES
@pytest.mark.parametrize(("block", "rows"), [*((n, 17) for n in BLOCKS), *((n, 1) for n in (2, 5, 8, 64))])
def test_padded_matrices_of_any_block_are_multiplied(machine: str, block: int, rows: int) -> None:
    structure = member(131, 203, block)
    run_kernel(structure, rows, machine=machine, epilogue=WITH_RESIDUAL, allocate=guarded_buffer).check()


@MACHINES
@pytest.mark.parametrize(("block", "width"), [(2, 3), (5, 11), (8, 3), (12, 13), (64, 65)])
def test_every_tap_is_padded_by_itself(machine: str, block: int, width: int) -> None:
    structure = member(37, 6 * width, block, taps=6)
    for rows, mode in ((1, "few"), (5, "many")):
        config = config_of(mode, structure, rows, machine)
        run_kernel(structure, rows, machine=machine, config=config, allocate=guarded_buffer).check()


@MACHINES
@pytest.mark.parametrize("mode", ["few", "many", "direct"])
@pytest.mark.parametrize("block", [7, 100, 131])
def test_all_ways_to_evaluate_agree(machine: str, mode: str, block: int) -> None:
    structure = member(150, 140, block)
    config = config_of(mode, structure, 3, machine)
    run_kernel(structure, 3, machine=machine, config=config, epilogue=WITH_RESIDUAL, allocate=guarded_buffer).check()


@pytest.mark.parametrize("config", range(6))
@pytest.mark.parametrize("rows", [1, 4, 20])
def test_every_configuration_gives_the_same_result(config: int, rows: int) -> None:
    structure = member(300, 280, 10)
    if config < len(configs(structure, rows)):
        run_kernel(structure, rows, config=config, allocate=guarded_buffer).check()


@pytest.mark.parametrize("rows", [2, 3, 16, 130])
@pytest.mark.parametrize(("out", "inner", "block"), [(64, 64, 8), (256, 128, 16), (10, 84, 10), (1, 33, 4), (33, 1, 4)])
def test_exact_and_degenerate_shapes(rows: int, out: int, inner: int, block: int) -> None:
    run_kernel(member(out, inner, block), rows, epilogue=EVERYTHING, allocate=guarded_buffer).check()


@pytest.mark.parametrize("block", [7, 16, 64, 131])
def test_one_kernel_with_symbolic_rows_serves_every_batch(block: int) -> None:
    structure = member(131, 203, block)
    built = build_kernel(structure, None, epilogue=EVERYTHING)
    for rows in (1, 2, 3, 16, 17, 130, 300):
        run_kernel(structure, rows, built=built, allocate=guarded_buffer).check()


@pytest.mark.parametrize("rows", [64, 101, 600])
def test_long_batches_are_cut_into_chunks(rows: int) -> None:
    structure = member(40, 72, 8)
    run_kernel(structure, rows, config=config_of("many", structure, rows), allocate=guarded_buffer).check()


@pytest.mark.parametrize("epilogue", ALL_EPILOGUES[::5], ids=str)
def test_the_epilogue_is_inside_the_kernel(epilogue: Any) -> None:
    structure = member(37, 21, 4)
    for rows, mode in ((1, "few"), (9, "many"), (2, "direct")):
        run_kernel(structure, rows, epilogue=epilogue, config=config_of(mode, structure, rows)).check()


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("block", [8, 64])
def test_sums_of_a_thousand_terms_stay_accurate(rows: int, block: int) -> None:
    run_kernel(member(1024, 1024, block), rows).check(2e-6)


@settings(max_examples=10)
@given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 4), st.integers(2, 40), st.integers(1, 20), st.booleans())
def test_any_combination_is_correct(out: int, width: int, taps: int, block: int, rows: int, symbolic: bool) -> None:
    structure = member(out, taps * width, block, taps)
    run_kernel(structure, rows, symbolic=symbolic, epilogue=EVERYTHING, allocate=guarded_buffer).check()


def test_the_way_to_evaluate_follows_rows_and_block() -> None:
    structure = member(512, 512, 16)
    assert configs(structure, 1)[0]["mode"] == "few"
    assert configs(structure, 16)[0]["mode"] == "many"
    # one block each way: two transforms cost more than the product they would save
    assert configs(member(256, 256, 256), 16)[0]["mode"] == "direct"


def test_packed_weights_keep_the_compression() -> None:
    structure = member(512, 1024, 16)
    site = Site((4, 1024), (4, 512), Cpu.of(target_for()))
    kernel = KERNELS["block_circulant"]
    sizes = {
        mode: kernel.pack(structure, site, configs(structure, 4)[config_of(mode, structure, 4)])["weight"].size
        for mode in ("few", "many", "direct")
    }
    assert sizes["few"] == structure.num_params
    assert sizes["many"] == structure.num_params * 23 // 16  # three reals for each of 7 complex bins, 2 real bins
    assert sizes["direct"] == 2 * structure.num_params


# -- the transforms, run on numbers -----------------------------------------------------------------


class Numbers:
    """Does at once what an Emitter would emit; a vector is an array of `lanes` numbers."""

    lanes = 8

    def splat(self, value: float) -> np.ndarray:
        return np.full(self.lanes, float(value))

    def bind(self, value: np.ndarray) -> np.ndarray:
        return value

    def shuffle(self, a: np.ndarray, b: np.ndarray, lanes: Sequence[int]) -> np.ndarray:
        return np.concatenate([a, b])[list(lanes)]


@pytest.mark.parametrize("n", [*range(1, 50), 60, 64, 81, 97, 100, 128])
def test_transforms_of_any_length_equal_numpys(n: int) -> None:
    x = np.random.default_rng(n).standard_normal((n, Numbers.lanes))
    spectrum = fft.real_fft(Numbers(), list(x))
    assert [k for k, (_, im) in enumerate(spectrum) if im is None] == sorted({0, n // 2} if n % 2 == 0 else {0})
    expected = np.fft.rfft(x, axis=0)
    np.testing.assert_allclose([re for re, _ in spectrum], expected.real, atol=1e-11)
    np.testing.assert_allclose([0 * re if im is None else im for re, im in spectrum], expected.imag, atol=1e-11)
    np.testing.assert_allclose(fft.real_ifft(Numbers(), spectrum, n), n * x, atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_interleaving_moves_elements_between_blocks_and_lanes(n: int) -> None:
    blocks = np.arange(Numbers.lanes * n).reshape(Numbers.lanes, n)
    vectors = list(blocks.reshape(n, Numbers.lanes))
    elements = fft.deinterleave(Numbers(), vectors)
    np.testing.assert_array_equal(elements, blocks.T)
    np.testing.assert_array_equal(fft.interleave(Numbers(), elements), vectors)
