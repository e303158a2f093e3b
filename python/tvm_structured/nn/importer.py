"""Exported programs to Relax: one structured operator of torch --> one `R.structured.*` call.

    tvm_structured.structured_linear(x, [p_fc1_c], p_fc1_bias, "block_circulant", sizes)
        --> R.structured.block_circulant(x, p_fc1_c, p_fc1_bias, layer="fc1.weight", sizes=...)

The factors stay arguments, so that parameters may be bound before or after.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from tvm_structured.dialect import LayerCall, register
from tvm_structured.errors import KernelNotFoundError
from tvm_structured.nn import ops as ops  # registers the torch operators that the map names
from tvm_structured.schedules import KERNELS, ConvGeometry, Epilogue

Converter = Callable[[Any, Any], Any]


def custom_convert_map(program: Any = None) -> dict[str, Converter]:
    """Converters for `from_exported_program(program, custom_convert_map=...)`.

    Layers are named "<module path>.weight", like their dense twins. With the program (or its graph signature's
    `inputs_to_parameters`) the path is that of the factors; without it, that of the calling module.
    """
    register()  # also for kernels that were added to the table since TVM was imported
    names = parameter_names(program)

    def linear(node: Any, importer: Any) -> Any:
        return emit(node, importer, names, None)

    def conv2d(node: Any, importer: Any) -> Any:
        kernel, stride, padding, dilation = (tuple(v) for v in node.args[5:9])
        return emit(node, importer, names, ConvGeometry(kernel, stride, padding, dilation))

    return {"structured_linear.default": linear, "structured_conv2d.default": conv2d}


def parameter_names(program: Any) -> dict[str, str]:
    """Graph input -> parameter or buffer path: p_fc1_c -> fc1.c."""
    if program is None:
        return {}
    if isinstance(program, Mapping):
        return dict(program)
    signature = program.graph_signature
    return {**signature.inputs_to_parameters, **signature.inputs_to_buffers}


def emit(node: Any, importer: Any, names: Mapping[str, str], conv: ConvGeometry | None) -> Any:
    """The Relax call of one structured operator, with its bias in the epilogue."""
    x, factors, bias, structure, sizes = node.args[:5]
    layer = layer_name(node, names)
    if structure not in KERNELS:
        raise KernelNotFoundError(f"{layer}: no kernel is registered for {structure!r}; add it to schedules.KERNELS")
    call = LayerCall(
        structure,
        layer,
        importer.env[x],
        tuple(importer.env[factor] for factor in factors),
        json.loads(sizes),
        Epilogue(bias=bias is not None),
        () if bias is None else (importer.env[bias],),
        conv,
    )
    return importer.block_builder.emit(call.to_relax())


def layer_name(node: Any, names: Mapping[str, str]) -> str:
    """ "fc1.weight" for the factor parameter "fc1.c", else for the calling module "fc1"."""
    paths = [names[factor.name] for factor in node.args[1] if factor.name in names]
    if paths:
        owner = paths[0].rpartition(".")[0]
    else:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        owner = stack[-1][0] if stack else ""
        owner = re.sub(r"@\d+$", "", owner)  # torch marks the second use of a module as fc1@1
    return f"{owner}.weight" if owner else "weight"
