"""DeBut on CUDA, emulated: chains of every kind, merged and not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from cuda_harness import check_on_cpu, cuda_site, every_config
from guarded_buffers import guarded_buffer
from kernel_harness import EVERYTHING

from tvm_structured.structures.debut import DeBut
from tvm_structured.structures.debut_chain import chain_of

CHAINS = {
    "one factor": ((5,), (7,), 3),
    "binary": ((2,) * 6, (2,) * 6, 1),
    "primes": ((3, 5, 7), (2, 9, 4), 1),
    "bulging": ((16, 2, 2, 1, 2), (25, 1, 2, 2, 4), 1),
    "monarch": ((12, 12), (12, 12), 1),
}


def member(name: str) -> DeBut:
    chain = chain_of(*CHAINS[name])
    rng = np.random.default_rng(0)
    grids = tuple((rng.standard_normal((f.blocks, f.r, f.s, f.t)) / math.sqrt(f.s)).astype(np.float32) for f in chain)
    return DeBut((chain[-1].p, chain[0].q), chain, grids)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize(("rows", "dtype"), [(1, "float32"), (3, "float16"), (17, "bfloat16")])
def test_equals_the_matrix(name: str, rows: int, dtype: str) -> None:
    check_on_cpu(member(name), rows, dtype=dtype, epilogue=EVERYTHING, allocate=guarded_buffer)


def test_configurations_and_symbolic_rows() -> None:
    structure: Any = member("primes")
    for config in every_config(structure, cuda_site(structure, 3))[::4]:
        check_on_cpu(structure, 3, config=config, symbolic=True)
    check_on_cpu(structure, 3, config={"cuts": [0, 1, 2, 3], "threads": 64, "rows": 2})
