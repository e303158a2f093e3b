"""A plan's choices become calls of structured operators; geometry and epilogue stay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tvm
from graph_harness import CLOSE, const, operators, relax_main, run, run_on_kernels, weight
from tvm import ir, relax

from tvm_structured import dialect
from tvm_structured.dialect import LayerCall
from tvm_structured.errors import PlanError
from tvm_structured.relay_passes.canonicalize_layers import CanonicalizeLayers
from tvm_structured.relay_passes.find_layers import find_calls, find_layers
from tvm_structured.relay_passes.fuse_epilogue import FuseEpilogue
from tvm_structured.relay_passes.rewrite_layers import RewriteLayers
from tvm_structured.schedules.base import ConvGeometry, Epilogue
from tvm_structured.structures import Conv2d, Dense, LowRank, Structure, Unstructured, Winograd

RNG = np.random.default_rng(0)
OP = relax.op
W, IMAGE, B, S = weight(RNG, 8, 6), weight(RNG, 8, 6, 3, 3), weight(RNG, 8), weight(RNG, 8)
GEOMETRY = ConvGeometry((3, 3), (2, 1), (1, 0, 0, 2))
EPILOGUE = Epilogue(scale=True, bias=True, residual=True, activation="relu")
dialect.register()


def dense(x: Any, r: Any, w: np.ndarray = W, name: str = "fc", scale: np.ndarray = S) -> LayerCall:
    return LayerCall("dense", name, x, (const(w),), epilogue=EPILOGUE, operands=(const(scale), const(B), r))


def conv(x: Any, r: Any) -> LayerCall:
    return LayerCall("conv2d", "conv", x, (const(IMAGE),), {}, EPILOGUE, (const(S), const(B), r), GEOMETRY)


DENSE_SHAPES, CONV_SHAPES = ((3, 6), (3, 8)), ((2, 6, 9, 8), (2, 8, 4, 8))


def dense_module() -> tvm.IRModule:
    return relax_main(lambda emit, x, r: dense(x, r).to_relax(), *DENSE_SHAPES)


def conv_module() -> tvm.IRModule:
    return relax_main(lambda emit, x, r: conv(x, r).to_relax(), *CONV_SHAPES)


def low_rank(shape: tuple[int, int], rank: int = 2) -> LowRank:
    return LowRank(shape, weight(RNG, shape[0], rank), weight(RNG, rank, shape[1]))


# -- Before / Expected --------------------------------------------------------------------------------------


def test_a_dense_layer_becomes_its_structure() -> None:
    choice = low_rank((8, 6))

    def expected(emit: Any, x: Any, r: Any) -> Any:
        factors, operands = (const(choice.u), const(choice.v)), (const(S), const(B), r)
        return LayerCall("low_rank", "fc", x, factors, {"shape": (8, 6)}, EPILOGUE, operands).to_relax()

    found = RewriteLayers({"fc": choice})(dense_module())
    ir.assert_structural_equal(found, relax_main(expected, *DENSE_SHAPES))


def test_a_convolution_becomes_its_structure_and_keeps_its_geometry() -> None:
    choice = low_rank((8, 54))

    def expected(emit: Any, x: Any, r: Any) -> Any:
        factors, operands = (const(choice.u), const(choice.v)), (const(S), const(B), r)
        return LayerCall("low_rank", "conv", x, factors, {"shape": (8, 54)}, EPILOGUE, operands, GEOMETRY).to_relax()

    found = RewriteLayers({"conv": choice})(conv_module())
    ir.assert_structural_equal(found, relax_main(expected, *CONV_SHAPES))


def test_a_layer_that_stays_dense_takes_its_scale_into_the_weight() -> None:
    def expected(emit: Any, x: Any, r: Any) -> Any:
        epilogue = Epilogue(bias=True, residual=True, activation="relu")
        scaled = (W.astype(np.float64) * S[:, None]).astype(np.float32)
        return LayerCall("dense", "fc", x, (const(scaled),), {}, epilogue, (const(B), r)).to_relax()

    found = RewriteLayers({"fc": Unstructured.from_dense(Dense("fc", W))})(dense_module())
    ir.assert_structural_equal(found, relax_main(expected, *DENSE_SHAPES))


# -- the numbers -----------------------------------------------------------------------------------------------


def reference(linear: np.ndarray, r: np.ndarray) -> np.ndarray:
    """relu(S * linear + B + r), features along axis 1."""
    feature = (1, -1) + (1,) * (linear.ndim - 2)
    return np.maximum(S.reshape(feature) * linear + B.reshape(feature) + r, 0)


@pytest.mark.parametrize("choice", [low_rank((8, 6)), Unstructured((8, 6), W)], ids=lambda c: c.name)
def test_a_rewritten_dense_layer_computes_its_choice(choice: Structure) -> None:
    x, r = weight(RNG, 3, 6), weight(RNG, 3, 8)
    mod = RewriteLayers({"fc": choice})(dense_module())
    np.testing.assert_allclose(run(mod, x, r), reference(x @ choice.dense().T, r), **CLOSE)


@pytest.mark.parametrize(
    "choice", [low_rank((8, 54)), Unstructured.from_dense(Conv2d("conv", IMAGE))], ids=lambda c: c.name
)
def test_a_rewritten_convolution_computes_its_choice(choice: Structure) -> None:
    import torch

    x, r = weight(RNG, 2, 6, 9, 8), weight(RNG, 2, 8, 4, 8)
    w = choice.dense().reshape(8, 3, 3, 6).transpose(0, 3, 1, 2)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 0), (0, 2)))
    linear = torch.conv2d(torch.from_numpy(padded), torch.from_numpy(np.ascontiguousarray(w)), stride=(2, 1)).numpy()
    mod = RewriteLayers({"conv": choice})(conv_module())
    np.testing.assert_allclose(run(mod, x, r), reference(linear, r), **CLOSE)


@pytest.mark.parametrize("name", ["dense", "low_rank"])
def test_a_rewritten_dense_layer_compiles_with_its_kernel(name: str) -> None:
    """Legalised by the operator itself, inside TVM's own pipeline."""
    choice = low_rank((8, 6)) if name == "low_rank" else Unstructured((8, 6), W)
    mod = RewriteLayers({"fc": choice})(dense_module())
    x, r = weight(RNG, 3, 6), weight(RNG, 3, 8)
    np.testing.assert_allclose(run_on_kernels(mod, x, r), reference(x @ choice.dense().T, r), **CLOSE)


