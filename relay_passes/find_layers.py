"""module  -->  its layers. Reads only."""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import ir, relax

from tvm_structured.dialect import LayerCall
from tvm_structured.structures import Layer, Structure


def find_layers(mod: Any) -> dict[str, Layer]:
    """Layer name -> layer, in order of first use: every canonical dense and conv2d call, shared weights once."""
    layers = {}
    for name, calls in find_calls(mod).items():
        canonical = next((call for call in calls if call.is_canonical), None)
        if canonical is not None:
            layers[name] = canonical.to_layer()
    return layers


def find_structures(mod: Any) -> dict[str, Structure]:
    """Layer name -> structure, for the layers that the model itself holds in structured form."""
    return {
        name: calls[0].to_structure()
        for name, calls in find_calls(mod).items()
        if not any(call.is_canonical for call in calls)
    }


def find_calls(mod: Any) -> dict[str, list[LayerCall]]:
    """Layer name -> all calls of structured operators that use it, canonical or not, in order of use."""
    calls: dict[str, list[LayerCall]] = {}

    def visit(call: Any) -> None:
        unpacked = LayerCall.of(call)
        if unpacked is not None:
            calls.setdefault(unpacked.layer, []).append(unpacked)

    for _, function in mod.functions_items():
        if isinstance(function, relax.Function):
            tvm_ffi.structural_walk(function, (ir.Call, visit))
    return calls
