"""Random members to train from: of the size that was asked for, from the generator alone, refused like projections."""

from __future__ import annotations

import numpy as np
import pytest
from structure_samples import FAMILIES, USUAL, make_layer, some_sizes

from tvm_structured.errors import ModelError
from tvm_structured.structures import STRUCTURES


def weightless(layer):
    """The layer's geometry; its values must not matter."""
    return layer.with_matrix(np.broadcast_to(np.float32(0), layer.matrix.shape))


@FAMILIES
def test_a_drawn_member_has_the_size_of_a_projected_one(family):
    for shape in USUAL:
        layer = make_layer(shape)
        for size in some_sizes(family, layer):
            projected = family.from_dense(layer, **size)
            drawn = family.drawn(weightless(layer), np.random.default_rng(0), **size)
            assert type(drawn) is family and drawn.sizes_of == projected.sizes_of
            assert drawn.trainable_factors == projected.trainable_factors
            for name, factor in projected.factors.items():
                assert drawn.factors[name].shape == factor.shape
            for name in drawn.trainable_factors:
                assert drawn.factors[name].dtype == np.float32 and np.isfinite(drawn.factors[name]).all()
            assert np.linalg.norm(drawn.dense()) > 0


@FAMILIES
def test_the_generator_decides(family):
    layer = make_layer(next(shape for shape in USUAL if some_sizes(family, make_layer(shape))))
    size = some_sizes(family, layer)[0]
    first, again, other = (family.drawn(layer, np.random.default_rng(seed), **size).dense() for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("low_rank", {"rank": 0}),
        ("low_rank", {"rank": 25}),
        ("block_circulant", {"block": 1}),
        ("permuted_diagonal", {"block": 1}),
        ("permuted_diagonal", {"block": 4, "indexing": "odd"}),
        ("tensor_train", {"out_modes": (4, 5), "in_modes": (6, 6), "rank": 2}),
        ("tensor_train", {"out_modes": (4, 6), "in_modes": (6, 6), "rank": (2, 2)}),
    ],
)
def test_impossible_sizes_are_refused_as_by_projection(name, size):
    layer = make_layer((24, 36))
    with pytest.raises(ModelError):
        STRUCTURES[name].from_dense(layer, **size)
    with pytest.raises(ModelError):
        STRUCTURES[name].drawn(layer, np.random.default_rng(0), **size)


@FAMILIES
def test_a_refitted_member_keeps_its_size_and_is_not_farther_in_the_outputs(family):
    for shape in USUAL:
        layer = make_layer(shape)
        x = np.random.default_rng(1).standard_normal((500, layer.matrix.shape[1]))
        x[:, ::2] *= 5
        moments = x.T @ x / len(x)
        for size in some_sizes(family, layer, 1):
            member = family.from_dense(layer, **size)
            refitted = member.refit(layer, moments)
            if refitted is None:  # no closed form
                continue
            assert refitted.sizes_of == member.sizes_of and refitted.describe() == member.describe()
            assert refitted.output_error(layer, moments) <= member.output_error(layer, moments) + 1e-6
