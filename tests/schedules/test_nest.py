"""What the default schedules read off a block: strides along its loops."""

from __future__ import annotations

from typing import Any

from operator_samples import CASES, F32, functions_of
from tvm import tirx

from tvm_structured.schedules.nest import Nest, collapse, same_extent
from tvm_structured.schedules.producers import open_schedule


def nests_of(name: str, *shapes: tuple[Any, ...]) -> list[Nest]:
    largest = max(functions_of(CASES[name][0], *((s, F32) for s in shapes)), key=lambda func: len(func.script()))
    opened = open_schedule(largest)
    assert opened is not None
    return opened[1]


def strides(nest: Nest) -> list[tuple[Any, ...]]:
    return [(loop.extent, *loop.strides) for loop in nest.loops]


def test_strides_of_a_matrix_product_tell_reuse_from_vectors() -> None:
    product, epilogue = nests_of("matmul", (100, 70), (70, 130))
    # extent; stride of the store, of the left and of the right matrix
    assert strides(product) == [(100, 130, 70, 0), (130, 1, 0, 1), (70, 0, 1, 130)]
    assert [loop.is_reduction for loop in product.loops] == [False, False, True]
    assert strides(epilogue) == [(100, 130, 130), (130, 1, 1)]


def test_padding_stays_a_block_and_its_loops_are_known_to_branch() -> None:
    padding, pooling = nests_of("max_pool", (1, 9, 33, 35))[:2]
    assert [loop.branches for loop in padding.loops] == [False, True, True]
    assert not any(loop.branches for loop in pooling.loops)
    assert strides(pooling)[2] == (18, 1, 2)


def test_unit_loops_are_dropped() -> None:
    (nest,) = nests_of("gelu", (1, 5, 1, 7))
    assert [loop.extent for loop in nest.loops] == [5, 7]


def test_groups_hidden_in_a_channel_index_become_loops() -> None:
    nests = nests_of("group_norm", (2, 12, 7, 9), (12,), (12,))
    assert [loop.extent for loop in nests[0].spatial] == [2, 4]
    assert [loop.extent for loop in nests[-1].loops] == [2, 4, 3, 7, 9]
    assert all(None not in loop.strides for nest in nests for loop in nest.loops)


def test_loops_every_access_crosses_alike_become_one() -> None:
    (nest,) = nests_of("gelu", (3, 5, 7))
    assert [loop.extent for loop in collapse(nest, nest.loops)] == [105]


def test_loops_a_broadcast_tells_apart_stay_apart() -> None:
    (nest,) = nests_of("broadcast", (5, 7, 64, 9), (1, 7, 64, 9))
    assert [loop.extent for loop in collapse(nest, nest.loops)] == [5, 4032]


def test_symbolic_extents_give_symbolic_strides() -> None:
    (nest,) = nests_of("gelu", (3, tirx.Var("n", "int64"), 7))
    n = nest.loops[1].extent
    assert same_extent(nest.loops[0].strides[0], n * 7)
    (loop,) = collapse(nest, nest.loops)
    assert same_extent(loop.extent, n * 21)


def test_what_softmax_exponentiates_is_computed_once() -> None:
    names = [nest.sch.get(nest.block).name_hint for nest in nests_of("softmax", (3, 5, 197))]
    assert sum("exp" in name and "sum" not in name for name in names) == 1
