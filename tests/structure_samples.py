"""Layers, members and references for the conformance tests of structures.

A family that accepts only convolutions works on images: its `apply` takes (batch, in, h, w) and is the convolution
without padding. All others take rows: `apply` is a product with `dense()`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from tvm_structured.structures import STRUCTURES, Dense, TensorTrain, as_layer

FAMILIES = pytest.mark.parametrize("family", STRUCTURES.values(), ids=STRUCTURES)
USUAL = ((24, 36), (12, 8, 3, 3), (10, 12, 5, 5))  # large enough for every family
TOLERANCE = {"float32": 2e-5, "float64": 1e-10}  # relative: a few hundred terms, Winograd's transforms


def make_layer(shape, dtype="float32", seed=0):
    rng = np.random.default_rng([seed, *shape])
    return as_layer(rng.standard_normal(shape).astype(dtype), "some.weight")


def some_sizes(family, layer, count=3):
    """The first sizes, and the last one."""
    sizes = list(itertools.islice(family.sizes(layer), 200)) if family.takes(layer) else []
    return sizes[:count] + sizes[count:][-1:]


def members(family, shapes=USUAL, dtype="float32", count=3):
    """(layer, size, member) for several layers and sizes; there is at least one."""
    found = []
    for shape in shapes:
        layer = make_layer(shape, dtype)
        found += [(layer, size, family.from_dense(layer, **size)) for size in some_sizes(family, layer, count)]
    assert found, f"{family.name} has no member for any of {shapes}"
    return found


def scrambled(member, rng):
    """Another member of the same size: random factors, indices in another order."""
    factors = [
        rng.standard_normal(array.shape).astype(array.dtype)
        if name in member.trainable_factors
        else rng.permutation(array.reshape(-1)).reshape(array.shape)
        for name, array in member.factors.items()
    ]
    return type(member).from_factors(member.sizes_of, factors)


def works_on_images(family):
    return Dense not in family.accepts


def make_input(family, layer, lead, dtype, seed=1):
    rng = np.random.default_rng(seed)
    if works_on_images(family):
        kh, kw = layer.kernel
        return rng.standard_normal((2, layer.weight.shape[1], kh + 6, kw + 3)).astype(dtype)
    return rng.standard_normal((*lead, layer.matrix.shape[1])).astype(dtype)


def expected_output(family, layer, member, x):
    """In float64, from `dense()` alone."""
    matrix = np.asarray(member.dense(), np.float64)
    if works_on_images(family):
        weight = torch.from_numpy(np.ascontiguousarray(layer.with_matrix(matrix).weight))
        return torch.conv2d(torch.from_numpy(x.astype(np.float64)), weight).numpy()
    return x.astype(np.float64) @ matrix.T


def distance(a, b):
    """Relative Frobenius distance of two arrays, written out."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.sqrt(((a - b) ** 2).sum()) / (np.sqrt((b**2).sum()) or 1.0)


def with_torch(member, dtype=torch.float64, requires_grad=False):
    """The member with its factors as tensors (indices keep their type)."""
    factors = []
    for name, array in member.factors.items():
        tensor = torch.tensor(np.asarray(array))
        if name in member.trainable_factors:
            tensor = tensor.to(dtype).requires_grad_(requires_grad)
        factors.append(tensor)
    return type(member).from_factors(member.sizes_of, factors)


def random_train(out_modes: Any, in_modes: Any, rank: Any, seed: int = 0, dtype: Any = np.float64) -> TensorTrain:
    """A train with normally distributed cores; `rank` of every bond, or a list of them."""
    rng = np.random.default_rng(seed)
    inner = [rank] * (len(out_modes) - 1) if isinstance(rank, int) else list(rank)
    ranks = [1, *inner, 1]
    cores = tuple(
        rng.standard_normal((ranks[k], m, n, ranks[k + 1])).astype(dtype)
        for k, (m, n) in enumerate(zip(out_modes, in_modes, strict=True))
    )
    return TensorTrain((math.prod(out_modes), math.prod(in_modes)), tuple(out_modes), tuple(in_modes), cores)
