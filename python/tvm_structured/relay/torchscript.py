"""TorchScript modules (torch.jit.trace, torch.jit.script, torch.jit.freeze) to exported programs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm_structured.errors import ModelError
from tvm_structured.frontend import first_line

_SCALAR_TYPES = {
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
}


def traced_dtypes(module: Any) -> list[str | None]:
    """The dtypes of the arguments of `forward`, None where TorchScript does not know them (scripts, not traces)."""
    try:
        types = [argument.type() for argument in module.graph.inputs()][1:]
    except RuntimeError:  # scripts of RNN modules have no forward; export_script says what to do
        return []
    kinds = [ty.scalarType() if ty.kind() == "TensorType" else None for ty in types]
    return [_SCALAR_TYPES.get(str(kind)) for kind in kinds]


def export_script(module: Any, examples: Sequence[Any]) -> Any:
    """The torch.export.ExportedProgram of a ScriptModule, for shapes exactly those of the examples.

    torch's own converter makes every extent symbolic; exporting its result once more makes them fixed again.
    Raises ModelError where the converter does not know an operator or a piece of control flow.
    """
    import torch

    try:
        from torch._export.converter import TS2EPConverter
    except ImportError:
        raise ModelError(f"torch {torch.__version__} cannot convert TorchScript; {WAY_OUT}") from None
    args = tuple(examples)
    try:
        with evaluating(module), torch.no_grad(), quiet():
            program = TS2EPConverter(module, args).convert()
            return torch.export.export(program.module(), args)
    except Exception as error:  # torch raises many kinds, several of them private
        raise ModelError(f"torch cannot export this ScriptModule: {first_line(error)}; {WAY_OUT}") from error


WAY_OUT = "give relay.frontend.from_pytorch the torch.nn.Module itself instead of the traced or scripted one"


@contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Evaluation mode, and each submodule's own mode afterwards. Frozen modules have none."""
    modes = {child: child.training for child in module.modules() if hasattr(child, "training")}
    for child in modes:
        child.training = False
    try:
        yield
    finally:
        for child, training in modes.items():
            child.training = training


@contextmanager
def quiet() -> Iterator[None]:
    """Without the converter's remarks about buffers that eval mode does not use and extents it made symbolic."""
    logger = logging.getLogger("torch._export.non_strict_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
