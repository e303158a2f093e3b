"""Dense layers of few rows on CUDA, emulated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_harness import check_on_cpu, cuda_site, every_config
from guarded_buffers import guarded_buffer
from kernel_harness import EVERYTHING

from tvm_structured.structures import Dense, Unstructured


def member(out: int, inner: int) -> Any:
    weight = np.random.default_rng(0).standard_normal((out, inner)) / np.sqrt(inner)
    return Unstructured.from_dense(Dense("weight", weight.astype(np.float32)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("out", "inner"), [(1, 1), (50, 33), (130, 264)])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_dense_equals_the_product(dtype: str, out: int, inner: int, rows: int) -> None:
    check_on_cpu(member(out, inner), rows, dtype=dtype, epilogue=EVERYTHING, allocate=guarded_buffer)


def test_some_configurations_and_symbolic_rows() -> None:
    structure = member(70, 304)
    for config in every_config(structure, cuda_site(structure, 3))[::6]:
        check_on_cpu(structure, 3, config=config, symbolic=True)
