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
from tvm_structured.structures.block_circulant import BlockCirculant
from tvm_structured.structures.circulant_pattern import Blocks
from tvm_structured.structures.debut import DeBut

FAMILIES = pytest.mark.parametrize("family", STRUCTURES.values(), ids=STRUCTURES)
USUAL = ((24, 36), (12, 8, 3, 3), (10, 12, 5, 5))  # large enough for every family
TOLERANCE = {"float32": 2e-5, "float64": 1e-10}  # relative: a few hundred terms, Winograd's transforms
# the chains printed in the paper and its code: shape, numbers, compression of the layer in %, bulging, r, s
PUBLISHED_CHAINS = {
    "lenet.fc1.mono2": ((128, 400), 7680, 85.0, False, (16, 2, 1, 2, 2), (25, 2, 2, 2, 2)),
    "lenet.fc1.mono1": ((128, 400), 4224, 91.75, False, (8, 2, 2, 2, 2), (25, 2, 2, 2, 2)),
    "lenet.fc1.bulge1": ((128, 400), 7296, 85.75, True, (8, 4, 2, 2), (5, 5, 4, 4)),
    "lenet.fc1.bulge3": ((128, 400), 8960, 82.5, True, (16, 2, 2, 1, 2), (25, 1, 2, 2, 4)),
    "lenet.conv2.bulge1": ((16, 72), 512, 55.56, True, (4, 1, 2, 2), (3, 2, 6, 2)),
    "lenet.conv2.bulge3": ((16, 72), 672, 41.67, True, (4, 2, 1, 2), (3, 2, 2, 6)),
    "lenet.conv2.mono1": ((16, 72), 288, 75.0, False, (2, 1, 2, 4), (3, 3, 2, 4)),
    "lenet.fc2": ((64, 128), 896, 89.06, False, (2,) * 6, (4, 2, 2, 2, 2, 2)),
    "vgg.conv13.mono3": ((512, 4608), 75776, 96.79, False, (8, 2, 2, 2, 2, 2, 2), (9, 2, 2, 2, 4, 4, 4)),
    "vgg.conv12.mono1": ((512, 4608), 63488, 97.31, False, (8, 2, 2, 2, 2, 2, 2), (9, 4, 2, 2, 2, 4, 4)),
    "vgg.conv13.bulge1": ((512, 4608), 81920, 96.53, True, (4, 4, 2, 2, 2, 2, 2), (3, 3, 4, 2, 4, 4, 4)),
    "vgg.conv8.mono2": ((512, 2304), 37888, 96.79, False, (8, 2, 2, 2, 2, 2, 2), (9, 2, 2, 2, 4, 4, 2)),
    "vgg.conv2.mono1": ((64, 576), 3456, 90.62, False, (4, 1, 2, 8), (8, 2, 4, 9)),
    "vgg.fc1.butterfly": ((512, 512), 9216, 96.48, False, (2,) * 9, (2,) * 9),
    "resnet50.l4.0.conv1.bulge": ((512, 1024), 23552, 95.51, True, (4, 2, 2, 2, 2, 2, 2, 2), (2, 2, 2, 4, 2, 2, 4, 2)),
    "resnet50.l4.x.conv2.bulge": ((512, 4608), 120832, 94.88, True, (16, 2, 2, 2, 2, 2), (9, 2, 4, 4, 4, 4)),
    "resnet50.l4.x.conv3": ((2048, 512), 24576, 97.66, False, (4, *(2,) * 5, 4, 2, 2), (2,) * 9),
    "resnet50.l4.12.conv1.bulge": ((512, 2048), 110592, 89.45, True, (4, 4, 4, 4, 2), (1, 4, 4, 16, 8)),
    "resnet50.l4.12.conv1.mono": ((512, 2048), 27648, 97.36, False, (4, 4, 2, 4, 2, 2), (4, 4, 4, 4, 4, 2)),
    "resnet50.l4.0.conv1.mono": ((512, 1024), 18432, 96.48, False, (4, 4, 4, 4, 2), (4, 4, 4, 4, 4)),
}


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


def random_debut(chain: Any, seed: int = 0, dtype: Any = np.float64) -> DeBut:
    rng = np.random.default_rng(seed)
    grids = tuple((rng.standard_normal((f.blocks, f.r, f.s, f.t)) / math.sqrt(f.s)).astype(dtype) for f in chain)
    return DeBut((chain[-1].p, chain[0].q), chain, grids)


def random_circulant(rng: np.random.Generator, shape: tuple[int, int], block: int, taps: int = 1) -> BlockCirculant:
    size = Blocks.of(shape, taps, block).factor_shape
    return BlockCirculant(shape, taps, rng.standard_normal(size))
