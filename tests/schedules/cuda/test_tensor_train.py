"""Tensor train on CUDA, emulated: both ways, one to four cores, odd modes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_harness import check_on_cpu, cuda_site, every_config
from guarded_buffers import guarded_buffer
from kernel_harness import EVERYTHING

from tvm_structured.structures.tensor_train import TensorTrain


def member(out_modes: tuple[int, ...], in_modes: tuple[int, ...], rank: int) -> Any:
    rng = np.random.default_rng(0)
    ranks = [1, *[rank] * (len(out_modes) - 1), 1]
    cores = [
        (rng.standard_normal((ranks[k], m, n, ranks[k + 1])) / np.sqrt(n * ranks[k + 1])).astype(np.float32)
        for k, (m, n) in enumerate(zip(out_modes, in_modes, strict=True))
    ]
    shape = int(np.prod(out_modes)), int(np.prod(in_modes))
    return TensorTrain(shape, out_modes, in_modes, tuple(cores))


SHAPES = [((4, 4, 4), (4, 4, 8), 3), ((5, 3), (7, 2), 4), ((6,), (9,), 1), ((2, 3, 2, 5), (3, 2, 4, 2), 2)]


@pytest.mark.parametrize(("out_modes", "in_modes", "rank"), SHAPES)
@pytest.mark.parametrize(("rows", "dtype"), [(1, "float32"), (2, "float16"), (18, "bfloat16"), (17, "float32")])
def test_equals_the_matrix(out_modes: Any, in_modes: Any, rank: int, rows: int, dtype: str) -> None:
    options = {"dtype": dtype, "epilogue": EVERYTHING, "allocate": guarded_buffer}
    check_on_cpu(member(out_modes, in_modes, rank), rows, **options)


def test_configurations_and_symbolic_rows() -> None:
    structure = member((4, 8, 4), (8, 4, 4), 4)
    for config in every_config(structure, cuda_site(structure, 3))[::4]:
        check_on_cpu(structure, 3, config=config, symbolic=True)
