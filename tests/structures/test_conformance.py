"""What every member of STRUCTURES promises of detection and projection. A new family is covered by its table line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structure_samples import (
    FAMILIES,
    TOLERANCE,
    USUAL,
    distance,
    expected_output,
    make_input,
    make_layer,
    members,
    scrambled,
    some_sizes,
    with_torch,
    works_on_images,
)

from tvm_structured.structures import STRUCTURES, Budget, Conv2d, as_layer

APPROXIMATE = pytest.mark.parametrize(
    "family", [f for f in STRUCTURES.values() if not f.is_lossless], ids=lambda f: f.name
)
OPTIMAL = pytest.mark.parametrize(
    "family", [f for f in STRUCTURES.values() if f.is_frobenius_optimal], ids=lambda f: f.name
)
SHAPES = (
    (1, 1), (1, 12), (12, 1), (2, 2), (7, 13), (12, 18), (30, 20),
    (8, 6, 3, 3), (7, 5, 3, 3), (6, 4, 1, 1), (5, 3, 5, 5), (1, 3, 3, 3), (4, 8, 1, 3),
)  # fmt: skip


# -- the table ------------------------------------------------------------------------------------------


def test_tables_use_the_name_of_the_family():
    assert all(name == family.name for name, family in STRUCTURES.items())


@FAMILIES
def test_sizes_are_smaller_than_dense_and_come_smallest_first(family):
    for shape in USUAL:
        layer = make_layer(shape)
        counts = [family.from_dense(layer, **size).num_params for size in some_sizes(family, layer, 12)]
        assert counts == sorted(counts)
        assert family.is_lossless or all(count < layer.num_params for count in counts)


# -- detect ---------------------------------------------------------------------------------------------


@FAMILIES
def test_planted_member_is_detected(family):
    for layer, size, member in members(family):
        planted = layer.with_matrix(member.dense())
        found = family.detect(planted)
        assert found is not None, f"{family.name} {size} of {layer.weight.shape} was not recognised"
        assert type(found) is family
        assert distance(found.dense(), planted.matrix) <= 1e-5
        assert found.num_params <= member.num_params


@FAMILIES
def test_random_members_are_recovered(family):
    """Whatever the factors hold, not only what a projection makes of them."""
    rng = np.random.default_rng(8)
    for layer, size, member in members(family):
        planted = layer.with_matrix(scrambled(member, rng).dense())
        assert family.from_dense(planted, **size).error(planted) <= 1e-5
        found = family.detect(planted)
        assert found is not None and found.error(planted) <= 1e-5, f"{family.name} {size} of {layer.weight.shape}"
        assert found.num_params <= member.num_params


@FAMILIES
def test_planted_member_is_detected_under_float32_rounding(family):
    rng = np.random.default_rng(5)
    for layer, size, member in members(family, dtype="float64", count=2):
        noise = 1e-7 * np.abs(member.dense()).max() * rng.standard_normal(member.shape)
        planted = layer.with_matrix((member.dense() + noise).astype(np.float32))
        found = family.detect(planted)
        assert found is not None and found.num_params <= member.num_params, f"{family.name} {size}"


@APPROXIMATE
def test_random_weight_is_no_member(family):
    for shape in USUAL:
        assert family.detect(make_layer(shape)) is None


@APPROXIMATE
def test_noise_above_the_tolerance_hides_a_member(family):
    rng = np.random.default_rng(6)
    for layer, _, member in members(family, count=1):
        noise = 1e-2 * np.linalg.norm(member.dense()) / np.sqrt(layer.num_params) * rng.standard_normal(member.shape)
        noisy = layer.with_matrix((member.dense() + noise).astype(np.float32))
        assert family.detect(noisy) is None
        assert family.detect(noisy, tol=2e-2) is not None


@FAMILIES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_detection_of_hostile_shapes_is_none_or_right(family, shape):
    for weight in (make_layer(shape).weight, np.zeros(shape, np.float32), np.ones(shape, np.float32)):
        found = family.detect(weight)
        assert found is None or distance(found.dense(), as_layer(weight).matrix) <= 1e-5


@FAMILIES
def test_grouped_convolutions_are_not_taken(family):
    layer = Conv2d("grouped", make_layer((8, 6, 3, 3)).weight, groups=2)
    assert family.detect(layer) is None
    assert family.project(layer, 1.0) is None


@FAMILIES
def test_the_weight_is_left_as_it_was(family):
    for shape in USUAL:
        layer = make_layer(shape)
        before = layer.weight.copy()
        family.detect(layer)
        family.project(layer, 0.5)
        np.testing.assert_array_equal(layer.weight, before)


# -- from_dense and project -----------------------------------------------------------------------------


@FAMILIES
def test_projection_is_idempotent(family):
    for layer, size, member in members(family, (*USUAL, (30, 20), (7, 13), (7, 5, 3, 3)), dtype="float64"):
        again = family.from_dense(layer.with_matrix(member.dense()), **size)
        assert distance(again.dense(), member.dense()) <= 1e-9


@OPTIMAL
def test_no_member_is_nearer_than_the_projection(family):
    rng = np.random.default_rng(7)
    for layer, size, member in members(family, (*USUAL, (7, 13), (7, 5, 3, 3)), dtype="float64"):
        best = distance(member.dense(), layer.matrix)
        for scale in (1e-3, 1e-1, 1.0):
            # another member by moving the factors, and (for what is discrete) by projecting another matrix
            moved = {
                name: array + scale * array.std() * rng.standard_normal(array.shape)
                for name, array in member.factors.items()
                if name in member.trainable_factors
            }
            factors = list({**member.factors, **moved}.values())
            other = layer.with_matrix(layer.matrix + scale * rng.standard_normal(layer.matrix.shape))
            for rival in (family.from_factors(member.sizes_of, factors), family.from_dense(other, **size)):
                assert distance(rival.dense(), layer.matrix) >= best - 1e-12


@OPTIMAL
def test_the_error_of_a_projection_does_not_grow_along_the_gradient(family):
    """Stationarity: at the nearest member the squared distance has no slope in any factor."""
    for layer, _, member in members(family, dtype="float64", count=2):
        held = with_torch(member, requires_grad=True)
        loss = ((held.dense() - torch.tensor(layer.matrix)) ** 2).sum()
        trained = [held.factors[name] for name in held.trainable_factors]
        for gradient in torch.autograd.grad(loss, trained):
            assert float(gradient.abs().max()) <= 1e-8 * float(loss.detach())


@FAMILIES
def test_projection_stays_within_every_budget(family):
    budgets = [
        *(Budget(max_params=f) for f in (0.9, 0.5, 0.25, 0.1, 0.04)),
        *(Budget(max_flops=f) for f in (0.9, 0.5, 0.2)),
        *(Budget(max_error=e) for e in (0.95, 0.8, 0.3, 1e-3)),
        Budget(max_params=0.5, max_flops=0.5, max_error=0.9),
    ]
    for shape in (*USUAL, (7, 13), (30, 20), (7, 5, 3, 3)):
        layer = make_layer(shape)
        for budget in budgets:
            member = family.project(layer, budget)
            if member is None:
                continue
            assert budget.max_params is None or member.num_params <= budget.max_params * layer.num_params
            assert budget.max_flops is None or member.flops(layer.rows(1)) <= budget.max_flops * layer.flops(1)
            assert budget.max_error is None or distance(member.dense(), layer.matrix) <= budget.max_error + 1e-6


@APPROXIMATE
def test_projection_reaches_what_some_size_reaches(family):
    for shape in USUAL:
        layer = make_layer(shape)
        for size in some_sizes(family, layer):
            member = family.from_dense(layer, **size)
            found = family.project(layer, member.num_params / layer.num_params * (1 + 1e-9))
            assert found is not None, f"{family.name} has {size} but found nothing"
            assert found.num_params <= member.num_params


@APPROXIMATE
def test_projection_finds_a_planted_member(family):
    """A weight that already is a member loses nothing by a budget that the member keeps."""
    for layer, _, member in members(family):
        planted = layer.with_matrix(member.dense())
        found = family.project(planted, min(1.0, member.num_params / layer.num_params * (1 + 1e-9)))
        assert found is not None and distance(found.dense(), planted.matrix) <= 1e-5


@APPROXIMATE
def test_projection_answers_none_to_a_budget_nobody_can_reach(family):
    layer = make_layer((24, 36))
    for budget in (Budget(max_params=1e-9), Budget(max_flops=1e-9), Budget(max_error=1e-9), 1e-9):
        assert family.project(layer, budget) is None


@FAMILIES
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_shape_projects_to_a_member_of_that_shape(family, data):
    convolution = works_on_images(family) or data.draw(st.booleans())
    kernel = data.draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (1, 3)])) if convolution else ()
    shape = (data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)), *kernel)
    layer = make_layer(shape, "float64", data.draw(st.integers(0, 99)))
    sizes = some_sizes(family, layer, 8)
    if not sizes:
        return
    size = data.draw(st.sampled_from(sizes))
    member = family.from_dense(layer, **size)
    assert np.asarray(member.dense()).shape == layer.matrix.shape
    assert abs(member.error(layer) - distance(member.dense(), layer.matrix)) <= 1e-12
    if family.is_frobenius_optimal:  # zero is a member, at distance 1
        assert member.error(layer) <= 1 + 1e-12
    x = make_input(family, layer, (2,), "float64")
    assert distance(member.apply(x), expected_output(family, layer, member, x)) <= TOLERANCE["float64"]
