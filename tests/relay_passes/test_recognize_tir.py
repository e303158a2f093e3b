"""TensorIR of the ONNX importer is read as the operator it came from, and nothing else is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from graph_harness import (
    CLOSE,
    canonical,
    node,
    only_call,
    onnx_model,
    onnx_runtime,
    operators,
    relax_main,
    run,
    weight,
)
from tvm import relax, topi

from tvm_structured import dialect
from tvm_structured.relay_passes.recognize_tir import recognize
from tvm_structured.schedules.base import Epilogue

# torch's own export and serialisation code warns of its own deprecations
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

RNG = np.random.default_rng(0)
OP = relax.op
CONV, B6, S6 = weight(RNG, 6, 3, 3, 3), weight(RNG, 6), weight(RNG, 6)
N = tvm.tirx.Var("n", "int64")
dialect.register()


CLIPS: dict[str, tuple[list[Any], dict[str, Any], int, str, tuple[float, float]]] = {
    "two_inputs": ([node("Clip", "h lo hi", "y")], {"lo": np.float32(0), "hi": np.float32(6)}, 17, "clip", (0.0, 6.0)),
    "negative": ([node("Clip", "h lo hi", "y")], {"lo": np.float32(-1), "hi": np.float32(1)}, 17, "clip", (-1.0, 1.0)),
    "lower_only": ([node("Clip", "h lo", "y")], {"lo": np.float32(0)}, 17, "relu", (0.0, 0.0)),
    "attributes": ([node("Clip", "h", "y", min=-0.5, max=2.0)], {}, 9, "clip", (-0.5, 2.0)),
    "nan_is_no_bound": (
        [node("Clip", "h lo hi", "y")], {"lo": np.float32(0), "hi": np.float32(np.nan)}, 17, "relu", (0.0, 0.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CLIPS)
def test_onnx_clip_is_an_activation(case: str) -> None:
    nodes, bounds, opset, activation, (low, high) = CLIPS[case]
    model = onnx_model([node("Conv", "x w", "h"), *nodes], {"w": CONV, **bounds}, (2, 3, 5, 6), (2, 6, 3, 4), opset)
    mod = canonical(model)
    assert operators(mod) == ["relax.structured.conv2d"]
    assert only_call(mod).epilogue == Epilogue(activation=activation, low=low, high=high)
    assert [var.name_hint for var in mod.get_global_vars()] == ["main"]  # the importer's functions are gone
    x = weight(RNG, 2, 3, 5, 6)
    np.testing.assert_allclose(run(mod, x), onnx_runtime(model, x), **CLOSE)


def tir_call(function: Any, *shapes: Any, name: str, **options: Any) -> tuple[tvm.IRModule, Any]:
    """A module with one call_tir of a TE function under a name, and that call."""
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(list(shape), "float32")) for i, shape in enumerate(shapes)]
    with builder.function("main", inputs):
        with builder.dataflow():
            y = builder.emit_output(builder.call_te(function, *inputs, primfunc_name_hint=name, **options))
        builder.emit_func_output(y)
    mod = builder.get()
    return mod, mod["main"].body.blocks[0].bindings[0].value


PADS = {"pad_before": [0, 0, 1, 0], "pad_after": [0, 0, 2, 3]}
RECOGNISED = {
    "pad": (topi.nn.pad, [(N, 3, 5, 6)], PADS, "relax.nn.pad"),
    "maximum": (topi.maximum, [(N, 6), ()], {}, "relax.maximum"),
    "minimum2": (topi.minimum, [(4, 6), (6,)], {}, "relax.minimum"),
    "einsum": (lambda x, w: topi.einsum("ai,oi->ao", x, w), [(N, 5), (6, 5)], {}, "relax.einsum"),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_what_tvm_generates_is_recognised(name: str) -> None:
    function, shapes, options, operator = RECOGNISED[name]
    mod, call = tir_call(function, *shapes, name=name, **options)
    meaning = recognize(mod, call)
    assert meaning.op.name == operator
    if operator == "relax.nn.pad":
        assert [int(width) for width in meaning.attrs.pad_width] == [0, 0, 0, 0, 1, 2, 0, 3]


IMPOSTORS = {
    "pad_with_ones": ("pad", lambda x: topi.nn.pad(x, **PADS, pad_value=1.0), [(2, 3, 5, 6)]),
    "mirror": ("pad", lambda x: topi.nn.mirror_pad(x, PADS["pad_before"], PADS["pad_after"]), [(2, 3, 5, 6)]),
    "other_name": ("clip_above", topi.maximum, [(4, 6), ()]),
    "swapped": ("maximum", topi.minimum, [(4, 6), ()]),
    "almost": ("minimum", lambda x, y: topi.minimum(x, y) + 1.0, [(4, 6), ()]),
    "reduced": ("einsum", lambda x, w: topi.einsum("ai,oi->o", x, w), [(4, 5), (6, 5)]),
    "summed": ("einsum", lambda x, w: topi.einsum("ai,oj->ao", x, w), [(4, 5), (6, 5)]),
}


@pytest.mark.parametrize("case", IMPOSTORS)
def test_a_name_alone_does_not_make_an_operator(case: str) -> None:
    name, function, shapes = IMPOSTORS[case]
    assert recognize(*tir_call(function, *shapes, name=name)) is None


def test_other_expressions_are_not_recognised() -> None:
    mod = relax_main(lambda emit, x: OP.nn.relu(x), (2, 3))
    assert recognize(mod, mod["main"].body.blocks[0].bindings[0].value) is None
    assert recognize(mod, mod["main"].params[0]) is None
