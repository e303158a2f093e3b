"""The permuted-diagonal kernel: its four ways, and what they are made of."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import EVERYTHING, build_kernel, check_all_guarded, run_kernel, runnable_machines, target_for

from tvm_structured.schedules import KERNELS, Cpu, Site
from tvm_structured.schedules.diagonal_blocks import DiagonalBlocks
from tvm_structured.schedules.emit import Emitter, arg, prim_func
from tvm_structured.schedules.shuffles import deinterleave, interleave, rotate
from tvm_structured.structures import as_layer
from tvm_structured.structures.permuted_diagonal import PermutedDiagonal

KERNEL = KERNELS["permuted_diagonal"]
MACHINES = pytest.mark.parametrize("machine", runnable_machines())
LANES = {"llvm": 4, "haswell": 8, "skylake-avx512": 16}


def member(out, inner, p, taps=1, natural=False, seed=0):
    """Random diagonals, in the padding too: kernels must not trust that it is zero."""
    rng = np.random.default_rng([seed, out, inner, p])
    shape = -(-out // p), taps * -(-inner // taps // p)
    shifts = np.arange(shape[0] * shape[1]).reshape(shape) % p if natural else rng.integers(0, p, shape)
    return PermutedDiagonal((out, inner), taps, rng.standard_normal((*shape, p)).astype(np.float32), shifts)


def ways(structure, rows, machine):
    """(number, config) of the first configuration of each way."""
    site = Site((rows, structure.shape[1]), (rows, structure.shape[0]), Cpu.of(target_for(machine)))
    first = {}
    for number, config in enumerate(KERNEL.configs(structure, site)):
        first.setdefault(config["way"], number)
    return first


# -- which way ------------------------------------------------------------------------------------------


@MACHINES
def test_separable_shifts_become_products_and_others_permutations(machine):
    natural, best = member(256, 256, 4, natural=True), member(256, 256, 4)
    for rows in (1, 128):
        assert next(iter(ways(natural, rows, machine))) == "gemm"
        few = "permute" if LANES[machine] > 4 else "slices"
        assert next(iter(ways(best, rows, machine))) == (few if rows == 1 else "rows")
        assert "gemm" not in ways(best, rows, machine)


def test_long_blocks_and_few_block_rows_go_by_slices():
    wide = runnable_machines()[-1]
    lanes = LANES[wide]
    assert list(ways(member(256, 256, lanes + 1), 4, wide)) == ["slices", "rows"]
    assert next(iter(ways(member(2 * lanes, 256, lanes), 4, wide))) == "slices"


@MACHINES
@pytest.mark.parametrize("p", [2, 3, 5, 8, 10, 16, 33])
def test_every_way_computes_the_product(guarded, machine, p):
    cases = []
    for out, inner, taps in ((8 * p + 3, 17 * p + 1, 1), (3 * p - 1, 4 * (p + 1), 4)):
        for natural, rows in ((False, 5), (True, 1)):
            structure = member(out, inner, p, taps, natural)
            for config in ways(structure, rows, machine).values():
                cases.append({"structure": structure, "rows": (rows,), "config": config, "machine": machine})
    assert guarded(check_all_guarded, cases) == len(cases) >= 4


def test_rows_in_lanes_are_worked_on_in_pieces_that_fit_the_cache(monkeypatch):
    monkeypatch.setattr("tvm_structured.schedules.permuted_diagonal_rows.PIECE_BYTES", 1)  # a tile to a core
    structure, machine = member(70, 90, 8), runnable_machines()[-1]
    tile = LANES[machine]
    for rows in (1, 2 * tile, 7 * tile - 3):
        run_kernel(structure, rows, config=ways(structure, rows, machine)["rows"], machine=machine).check()


@pytest.mark.parametrize("way", ["permute", "gemm", "slices", "rows"])
def test_every_way_has_the_epilogue_inside_and_serves_symbolic_rows(way):
    structure, machine = member(90, 77, 6, natural=True), runnable_machines()[-1]
    options = {"machine": machine, "epilogue": EVERYTHING}
    for rows in (3, 40):
        run_kernel(structure, rows, config=ways(structure, rows, machine)[way], **options).check()
    symbolic = tvm.tirx.Var("rows", "int64")
    built = build_kernel(structure, None, config=ways(structure, symbolic, machine)[way], **options)
    for rows in (1, 8, 33, 130):
        run_kernel(structure, rows, built=built).check()


def test_numbers_that_lie_in_the_padding_do_not_count():
    structure = member(13, 22, 5)
    changed = structure.diagonals.copy()
    inside = DiagonalBlocks.of(structure).diagonals != 0
    changed[~inside] = 1e30
    poisoned = PermutedDiagonal(structure.shape, 1, changed, structure.shifts)
    assert (~inside).any()
    for number in ways(poisoned, 3, "host").values():
        plain, run = (run_kernel(s, 3, config=number) for s in (structure, poisoned))
        np.testing.assert_array_equal(plain.y, run.y)


# -- separable shifts -----------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(2, 9), st.integers(0, 10**6), st.floats(0, 0.9))
def test_separable_shifts_are_found_behind_blocks_of_zeros(rows, columns, p, seed, zeros):
    rng = np.random.default_rng(seed)
    shifts = (rng.integers(0, p, rows)[:, None] + rng.integers(0, p, columns)) % p
    used = rng.random((rows, columns)) >= zeros
    diagonals = np.where(used[:, :, None], rng.standard_normal((rows, columns, p)), 0)
    shifts = np.where(used, shifts, rng.integers(0, p, (rows, columns)))  # a block of zeros has any shift
    structure = PermutedDiagonal((rows * p, columns * p), 1, diagonals, shifts)
    separated = DiagonalBlocks.of(structure).separated
    assert separated is not None
    f, g = separated
    assert ((f[:, None] + g)[used] % p == shifts[used]).all()


def test_one_shift_out_of_line_does_not_separate():
    structure = member(40, 40, 5, natural=True)
    structure.shifts[3, 4] = (structure.shifts[3, 4] + 1) % 5
    assert DiagonalBlocks.of(structure).separated is None


def test_natural_indexing_separates_for_every_layer():
    rng = np.random.default_rng(0)
    for shape in ((30, 44), (7, 100), (12, 10, 3, 3)):
        for p in (2, 3, 5, 7):
            layer = as_layer(rng.standard_normal(shape).astype(np.float32))
            natural = PermutedDiagonal.from_dense(layer, block=p, indexing="natural")
            assert DiagonalBlocks.of(natural).separated is not None


# -- shuffles -------------------------------------------------------------------------------------------


@MACHINES
@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 16])
def test_tiles_are_transposed_and_rotated_in_registers(machine, p):
    target = target_for(machine)
    e = Emitter(Cpu.of(target))
    rng = np.random.default_rng(p)
    tile = rng.standard_normal((p, e.lanes)).astype(np.float32)
    shifts = rng.integers(0, p, e.lanes).astype(np.int32)
    with prim_func("tiles") as made:
        source, amounts = arg("source", (p, e.lanes)), arg("amounts", (e.lanes,), "int32")
        results = [arg(name, (p, e.lanes)) for name in ("flat", "columns", "rotated")]
        vectors = [e.bind(e.load(source, c, 0)) for c in range(p)]
        bits = [
            e.load(amounts, 0) & tvm.tirx.const(1 << b, f"int32x{e.lanes}") for b in range(max(1, (p - 1).bit_length()))
        ]
        made_vectors = interleave(e, vectors), deinterleave(e, vectors), rotate(e, vectors, bits)
        for result, values in zip(results, made_vectors, strict=True):
            for c, value in enumerate(values):
                e.store(result, value, c, 0)
    library = tvm.compile(made.func.with_attr("global_symbol", "main"), target)
    tensors = [tvm.runtime.tensor(v) for v in (tile, shifts, *(np.zeros_like(tile) for _ in range(3)))]
    library["main"](*tensors)
    flat, columns, rotated = (tensor.numpy() for tensor in tensors[2:])
    np.testing.assert_array_equal(flat, tile.T.reshape(p, e.lanes))
    np.testing.assert_array_equal(columns, tile.reshape(e.lanes, p).T)
    lane = np.arange(e.lanes)
    np.testing.assert_array_equal(rotated, tile[(np.arange(p)[:, None] + shifts) % p, lane])
