"""`relay.frontend`: models to a Relax module and the dict of its weights, with Relay's signatures.

    mod, params = relay.frontend.from_pytorch(scripted, [("input0", (1, 3, 224, 224))])
    mod, params = relay.frontend.from_onnx(model, {"data": (1, 3, 224, 224)})

`main` of the module takes the inputs under the caller's names and then the weights under the model's own names, which
are also the keys of `params`. Buffers of torch modules (batch-norm statistics) are constants of the module.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tvm_structured.errors import ModelError
from tvm_structured.frontend import Imported, first_line, from_torch, load_file, need, split_params
from tvm_structured.relay.functions import renamed, with_inputs, with_main
from tvm_structured.relay.removed_names import FRONTEND, removed

__all__ = ["from_onnx", "from_pytorch"]


def from_pytorch(
    script_module: Any,
    input_infos: Sequence[Any],
    custom_convert_map: Any = None,
    default_dtype: str = "float32",
    use_parser_friendly_name: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """A torch.jit.ScriptModule, torch.nn.Module or torch.export.ExportedProgram to (mod, params).

    input_infos: (name, shape) or (name, (shape, dtype)) for each argument of `forward`. Where no dtype is given, a
    traced module's own counts, else `default_dtype`. use_parser_friendly_name: weights `a.b` are called `a_b`.
    Raises ModelError for a module that torch cannot export, naming the way out.
    """
    if custom_convert_map:
        raise ModelError(
            "custom_convert_map: Relay converters went with Relay; decompose the operator in torch instead"
        )
    torch = need("torch", "torch")
    infos = [read_info(info) for info in input_infos]
    if isinstance(script_module, torch.jit.ScriptModule):
        from tvm_structured.relay.torchscript import export_script, traced_dtypes

        known = traced_dtypes(script_module)
        examples = make_examples(infos, known if len(known) == len(infos) else (), default_dtype)
        imported = from_torch(export_script(script_module, examples), None)
    elif isinstance(script_module, (torch.nn.Module, torch.export.ExportedProgram)):
        imported = from_torch(script_module, make_examples(infos, (), default_dtype))
    else:
        raise ModelError(
            f"{type(script_module).__name__} is no torch model; give a torch.nn.Module or what torch.jit.trace returns"
        )
    names = [name for name, _, _ in infos]
    return split(imported, names, use_parser_friendly_name, freeze=False)


def from_onnx(
    model: Any,
    shape: Mapping[str, Sequence[int]] | None = None,
    dtype: str | Mapping[str, str] = "float32",
    opset: int | None = None,
    freeze_params: bool = True,
) -> tuple[Any, dict[str, Any]]:
    """An ONNX ModelProto (or path) to (mod, params).

    shape: extents by input name, for inputs that the model leaves open. dtype: by input name, where it is not the
    model's own; as in Relay a single one has no effect. opset: instead of the model's own.
    freeze_params: `mod` carries the values of its weights, so `relay.build` needs no `params` (those given to it win).
    Without it, weights that `relay.build` is not given stay inputs of the compiled module.
    """
    onnx = need("onnx", "onnx")
    from tvm.relax.frontend.onnx import from_onnx as import_onnx

    if isinstance(model, (str, os.PathLike)):
        model = load_file(Path(model))
    if not isinstance(model, onnx.ModelProto):
        raise ModelError(f"{type(model).__name__} is not an ONNX model; give an onnx.ModelProto or a path")
    if not model.graph.node:
        raise ModelError("the ONNX model is empty (no nodes); it may be truncated, export it again")
    shapes = {name: read_shape(name, extents) for name, extents in (shape or {}).items()}
    check_names(model.graph, [*shapes, *(dtype if isinstance(dtype, Mapping) else ())])
    try:
        mod = import_onnx(
            model,
            shape_dict={name: list(extents) for name, extents in shapes.items()},
            dtype_dict=dict(dtype) if isinstance(dtype, Mapping) else dtype,
            opset=opset,
            keep_params_in_input=True,
            sanitize_input_names=False,
        )
    except Exception as error:  # the importer raises its own kinds, KeyError, ValueError, TVMError, ...
        raise ModelError(f"TVM cannot import this ONNX model: {first_line(error)}") from error
    imported = split_params(mod, {})
    return split(imported, [spec.name for spec in imported.inputs], False, freeze_params)


def check_names(graph: Any, names: Sequence[str]) -> None:
    """Raises ModelError for a name that is no input of the graph."""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in weights]
    for name in names:
        if name not in inputs:
            raise ModelError(f"the ONNX model has no input {name!r}; its inputs are: {', '.join(inputs) or 'none'}")


def read_info(info: Any) -> tuple[str, tuple[int, ...], str | None]:
    """(name, shape, dtype or None) of an element of input_infos."""
    if not (isinstance(info, (tuple, list)) and len(info) == 2 and isinstance(info[0], str)):
        raise ModelError(f"input {info!r}: write (name, shape) or (name, (shape, dtype))")
    name, rest = info
    with_dtype = isinstance(rest, (tuple, list)) and len(rest) == 2 and isinstance(rest[1], str)
    shape, dtype = rest if with_dtype else (rest, None)
    return name, read_shape(name, shape), dtype


def read_shape(name: str, shape: Any) -> tuple[int, ...]:
    """Extents as positive integers."""
    try:
        extents = tuple(int(extent) for extent in shape)
    except (TypeError, ValueError):
        raise ModelError(f"{name}: shape {shape!r} is no list of numbers; give every extent, as (1, 3, 8, 8)") from None
    if any(extent < 1 for extent in extents):
        raise ModelError(f"{name}: shape {extents} has an extent below 1; give the real extents")
    return extents


def make_examples(infos: Sequence[Any], known: Sequence[Any], default_dtype: str) -> tuple[Any, ...]:
    """A torch tensor for each input, of the dtype given, else of the one that the trace knows."""
    import torch

    examples = []
    for position, (name, shape, given) in enumerate(infos):
        dtype = known[position] if given is None and known and known[position] else given or default_dtype
        torch_dtype = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
        if not isinstance(torch_dtype, torch.dtype):
            raise ModelError(f"{name}: torch knows no dtype {dtype!r}; use one such as 'float32' or 'int64'")
        examples.append(torch.zeros(shape, dtype=torch_dtype))
    return tuple(examples)


def split(imported: Imported, inputs: Sequence[str], friendly: bool, freeze: bool) -> tuple[Any, dict[str, Any]]:
    """(mod, params): `main` with the parameters renamed; the values beside it and, frozen, with it."""
    import tvm

    main = imported.mod["main"]
    if len(inputs) != len(imported.inputs):
        taken = ", ".join(map(str, imported.inputs)) or "none"
        raise ModelError(f"{len(inputs)} inputs are described, the model takes {len(imported.inputs)} ({taken})")
    weights = [imported.names[var.name] for var in main.params[len(inputs) :]]
    if friendly:
        weights = [name.replace(".", "_") for name in weights]
    names = [*inputs, *weights]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ModelError(f"{twice[0]!r} names two parameters of the model; give the inputs other names")
    params = {
        name: tvm.runtime.tensor(np.asarray(imported.params[var.name]))
        for name, var in zip(weights, main.params[len(inputs) :], strict=True)
    }
    function = with_inputs(renamed(main, names), len(inputs), list(params.values()) if freeze else None)
    return with_main(imported.mod, function), params


def __getattr__(name: str) -> Any:
    if name in ("pytorch", "onnx"):  # relay.frontend.pytorch.from_pytorch was the long way to say it
        import sys

        return sys.modules[__name__]
    raise removed(name, FRONTEND)
