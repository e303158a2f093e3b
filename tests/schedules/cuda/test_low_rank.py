"""Low rank on CUDA, emulated: every shape, type and epilogue."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_harness import check_on_cpu, cuda_site, every_config
from guarded_buffers import guarded_buffer
from kernel_harness import EVERYTHING

from tvm_structured.schedules import Epilogue
from tvm_structured.structures.low_rank import LowRank


def member(out: int, inner: int, rank: int) -> Any:
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((out, rank)), rng.standard_normal((rank, inner)) / np.sqrt(rank * inner)
    return LowRank((out, inner), u.astype(np.float32), v.astype(np.float32))


@pytest.mark.parametrize(("out", "inner", "rank"), [(1, 1, 1), (50, 33, 3), (300, 512, 17)])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_low_rank_equals_the_two_products(out: int, inner: int, rank: int, rows: int) -> None:
    dtype = ("float32", "float16", "bfloat16")[(rows + rank) % 3]
    check_on_cpu(member(out, inner, rank), rows, dtype=dtype, epilogue=EVERYTHING, allocate=guarded_buffer)


@pytest.mark.parametrize("activation", Epilogue.ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    check_on_cpu(member(20, 40, 4), 2, epilogue=Epilogue(bias=True, activation=activation, low=-0.5, high=0.75))


@pytest.mark.parametrize("rows", [2, 40])
def test_every_configuration_and_symbolic_rows(rows: int) -> None:
    structure = member(70, 304, 9)
    for config in every_config(structure, cuda_site(structure, rows))[::5]:
        check_on_cpu(structure, rows, config=config, symbolic=True)


@pytest.mark.parametrize(("rows", "split"), [(20, 4), (33, 8)])
def test_products_split_along_k(rows: int, split: int) -> None:
    structure = member(45, 1030, 12)
    tiles = {"thin": (16, 64, 64, 1, 4, 4, split), "wide": (16, 64, 64, 1, 4, 4, 2)}
    check_on_cpu(structure, rows, dtype="float16", config={"way": "many", **tiles}, epilogue=EVERYTHING)
