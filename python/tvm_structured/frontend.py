"""Models to Relax: torch modules, exported programs (.pt2), ONNX models and files, Relax modules."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvm_structured.errors import EnvironmentMismatchError, ModelError
from tvm_structured.half_precision import results_of_own_type
from tvm_structured.inputs import Input

SUFFIXES = (".onnx", ".pt2")


@dataclass(frozen=True, eq=False)
class Imported:
    """A Relax module whose `main` takes the inputs and then the weights.

    params: Relax variable name -> value. names: Relax variable name -> the model's own parameter name.
    """

    mod: Any
    inputs: tuple[Input, ...]
    params: dict[str, np.ndarray]
    names: dict[str, str]


def import_model(model: Any, inputs: Any = None) -> Imported:
    """Import a model; `inputs` are example arrays (needed for a torch.nn.Module, optional otherwise).

    Raises ModelError for a model that cannot be read and EnvironmentMismatchError for a missing importer.
    """
    from tvm import IRModule

    if isinstance(model, (str, os.PathLike)):
        model = load_file(Path(model))
    if isinstance(model, IRModule):
        return from_relax(model)
    family = type(model).__module__.partition(".")[0]
    if family == "onnx":
        return from_onnx(model, inputs)
    if is_torch(model):
        return from_torch(model, inputs)
    raise ModelError(
        f"{type(model).__name__} is not a model; give a torch.nn.Module, a torch.export.ExportedProgram, "
        "an ONNX model or path, or a Relax IRModule"
    )


def is_torch(model: Any) -> bool:
    """Whether torch made it, without importing torch where nobody has."""
    import sys

    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, (torch.nn.Module, torch.export.ExportedProgram))


def load_file(path: Path) -> Any:
    """An .onnx file or a torch.export .pt2 file."""
    if not path.exists():
        raise ModelError(f"{path}: no such file")
    if path.suffix not in SUFFIXES:
        raise ModelError(f"{path}: unknown kind of model {path.suffix or '(no suffix)'!r}; give an .onnx or .pt2 file")
    if path.suffix == ".onnx":
        onnx = need("onnx", "onnx")
        try:
            return onnx.load(str(path))
        except Exception as error:  # protobuf's DecodeError has moved between its releases
            raise ModelError(f"{path}: not a readable ONNX file ({first_line(error)}); export it again") from None
    torch = need("torch", "torch")
    importlib.import_module("tvm_structured.nn.ops")  # the file may name our operators
    try:
        return torch.export.load(str(path))
    except Exception as error:  # torch.export.load raises whatever its archive reader does
        raise ModelError(f"{path}: not a readable torch.export file ({first_line(error)}); save it again") from None


def need(package: str, extra: str) -> Any:
    """Import an optional package, or say how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise EnvironmentMismatchError(
            f"{package} is not installed; run: pip install 'tvm-structured[{extra}]'"
        ) from None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for one-line messages."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def as_tuple(inputs: Any) -> tuple[Any, ...] | None:
    """Example inputs as a tuple; a lone array is a tuple of one."""
    if inputs is None or isinstance(inputs, tuple):
        return inputs
    if isinstance(inputs, Mapping):
        return tuple(inputs.values())
    if isinstance(inputs, list):
        return tuple(inputs)
    return (inputs,)


def from_torch(model: Any, inputs: Any) -> Imported:
    """A module is exported in evaluation mode (its own mode is restored); a program is taken as it is."""
    import torch
    from tvm.relax.frontend.torch import from_exported_program

    from tvm_structured.nn.importer import custom_convert_map
    from tvm_structured.torch_graphs import simplify
    from tvm_structured.torch_operators import CONVERTERS

    if isinstance(model, torch.nn.Module):
        model = export(model, as_tuple(inputs))
    model = simplify(model)
    try:
        with warnings.catch_warnings(), results_of_own_type():
            # TVM's importer calls a part of torch's pytree that torch has deprecated
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            mod = from_exported_program(
                model,
                keep_params_as_input=True,
                unwrap_unit_return_tuple=True,
                custom_convert_map={**CONVERTERS, **custom_convert_map(model)},
            )
    except Exception as error:  # the importer raises AssertionError, KeyError, ValueError, TVMError, ...
        raise ModelError(f"TVM cannot import this torch program: {first_line(error)}{precision_hint(model)}") from error
    named = {**model.graph_signature.inputs_to_parameters, **model.graph_signature.inputs_to_buffers}
    return split_params(mod, named)