# -- factors, sharing, scale ----------------------------------------------------------------------------------------


def twice(scales: tuple[np.ndarray, np.ndarray]) -> tvm.IRModule:
    def body(emit: Any, x: Any, r: Any) -> Any:
        square = weight(np.random.default_rng(1), 8, 8)
        y = emit(dense(x, r, square, scale=scales[0]).to_relax())
        return dense(y, r, square, scale=scales[1]).to_relax()

    return relax_main(body, (3, 8), (3, 8))


def test_all_uses_of_a_layer_share_its_factors() -> None:
    first, second = find_calls(RewriteLayers({"fc": low_rank((8, 8))})(twice((S, B))))["fc"]
    assert all(a.same_as(b) for a, b in zip(first.factors, second.factors, strict=True))


def test_one_scale_for_all_uses_is_folded_into_one_weight() -> None:
    mod = twice((S, S))
    choice = Unstructured.from_dense(find_layers(mod)["fc"])
    rewritten = RewriteLayers({"fc": choice})(mod)
    first, second = find_calls(rewritten)["fc"]
    assert not first.epilogue.scale and first.factors[0].same_as(second.factors[0])
    x, r = weight(RNG, 3, 8), weight(RNG, 3, 8)
    np.testing.assert_allclose(run(rewritten, x, r), run(mod, x, r), **CLOSE)


def test_uses_with_different_scales_keep_one_weight_and_their_scales() -> None:
    mod = twice((S, B))
    ir.assert_structural_equal(RewriteLayers({"fc": Unstructured.from_dense(find_layers(mod)["fc"])})(mod), mod)


def test_winograd_takes_the_scale_into_its_weight() -> None:
    choice = Winograd.from_dense(Conv2d("conv", IMAGE), tile=2)

    def body(emit: Any, x: Any) -> Any:
        epilogue, unit_stride = Epilogue(scale=True, bias=True), ConvGeometry((3, 3), padding=(1, 1, 1, 1))
        call = LayerCall("conv2d", "conv", x, (const(IMAGE),), {}, epilogue, (const(S), const(B)), unit_stride)
        return call.to_relax()

    before = relax_main(body, (2, 6, 9, 8))
    (call,) = find_calls(after := RewriteLayers({"conv": choice})(before))["conv"]
    assert (call.op, call.epilogue) == ("winograd", Epilogue(bias=True))
    x = weight(RNG, 2, 6, 9, 8)
    np.testing.assert_allclose(run(after, x), run(before, x), **CLOSE)


def test_a_structure_without_a_weight_keeps_the_scale_outside() -> None:
    (call,) = find_calls(RewriteLayers({"fc": low_rank((8, 6))})(dense_module()))["fc"]
    assert call.epilogue == EPILOGUE
    assert np.array_equal(call.operands[0].value.numpy(), S)


def test_factors_of_double_precision_are_rounded() -> None:
    choice = low_rank((8, 6))
    double = LowRank(choice.shape, choice.u.astype(np.float64), np.asfortranarray(choice.v.astype(np.float64)))
    ir.assert_structural_equal(
        RewriteLayers({"fc": double})(dense_module()), RewriteLayers({"fc": choice})(dense_module())
    )


