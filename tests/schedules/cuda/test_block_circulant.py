"""Block-circulant on CUDA, emulated: blocks of every kind, padding, taps, both domains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_harness import check_on_cpu, cuda_site, every_config
from guarded_buffers import guarded_buffer
from kernel_harness import EVERYTHING

from tvm_structured.structures.block_circulant import BlockCirculant
from tvm_structured.structures.circulant_pattern import Blocks


def member(out: int, inner: int, block: int, taps: int = 1) -> Any:
    shape = Blocks.of((out, inner), taps, block).factor_shape
    c = np.random.default_rng(0).standard_normal(shape) / np.sqrt(inner)
    return BlockCirculant((out, inner), taps, c.astype(np.float32))


@pytest.mark.parametrize(
    ("out", "inner", "block", "taps"),
    [(48, 64, 8, 1), (30, 50, 5, 1), (40, 36, 16, 2), (3, 2, 2, 1)],
)
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_equals_the_matrix(out: int, inner: int, block: int, taps: int, rows: int) -> None:
    dtype = ("float32", "float16", "bfloat16")[(rows + block) % 3]
    options = {"dtype": dtype, "epilogue": EVERYTHING, "allocate": guarded_buffer}
    check_on_cpu(member(out, inner, block, taps), rows, **options)


@pytest.mark.parametrize(("block", "rows"), [(37, 2), (37, 20), (100, 9)])
def test_long_blocks(block: int, rows: int) -> None:
    check_on_cpu(member(100, 150, block), rows)


@pytest.mark.parametrize("rows", [2, 20])
def test_configurations_and_symbolic_rows(rows: int) -> None:
    structure = member(96, 160, 16)
    for config in every_config(structure, cuda_site(structure, rows))[::4]:
        check_on_cpu(structure, rows, config=config, symbolic=True)