def precision_hint(program: Any) -> str:
    """TVM's importer makes float32 of some operators of other types, which then do not fit together."""
    dtypes = {str(value.dtype).removeprefix("torch.") for value in program.state_dict.values()}
    other = sorted(dtypes & {"float16", "bfloat16", "float64"})
    return f"; it holds {', '.join(other)} weights: convert it with model.float()" if other else ""


def export(model: Any, inputs: tuple[Any, ...] | None) -> Any:
    """torch.export of a module in evaluation mode."""
    import torch

    if not inputs:
        raise ModelError("a torch.nn.Module needs example inputs: ts.compile(model, inputs=(x,))")
    example = tuple(torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in inputs)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # torch warns of the list in which its own recurrent layers keep their weights
            warnings.filterwarnings("ignore", message="The tensor attributes? .*_flat_weights")
            return torch.export.export(model, example)
    except Exception as error:  # torch raises many kinds, several of them private
        raise ModelError(f"torch cannot export this module: {first_line(error)}") from error
    finally:
        for module, training in modes.items():
            module.training = training


def from_onnx(model: Any, inputs: Any = None) -> Imported:
    """Shapes that the ONNX model leaves open are taken from the example inputs, else stay open."""
    import onnx
    from tvm.relax.frontend.onnx import from_onnx as import_onnx

    from tvm_structured.onnx_constants import fold_constants

    if not isinstance(model, onnx.ModelProto):
        raise ModelError(f"{type(model).__name__} is not an ONNX model; give an onnx.ModelProto or a path")
    if not model.graph.node:
        raise ModelError("the ONNX model is empty (no nodes); it may be truncated, export it again")
    weights = {tensor.name for tensor in model.graph.initializer}
    slots = [value.name for value in model.graph.input if value.name not in weights]
    shapes = example_shapes(slots, inputs)
    try:
        model = fold_constants(model, shapes)
        mod = import_onnx(model, shape_dict=shapes, keep_params_in_input=True, sanitize_input_names=False)
    except Exception as error:  # the importer raises its own kinds, KeyError, ValueError, TVMError, ...
        raise ModelError(f"TVM cannot import this ONNX model: {first_line(error)}") from error
    return split_params(mod, {})


def example_shapes(slots: Sequence[str], inputs: Any) -> dict[str, list[int]] | None:
    """Shapes of example inputs (in order, or by name) for the importer; None without examples."""
    if inputs is None:
        return None
    if isinstance(inputs, Mapping):
        unknown = [name for name in inputs if name not in slots]
        if unknown:
            raise ModelError(f"unknown input {unknown[0]!r}; the model takes {', '.join(slots)}")
        return {name: list(np.shape(x)) for name, x in inputs.items()}
    examples = as_tuple(inputs) or ()
    if len(examples) != len(slots):
        raise ModelError(f"the model takes {len(slots)} inputs ({', '.join(slots)}), got {len(examples)} examples")
    return {name: list(np.shape(x)) for name, x in zip(slots, examples, strict=True)}


def from_relax(mod: Any) -> Imported:
    """A Relax module with a function `main`; its constants are the weights."""
    if "main" not in [var.name_hint for var in mod.get_global_vars()]:
        raise ModelError("the Relax module has no function 'main'; rename the entry function")
    return split_params(mod, {})


def split_params(mod: Any, names: Mapping[str, str]) -> Imported:
    """Tell inputs from weights. Values are copied: the importers alias the model's own storage."""
    main = mod["main"]
    attrs = main.attrs or {}
    count = int(attrs["num_input"]) if "num_input" in attrs else len(main.params)
    values = attrs["params"] if "params" in attrs else []
    weights = main.params[count:]
    if len(values) != len(weights):
        raise ModelError(f"main has {len(weights)} weight parameters but {len(values)} values are attached to it")
    params = {var.name: np.array(value.numpy()) for var, value in zip(weights, values, strict=True)}
    inputs = tuple(describe_input(var) for var in main.params[:count])
    known = {var.name: names.get(var.name, var.name) for var in weights}
    return Imported(mod, inputs, params, known)


def describe_input(var: Any) -> Input:
    """Name, shape and dtype of a Relax parameter."""
    shape = getattr(var.ty, "shape", None)
    if shape is None or not hasattr(shape, "values"):
        raise ModelError(f"input {var.name}: only tensors of known rank can be compiled, got {var.ty}")
    extents = tuple(int(v) if hasattr(v, "value") else None for v in shape.values)
    if 0 in extents:
        raise ModelError(f"input {var.name}: shape {extents} is empty; give example inputs with something in them")
    return Input(var.name, extents, str(var.ty.dtype))
