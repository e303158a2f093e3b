"""The trainable twin: every structure as a torch module, from scratch or projected from a trained model.

    StructuredLinear(512, 256, structure="block_circulant", block=8)
    convert(model, 0.25)        every layer to its nearest structure of a quarter of the parameters
    recover(model, dense, data) layer by layer, on unlabelled data
    fine_tune(model, data)      the whole network, with labels or a teacher
    module.to_structure()       the trained member, exactly
    to_dense(model)             plain layers again

Importing this package also registers the torch operators that `torch.export.load` needs for a saved program.
"""

from __future__ import annotations

try:
    import torch as torch
except ImportError:
    from tvm_structured.errors import EnvironmentMismatchError

    raise EnvironmentMismatchError(
        "tvm_structured.nn needs torch, which is not installed; run: pip install 'tvm-structured[torch]'"
    ) from None

from tvm_structured.nn.convert import convert, convertible_layers, to_dense
from tvm_structured.nn.fine_tune import FineTuning, fine_tune
from tvm_structured.nn.recover import Recovery, recover
from tvm_structured.nn.structured import Structured, StructuredConv2d, StructuredLinear

__all__ = [
    "FineTuning",
    "Recovery",
    "Structured",
    "StructuredConv2d",
    "StructuredLinear",
    "convert",
    "convertible_layers",
    "fine_tune",
    "recover",
    "to_dense",
]