def test_layers_that_the_plan_does_not_name_stay() -> None:
    mod = dense_module()
    ir.assert_structural_equal(RewriteLayers({})(mod), mod)


def test_the_models_own_structures_stay() -> None:
    given = low_rank((8, 6))

    def body(emit: Any, x: Any) -> Any:
        return LayerCall("low_rank", "own", x, (const(given.u), const(given.v)), {"shape": (8, 6)}).to_relax()

    mod = relax_main(body, (3, 6))
    ir.assert_structural_equal(RewriteLayers({"own": given})(mod), mod)


def test_the_whole_road_of_a_small_network() -> None:
    w = weight(RNG, 8, 6)
    exact = low_rank((6, 8))

    def body(emit: Any, x: Any) -> Any:
        y = emit(OP.nn.relu(emit(OP.add(emit(OP.matmul(x, const(w.T))), const(B)))))
        return OP.matmul(y, const(exact.dense().T))

    before = relax_main(body, (3, 6))
    mod = FuseEpilogue()(CanonicalizeLayers()(before))
    layers = find_layers(mod)
    choices = {
        "constant_0": Unstructured.from_dense(layers["constant_0"]),
        "constant_1": LowRank.detect(layers["constant_1"]),
    }
    rewritten = RewriteLayers(choices)(mod)
    assert operators(rewritten) == ["relax.structured.dense", "relax.structured.low_rank"]
    x = weight(RNG, 3, 6)
    np.testing.assert_allclose(run(rewritten, x), run(before, x), **CLOSE)


# -- layers that the model holds in structured form -------------------------------------------------------------------


def given_module(call: LayerCall, *shapes: Any) -> tvm.IRModule:
    return relax_main(lambda emit, x, r: replace(call, x=x, operands=(const(S), const(B), r)).to_relax(), *shapes)


GIVEN = low_rank((8, 6)), low_rank((8, 54))
GIVEN_CALLS = [
    LayerCall("low_rank", "fc", None, tuple(map(const, GIVEN[0].factors.values())), GIVEN[0].sizes_of, EPILOGUE),
    replace(
        LayerCall("low_rank", "conv", None, tuple(map(const, GIVEN[1].factors.values())), GIVEN[1].sizes_of, EPILOGUE),
        conv=GEOMETRY,
    ),
]


@pytest.mark.parametrize(
    ("call", "shapes", "op"),
    [(GIVEN_CALLS[0], DENSE_SHAPES, "dense"), (GIVEN_CALLS[1], CONV_SHAPES, "conv2d")],
    ids=["dense", "conv"],
)
def test_a_layer_of_the_model_is_expanded_where_dense_is_chosen(call: LayerCall, shapes: Any, op: str) -> None:
    before = given_module(call, *shapes)
    member = call.to_structure()
    after = RewriteLayers({call.layer: Unstructured(member.shape, member.dense())})(before)
    ((found,),) = find_calls(after).values()
    assert (found.op, found.layer, found.conv, found.epilogue) == (op, call.layer, call.conv, EPILOGUE)
    arrays = [RNG.standard_normal(shape).astype(np.float32) for shape in shapes]
    np.testing.assert_allclose(run_on_kernels(after, *arrays), run_on_kernels(before, *arrays), **CLOSE)


def test_a_layer_of_the_model_stays_where_its_own_structure_is_chosen() -> None:
    before = given_module(GIVEN_CALLS[0], *DENSE_SHAPES)
    ir.assert_structural_equal(RewriteLayers({"fc": GIVEN[0]})(before), before)


# -- refusals -----------------------------------------------------------------------------------------------------


def test_a_choice_of_another_shape_is_an_error_with_both_shapes() -> None:
    with pytest.raises(PlanError, match=r"fc: the plan's low_rank has shape \(8, 7\), the layer's matrix is \(8, 6\)"):
        RewriteLayers({"fc": low_rank((8, 7))})(dense_module())


def test_a_layer_that_the_model_lacks_is_an_error_with_those_it_has() -> None:
    with pytest.raises(PlanError, match=r"names 'fc2', which this model lacks \(its layers: fc\)"):
        RewriteLayers({"fc2": low_rank((8, 6))})(dense_module())


def test_a_structure_that_is_not_defined_for_the_layer_is_an_error() -> None:
    grouped = ConvGeometry((3, 3), groups=2)

    def body(emit: Any, x: Any) -> Any:
        return LayerCall("conv2d", "conv", x, (const(weight(RNG, 8, 3, 3, 3)),), conv=grouped).to_relax()

    with pytest.raises(PlanError, match=r"conv: low_rank is not defined for this Conv2d .*groups 2"):
        RewriteLayers({"conv": low_rank((8, 27))})(relax_main(body, (2, 6, 9, 8)))
