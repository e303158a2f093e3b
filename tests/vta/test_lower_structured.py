"""Chains and structured layers as programs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering_harness import CONFIGS, DEFAULT, bias, check, int8, names, requantize, residual, seeds

from tvm_structured.errors import VTAError
from tvm_structured.structures import BlockCirculant, PermutedDiagonal
from tvm_structured.vta import Memory
from tvm_structured.vta.lower import Schedule, lower, problem_of, tile_matrix
from tvm_structured.vta.operators import (
    Int8BlockDiagonal,
    Int8Chain,
    Int8Dense,
    Int8StructuredDense,
    Requantize,
)
from tvm_structured.vta.timing import model


def block_diagonal(
    rng: np.random.Generator, groups: int, inner: int, out: int, last: bool = False
) -> Int8BlockDiagonal:
    count = groups * out
    return Int8BlockDiagonal(
        int8(rng, groups if rng.integers(2) else 1, out, inner), bias(rng, count), requantize(rng, count),
        residual(rng) if last else None, "stage", groups,
        rng.permutation(groups * inner) if rng.integers(2) else None,
        rng.permutation(count) if rng.integers(2) else None,
    )  # fmt: skip


@settings(max_examples=30)
@given(names, seeds, st.integers(1, 3), st.integers(1, 9), st.integers(1, 20), st.integers(1, 20))
def test_block_diagonal_factors(config: str, seed: int, n: int, groups: int, inner: int, out: int) -> None:
    rng = np.random.default_rng(seed)
    layer = block_diagonal(rng, groups, inner, out, last=True)
    shapes = [(n, groups * inner)] + [(n, groups * out)] * (layer.num_inputs - 1)
    check(layer, shapes, CONFIGS[config], rng)


@settings(max_examples=25)
@given(names, seeds, st.integers(1, 3), st.integers(1, 2))
def test_chains(config: str, seed: int, n: int, threads: int) -> None:
    rng = np.random.default_rng(seed)
    first = block_diagonal(rng, 6, 7, 4)
    second = block_diagonal(rng, 3, 8, 10)
    dense = Int8Dense(int8(rng, 35, 30), bias(rng, 35), requantize(rng, 35))
    last = block_diagonal(rng, 5, 7, 3, last=True)
    chain = Int8Chain((first, second, dense, last))
    shapes = [(n, 42)] + [(n, 15)] * (chain.num_inputs - 1)
    lowered = check(chain, shapes, CONFIGS[config], rng, threads=threads)
    assert lowered.sizes["scratch"] > 0


def test_the_vectors_of_a_chain_pass_through_memory_once() -> None:
    rng = np.random.default_rng(0)
    v = Int8Dense(int8(rng, 32, 512), None, Requantize(shift=9))
    u = Int8Dense(int8(rng, 256, 32), None, Requantize(shift=7))
    lowered = lower(Int8Chain((v, u), "low rank"), [(1, 512)])
    counts = dict(
        zip(("inp", "wgt", "acc", "uop", "out"), lowered.program.counts.sum(axis=0)[:5].tolist(), strict=True)
    )
    assert counts["out"] == 32 + 256 and counts["inp"] == 512 + 32
    assert counts["wgt"] == 32 * 512 + 256 * 32


@pytest.mark.parametrize("config", ["default", "block 8", "tiny"])
def test_structured_layers_are_exact_and_say_how(config: str) -> None:
    rng = np.random.default_rng(1)
    circulant = BlockCirculant((100, 130), 1, int8(rng, 2, 3, 64))
    diagonal = PermutedDiagonal.from_dense(int8(rng, 90, 120).astype(np.float32), block=40)
    diagonal = replace(diagonal, diagonals=diagonal.diagonals.astype(np.int8))
    for structure in (circulant, diagonal):
        out, inner = structure.shape
        layer = Int8StructuredDense(structure, bias(rng, out), requantize(rng, out), residual(rng))
        shapes = [(2, inner)] + [(2, out)] * (layer.num_inputs - 1)
        lowered = check(layer, shapes, CONFIGS[config], rng)
        assert "modelled cycles" in lowered.reason
        dense = lower(layer.expanded, shapes, CONFIGS[config])
        assert model(lowered.program).cycles <= model(dense.program).cycles
        assert ("transform" in lowered.reason) == (structure is circulant and layer.residual is None)


def test_equal_tiles_of_a_circulant_are_loaded_once() -> None:
    rng = np.random.default_rng(2)
    layer = Int8StructuredDense(BlockCirculant((512, 512), 1, int8(rng, 4, 4, 128)), None, Requantize(shift=12))
    lowered = check(layer, [(1, 512)], DEFAULT, rng)
    loaded = lowered.program.counts[:, 1].sum() // DEFAULT.element_bytes(Memory.WGT)
    assert loaded == 4 * 4 * 128 // 16  # each of 16 blocks has 8 different tiles of 64
    assert "equal ones loaded once" in lowered.reason.split(":")[0]


def test_a_matrix_of_zeros_loads_no_weights() -> None:
    rng = np.random.default_rng(3)
    layer = Int8StructuredDense(BlockCirculant((48, 32), 1, np.zeros((3, 2, 16), np.int8)), bias(rng, 48))
    lowered = check(layer, [(3, 32)], DEFAULT, rng)
    assert lowered.program.counts[:, 1].sum() == 0


def test_schedules_go_through_json_and_wrong_ones_are_refused() -> None:
    rng = np.random.default_rng(4)
    chain = Int8Chain((Int8Dense(int8(rng, 20, 30)), Int8Dense(int8(rng, 10, 20))), "fc")
    for schedule in problem_of(chain, [(1, 30)], DEFAULT).schedules():
        assert Schedule.from_json(schedule.to_json()) == schedule
        check(chain, [(1, 30)], DEFAULT, rng, schedule=schedule)
    with pytest.raises(VTAError, match="fc: Schedule"):
        lower(chain, [(1, 30)], schedule=Schedule())
    with pytest.raises(VTAError, match="not a schedule"):
        Schedule.from_json({"threads": 2})
    with pytest.raises(VTAError, match="threads=3"):
        Schedule(threads=3)


@pytest.mark.parametrize("largest", [0, 1 << 24])
def test_different_tiles_in_a_part_are_counted(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_matrix, "LARGEST_TABLE", largest)
    rng = np.random.default_rng(5)
    for _ in range(20):
        height, width, kinds = (int(rng.integers(1, most)) for most in (20, 20, 9))
        place = np.sort(rng.permutation(height * width)[: int(rng.integers(1, 200))])
        kinds = min(kinds, len(place))
        numbers = np.concatenate([np.arange(kinds), rng.integers(0, kinds, len(place) - kinds)])  # each is used
        entries = np.stack([place % height, place // height, rng.permutation(numbers)], axis=1)
        matrix = tile_matrix.TileMatrix(height, width, entries, np.zeros((kinds, 1, 1), np.int8))
        rows, columns = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        parts: dict[tuple[int, int], set[int]] = {}
        for row, column, number in entries.tolist():
            parts.setdefault((row // rows, column // columns), set()).add(number)
        assert matrix.most_tiles(rows, columns) == max(map(len, parts.values()))


@pytest.mark.parametrize("block", [1, 2, 8, 16])
def test_equal_tiles_are_found(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(block)
    kinds = rng.integers(-2, 2, (30, block, block)).astype(np.int8)
    tiles = kinds[rng.integers(0, 30, 200)]
    first, number = tile_matrix.first_of_equal(tiles)
    np.testing.assert_array_equal(tiles[first][number], tiles)
    assert len(first) == len({tile.tobytes() for tile in tiles})
    zeros = np.zeros(1, np.uint64)  # factors for which all sums are equal
    monkeypatch.setattr(tile_matrix, "random_factors", lambda count: zeros.repeat(count))
    first, number = tile_matrix.first_of_equal(tiles)
    np.testing.assert_array_equal(tiles[first][number], tiles)
    assert len(first) == len({tile.tobytes() for tile in tiles})
