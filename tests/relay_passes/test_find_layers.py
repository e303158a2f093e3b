"""Finding reads the calls of structured operators and changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from graph_harness import const, relax_main, weight
from tvm import ir, relax

from tvm_structured import dialect
from tvm_structured.dialect import LayerCall
from tvm_structured.errors import ModelError
from tvm_structured.relay_passes.canonicalize_layers import CanonicalizeLayers
from tvm_structured.relay_passes.find_layers import find_calls, find_layers, find_structures
from tvm_structured.structures import Conv2d, Dense, LowRank

RNG = np.random.default_rng(0)
OP = relax.op
IMAGE, MATRIX = weight(RNG, 6, 2, 3, 2), weight(RNG, 6, 6)
U, V = weight(RNG, 6, 1), weight(RNG, 1, 6)
dialect.register()


def network(emit: Any, x: Any) -> Any:
    """A grouped convolution, one matrix used twice, and between the uses a layer that is structured already."""
    y = emit(OP.nn.conv2d(x, const(IMAGE), strides=(1, 2), padding=(1, 0, 2, 3), dilation=(2, 1), groups=3))
    y = emit(OP.mean(y, [2, 3]))
    y = emit(OP.matmul(y, emit(OP.permute_dims(const(MATRIX)))))
    y = emit(LayerCall("low_rank", "given", y, (const(U), const(V)), {"shape": (6, 6)}).to_relax())
    return OP.matmul(y, emit(OP.permute_dims(const(MATRIX))))


def canonical(batch: Any = 2) -> tvm.IRModule:
    return CanonicalizeLayers()(relax_main(network, (batch, 6, 9, 8)))


def test_layers_come_in_order_of_use_and_shared_ones_once() -> None:
    layers = find_layers(canonical())
    assert [(name, type(layer)) for name, layer in layers.items()] == [("constant_0", Conv2d), ("constant_1", Dense)]
    assert np.array_equal(layers["constant_1"].weight, MATRIX)


@pytest.mark.parametrize("batch", [2, tvm.tirx.Var("n", "int64")], ids=["static", "symbolic"])
def test_a_convolution_knows_its_geometry(batch: Any) -> None:
    layer = find_layers(canonical(batch))["constant_0"]
    assert isinstance(layer, Conv2d)
    assert np.array_equal(layer.weight, IMAGE)
    assert (layer.stride, layer.padding, layer.dilation, layer.groups) == ((1, 2), (1, 0, 2, 3), (2, 1), 3)
    assert (layer.input_hw, layer.output_hw) == ((9, 8), (8, 5))


def test_calls_are_all_uses_of_a_layer() -> None:
    assert {name: [call.op for call in calls] for name, calls in find_calls(canonical()).items()} == {
        "constant_0": ["conv2d"],
        "constant_1": ["dense", "dense"],
        "given": ["low_rank"],
    }


def test_structures_are_those_the_model_holds_itself() -> None:
    ((name, structure),) = find_structures(canonical()).items()
    assert (name, type(structure)) == ("given", LowRank)
    np.testing.assert_allclose(structure.dense(), U @ V, rtol=1e-6)


def test_layers_in_branches_are_found() -> None:
    from tvm.script import ir as I
    from tvm.script import relax as R

    @I.ir_module
    class Branches:
        @R.function
        def main(x: R.Tensor((4, 6), "float32"), flag: R.Tensor((), "bool"), w: R.Tensor((6, 6), "float32")):
            R.func_attr({"num_input": 2})
            if flag:
                y = R.matmul(x, w)
            else:
                y = R.nn.relu(x)
            return y

    assert list(find_layers(CanonicalizeLayers({"w": MATRIX}, {"w": "fc"})(Branches))) == ["fc"]


def test_finding_changes_nothing() -> None:
    mod = canonical()
    before = tvm.IRModule(dict(mod.functions_items()))
    find_layers(mod), find_calls(mod), find_structures(mod)
    ir.assert_structural_equal(mod, before)


def test_a_module_without_layers_has_none() -> None:
    mod = relax_main(lambda emit, x: OP.nn.relu(x), (2, 3))
    assert find_layers(mod) == {} == find_structures(mod)


def test_a_weight_that_is_no_constant_is_an_error_that_says_so() -> None:
    mod = relax_main(lambda emit, x, w: LayerCall("dense", "fc", x, (w,)).to_relax(), (2, 3), (4, 3))
    with pytest.raises(ModelError, match="fc: the weight is not a constant; bind"):
        find_layers(mod)
