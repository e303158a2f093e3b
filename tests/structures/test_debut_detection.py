"""Detection of DeBut chains: planted ones are found, look-alikes are not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_samples import PUBLISHED_CHAINS, random_debut

from tvm_structured.structures import Conv2d
from tvm_structured.structures.debut import DeBut
from tvm_structured.structures.debut_chain import (
    butterfly,
    chain_of,
    num_params,
)
from tvm_structured.structures.debut_lattice import smallest_path, splits_of

few = settings(max_examples=25)
radices = st.integers(1, 4).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(1, 4), min_size=n, max_size=n).map(tuple)] * 2, st.integers(1, 3))
)


@pytest.mark.parametrize("name", [name for name, (shape, *_) in PUBLISHED_CHAINS.items() if math.prod(shape) < 1 << 18])
def test_published_chains_are_found_unasked(name: str) -> None:
    _, count, _, _, rows, columns = PUBLISHED_CHAINS[name]
    planted = random_debut(chain_of(rows, columns), dtype=np.float32)
    found = DeBut.detect(planted.dense())
    assert found is not None and found.num_params <= count and found.error(planted.dense()) <= 1e-6


@few
@given(radices, st.integers(0, 99))
def test_any_planted_chain_is_found_or_no_smaller_than_dense(sizes: Any, seed: int) -> None:
    member = random_debut(chain_of(*sizes[:2]), seed)
    weight = member.dense()
    found = DeBut.detect(weight)
    if member.num_params < weight.size:
        assert found is not None and found.num_params <= member.num_params
    assert found is None or found.error(weight) <= 1e-5


def test_a_convolution_is_flattened_channel_fastest() -> None:
    planted = random_debut(chain_of((4, 2, 2), (9, 4, 2)), dtype=np.float32)
    weight = np.ascontiguousarray(planted.dense().reshape(16, 3, 3, 8).transpose(0, 3, 1, 2))
    found = DeBut.detect(Conv2d("conv", weight))
    assert found is not None and found.num_params <= planted.num_params


def test_what_looks_like_a_member_in_part_is_none() -> None:
    """One wrong block, and zeros that hide the rest from samples."""
    weight = random_debut(butterfly(64), dtype=np.float32).dense()
    weight[:4, :4] += 1.0
    found = DeBut.detect(weight)
    assert found is None or found.error(weight) <= 1e-5
    sparse = np.zeros((64, 64), np.float32)
    sparse[np.random.default_rng(0).permutation(64), np.arange(64)] = 1.0
    found = DeBut.detect(sparse)
    assert found is None or found.error(sparse) <= 1e-5


def test_smallest_path_is_the_cheapest_of_all_paths() -> None:
    shape = (12, 18)
    possible = set(splits_of(shape))
    assert num_params(smallest_path(shape, possible)) == min(num_params(smallest_path(shape, possible)), 12 + 18)
    assert smallest_path(shape, {(1, 1), shape}) == chain_of((12,), (18,))
